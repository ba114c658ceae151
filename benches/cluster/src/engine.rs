//! A docker engine of one's own: it loads and saves images, and runs nothing.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::until;

/// How long it may take to begin.
const PATIENCE: Duration = Duration::from_mins(1);

/// An engine in namespaces of its own. It goes with its value, or with the thread that started it, and leaves nothing.
pub struct Engine {
    daemon: Child,
    dir: tempfile::TempDir,
}

impl Engine {
    /// Why there can be none here, if so.
    pub fn missing() -> Option<String> {
        let there = Path::new("/usr/sbin/dockerd").exists() || Path::new("/usr/bin/dockerd").exists();
        (!there).then(|| "there is no docker engine; `cargo xtask setup` installs one".into())
    }

    /// Starts one.
    pub fn start() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("flynn-engine-").tempdir()?;
        // What it keeps outside its directory, in `/etc` and `/run`, is its namespace's.
        let script = "mount -t tmpfs none /etc/docker && mount -t tmpfs none /run && exec dockerd \"$@\"";
        let place = |name: &str| dir.path().join(name).display().to_string();
        let log = std::fs::File::create(dir.path().join("log"))?;
        let daemon = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "--mount", "--ipc"])
            .args([
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                script,
                "sh",
            ])
            .args([
                "--bridge=none",
                "--iptables=false",
                "--ip6tables=false",
                "--storage-driver=vfs",
            ])
            .args(["--data-root", &place("data"), "--exec-root", &place("run")])
            .args([
                "--pidfile",
                &place("pid"),
                "--host",
                &format!("unix://{}", place("socket")),
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start a docker engine")?;
        let mut engine = Self { daemon, dir };
        until(PATIENCE, "the docker engine answers", || {
            if let Some(status) = engine.daemon.try_wait()? {
                // Waiting is of no use any more.
                return Ok(Some(Err(status)));
            }
            let answered = engine.docker().arg("version").output()?.status.success();
            Ok(answered.then_some(Ok(())))
        })?
        .map_err(|status| {
            let log = std::fs::read_to_string(engine.dir.path().join("log")).unwrap_or_default();
            anyhow::anyhow!("the docker engine ended with {status}: {log}")
        })?;
        Ok(engine)
    }

    /// What `DOCKER_HOST` must be for it.
    pub fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("socket").display())
    }

    /// Takes in the images of a docker-archive.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let output = self.docker().args(["load", "--input"]).arg(archive).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "docker load: {}", said.trim());
        Ok(())
    }

    /// Ends it and sees that nothing is left.
    pub fn end(self) -> Result<()> {
        let dir = self.dir.path().display().to_string();
        drop(self);
        ensure!(!Path::new(&dir).exists(), "{dir} is still there");
        until(PATIENCE, "the engine's processes are gone", || {
            let left = std::fs::read_dir("/proc")?.filter_map(|entry| {
                let line = std::fs::read(entry.ok()?.path().join("cmdline")).ok()?;
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                line.contains(&dir).then_some(line)
            });
            let left: Vec<_> = left.collect();
            ensure!(left.is_empty(), "processes are still there: {left:?}");
            Ok(Some(()))
        })
    }

    fn docker(&self) -> Command {
        let mut command = Command::new("docker");
        command
            .env("DOCKER_HOST", self.host())
            .env("HOME", self.dir.path());
        command
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The first process of its namespace goes with this one, and all others with that.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
