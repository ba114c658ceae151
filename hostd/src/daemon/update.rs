//! `POST /host/update`: another program goes on with this daemon's work.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::extract::State;
use flynn_api::host::{Update, Updated};
use flynn_api::server::{Json, StrictJson};
use flynn_api::{Error, Result};
use tokio::process::Child;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

use super::Daemon;
use super::api::Shared;
use super::gate::Closed;
use super::handover::{Sockets, Successor};
use crate::files::{self, disk_error};

/// The call's path.
pub(super) const PATH: &str = "/host/update";

/// How long what is under way may take until it is done.
const PATIENCE: Duration = Duration::from_mins(1);

/// Somebody wants another program.
#[derive(Debug)]
pub(super) struct Wish {
    update: Update,
    reply: oneshot::Sender<Result<Updated>>,
}

impl Wish {
    /// Says what has become of it.
    pub(super) fn answer(self, answer: Result<Updated>) {
        // Whoever asked may have gone.
        let _ = self.reply.send(answer);
    }
}

/// `POST /host/update`
pub(super) async fn update(
    State(daemon): Shared,
    StrictJson(update): StrictJson<Update>,
) -> Result<Json<Updated>> {
    let other = || Error::conflict("another update is under way: see flynn-host version, and try again");
    let (reply, answer) = oneshot::channel();
    daemon
        .updates
        .try_send(Wish { update, reply })
        .map_err(|_| other())?;
    answer.await.map_err(|_| other())?.map(Json)
}

/// A program that can take over, while nobody acts.
pub(super) struct Prepared {
    successor: Successor,
    closed: Closed,
    installed: Option<New>,
}

/// Gets the program ready, and waits until nobody acts. When this fails nothing has changed.
pub(super) async fn prepare(daemon: &Daemon, sockets: &Sockets, wish: &Wish) -> Result<Prepared> {
    let binary = wish.update.binary.clone();
    let placed = spawn_blocking(move || place(binary.as_deref())).await;
    let (program, installed) =
        placed.unwrap_or_else(|error| Err(Error::internal(format!("the update was cut off: {error}"))))?;
    let successor = Successor::prepare(&program, daemon.paths.state(), sockets)
        .await
        .map_err(Error::conflict)?;
    let closed = daemon.gate.close(PATIENCE).await.map_err(|inside| {
        Error::conflict(format!(
            "what is under way does not end within {} s ({}): try again when it has",
            PATIENCE.as_secs(),
            inside.join(", ")
        ))
    })?;
    Ok(Prepared {
        successor,
        closed,
        installed,
    })
}

/// Hands over; the daemon that goes on, if that has worked. When it has not, the state is anybody's to take up.
pub(super) async fn commit(prepared: Prepared, wish: Wish) -> Option<Child> {
    let Prepared {
        successor,
        closed,
        installed,
    } = prepared;
    let to = successor.version.clone();
    closed.leave();
    match successor.commit().await {
        Ok(child) => {
            let kept = installed.map_or(Ok(()), New::keep);
            let pid = child.id().unwrap_or_default();
            wish.answer(match kept {
                Ok(()) => Ok(Updated {
                    from: env!("CARGO_PKG_VERSION").into(),
                    to,
                    pid,
                }),
                Err(error) => Err(disk_error(
                    "put the new program, which runs, in the place of the one before",
                    &error,
                )),
            });
            Some(child)
        }
        Err(why) => {
            tracing::error!(
                why,
                "the new program has failed to take over; this one begins anew"
            );
            wish.answer(Err(Error::conflict(format!(
                "{why}. The daemon that ran before goes on"
            ))));
            None
        }
    }
}

/// What a program's name ends with until it is in its place.
const NEW: &str = ".new";

/// The place of this daemon's program, where another file may be by now, or the one before still is.
fn own() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let Some(name) = path.to_str() else {
        return Ok(path);
    };
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    Ok(PathBuf::from(name.strip_suffix(NEW).unwrap_or(name)))
}

/// A program beside this daemon's own. It goes unless it is kept.
struct New {
    path: PathBuf,
    own: PathBuf,
}

impl New {
    /// In the place of the one before.
    fn keep(self) -> io::Result<()> {
        fs::rename(&self.path, &self.own)?;
        self.own.parent().map_or(Ok(()), files::sync_dir)
    }
}

impl Drop for New {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The program to start: what is by now where this daemon's own was, or a copy of another file beside it.
fn place(binary: Option<&str>) -> Result<(PathBuf, Option<New>)> {
    let own =
        own().map_err(|error| Error::internal(format!("cannot find this daemon's own program: {error}")))?;
    let Some(binary) = binary.map(Path::new) else {
        return Ok((own, None));
    };
    let refuse =
        |why: &dyn std::fmt::Display| Error::invalid_field("binary", format!("{} {why}", binary.display()));
    if !binary.is_absolute() {
        return Err(refuse(&"is no absolute path on this host"));
    }
    let file = fs::metadata(binary).map_err(|error| refuse(&format!("cannot be read: {error}")))?;
    if !file.is_file() {
        return Err(refuse(&"is no file"));
    }
    if file.permissions().mode() & 0o111 == 0 {
        return Err(refuse(
            &"is not executable: chmod +x it if it is the program that is meant",
        ));
    }
    if fs::metadata(&own).is_ok_and(|own| (own.dev(), own.ino()) == (file.dev(), file.ino())) {
        return Ok((own, None));
    }
    let mut path = own.clone().into_os_string();
    path.push(NEW);
    let new = New {
        path: path.into(),
        own,
    };
    let copied = fs::copy(binary, &new.path)
        .and_then(|_| fs::set_permissions(&new.path, fs::Permissions::from_mode(0o755)))
        .and_then(|()| File::open(&new.path)?.sync_all());
    copied.map_err(|error| disk_error(&format!("copy it to {}", new.path.display()), &error))?;
    Ok((new.path.clone(), Some(new)))
}
