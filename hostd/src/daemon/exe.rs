//! This program's own file, to be executed anew as a supervisor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use tokio::process::{Child, Command};

use crate::supervisor::LOG as SUPERVISOR_LOG;
use crate::sys;

/// The file, through a read-only mount of its own: a container whose process has this file as its program, between
/// fork and exec, could otherwise reach it through `/proc` and write to it.
#[derive(Clone, Debug)]
pub(super) struct Executable(Arc<OwnedFd>);

impl Executable {
    /// Of this process, at its start: another file may come to be in its place.
    pub(super) fn own() -> io::Result<Self> {
        // By its name rather than by `/proc/self/exe`, which cannot be mounted once the file has been replaced.
        let path = std::env::current_exe()?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, &path, flags)?;
        sys::set_mount_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
        Ok(Self(Arc::new(mount)))
    }

    /// Starts the supervisor of the job in `job_dir`.
    pub(super) fn supervise(&self, job_dir: &Path) -> io::Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(job_dir.join(SUPERVISOR_LOG))?;
        self.supervisor(log.into(), Stdio::null()).arg(job_dir).spawn()
    }

    /// Starts a supervisor that is to learn its job by [`Spare::assign`]. It ends with the daemon.
    pub(super) fn spare(&self) -> io::Result<Child> {
        self.supervisor(Stdio::inherit(), Stdio::piped()).spawn()
    }

    /// Starts a process that tries whether jobs can have user namespaces ([`crate::container::probe`]).
    pub(super) fn probe_user_namespace(&self, first: u32) -> io::Result<Child> {
        Command::new(sys::fd_path(&self.0))
            .args(["probe-user-namespace", &first.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    }

    fn supervisor(&self, log: Stdio, input: Stdio) -> Command {
        let mut command = Command::new(sys::fd_path(&self.0));
        command
            .arg0("flynn-host")
            .arg("supervise")
            .env_clear()
            // Where the programs of filesystems are.
            .envs(
                ["PATH", "RUST_LOG"]
                    .map(|name| Some((name, std::env::var_os(name)?)))
                    .into_iter()
                    .flatten(),
            )
            // One heap: a second one costs memory for nothing in a process with one thread.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(input)
            // Closed by it once its socket is there; a spare one says before that it has its network namespace.
            .stdout(Stdio::piped())
            .stderr(log);
        command
    }
}
