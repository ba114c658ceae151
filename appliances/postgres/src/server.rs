//! PostgreSQL's programs: `initdb`, and `postgres` as a child.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::process::Child;
use tokio::time::timeout;

use crate::Error;
use crate::config::{self, ADMIN};
use crate::user::User;
use crate::volume::{self, Volume};

/// How long a fast shutdown may take: it writes a checkpoint.
const FAST: Duration = Duration::from_secs(20);
/// How long an immediate one may take.
const IMMEDIATE: Duration = Duration::from_secs(5);

/// Makes a database in its place, whole or not at all.
pub(crate) async fn create(volume: &Volume, programs: &Path, user: &User) -> Result<(), Error> {
    let dir = volume.unfinished();
    volume::remove_dir(&dir)?;
    std::fs::create_dir(&dir).map_err(Error::file("cannot make", &dir))?;
    user.own(&dir)?;
    let output = user
        .command(&programs.join("initdb"))
        .arg("--pgdata")
        .arg(&dir)
        .args([
            "--username",
            ADMIN,
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--data-checksums",
        ])
        // What may log in is written before the server starts ([`config`]).
        .args(["--auth-local=peer", "--auth-host=reject"])
        .stdin(volume.held()?)
        .kill_on_drop(true)
        .output()
        .await
        .map_err(Error::file("cannot start", programs.join("initdb")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = said.lines().rev().take(5).collect();
        let why = format!(
            "{}: {}",
            output.status,
            tail.into_iter().rev().collect::<Vec<_>>().join(" / ")
        );
        return Err(Error::Program {
            program: "initdb",
            why,
        });
    }
    volume.adopt()
}

/// A server that was started.
pub(crate) struct Server {
    child: Child,
}

impl Server {
    /// Starts one on the volume's database.
    pub(crate) fn start(
        volume: &Volume,
        programs: &Path,
        address: SocketAddr,
        user: &User,
    ) -> Result<Self, Error> {
        config::write(&volume.database(), &volume.sockets(), address, user)?;
        let child = user
            .command(&programs.join("postgres"))
            .arg("-D")
            .arg(volume.database())
            .stdin(volume.held()?)
            .stdout(Stdio::inherit())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .map_err(Error::file("cannot start", programs.join("postgres")))?;
        Ok(Self { child })
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> Result<ExitStatus, Error> {
        self.child.wait().await.map_err(|why| Error::Program {
            program: "postgres",
            why: why.to_string(),
        })
    }

    /// Stops it: clients are cut off and a checkpoint is written; where that takes too long, it is left to recovery.
    pub(crate) async fn stop(mut self) {
        for (signal, patience) in [(Signal::INT, FAST), (Signal::QUIT, IMMEDIATE)] {
            let Some(pid) = self.pid() else { return };
            // An error says that it is gone, which the wait finds out.
            let _ = kill_process(pid, signal);
            if timeout(patience, self.child.wait()).await.is_ok() {
                return;
            }
            tracing::warn!(?signal, "the server does not stop");
        }
        if let Some(pid) = self.pid() {
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = self.child.wait().await;
        }
    }

    fn pid(&self) -> Option<Pid> {
        self.child
            .id()
            .and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
    }
}
