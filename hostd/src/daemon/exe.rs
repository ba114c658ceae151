//! This program's own file, to be executed anew as a supervisor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use crate::supervisor::LOG as SUPERVISOR_LOG;
use crate::sys;

/// How many supervisors wait for jobs.
const SPARES: usize = 1;

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

    /// Starts a supervisor that is to learn its job by [`assign`], with a network namespace of its own already. It ends
    /// with the daemon.
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
            .current_dir("/")
            .env_clear()
            .envs(std::env::var_os("RUST_LOG").map(|filter| ("RUST_LOG", filter)))
            // One heap: a second one costs memory for nothing in a process with one thread.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(input)
            // Closed by it once its socket is there; a spare one says before that it has its network namespace.
            .stdout(Stdio::piped())
            .stderr(log);
        command
    }
}

/// Supervisors that are made before there are jobs for them: what takes the longest of a start is done by then.
#[derive(Debug, Default)]
pub(super) struct Spares(Mutex<Vec<Child>>);

impl Spares {
    fn all(&self) -> MutexGuard<'_, Vec<Child>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One, if there is any.
    pub(super) fn take(&self) -> Option<Child> {
        self.all().pop()
    }

    /// Ends them: none is needed here any more.
    pub(super) fn dismiss(&self) {
        // The end of their input ends them; the runtime waits for them.
        self.all().clear();
    }

    /// Sees that there are enough.
    pub(super) fn fill(&self, executable: &Executable) {
        let mut all = self.all();
        // What has been killed is of no use.
        all.retain_mut(|spare| matches!(spare.try_wait(), Ok(None)));
        while all.len() < SPARES {
            match executable.spare() {
                Ok(spare) => all.push(spare),
                Err(error) => {
                    tracing::warn!(%error, "cannot start a supervisor in advance");
                    return;
                }
            }
        }
    }
}

/// Tells a spare supervisor its job, and waits until it has its network namespace: before, its process is in ours.
pub(super) async fn assign(spare: &mut Child, job_dir: &Path) -> io::Result<()> {
    let mut input = spare.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    input.write_all(job_dir.as_os_str().as_bytes()).await?;
    input.write_all(b"\n").await?;
    let output = spare.stdout.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
    output.read_exact(&mut [0]).await.map(drop)
}
