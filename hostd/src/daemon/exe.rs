//! This program's own file, to be executed anew as a supervisor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use tokio::process::{Child, Command};

use crate::sys;

/// The file, through a read-only mount of its own: a container whose process has this file as its program, between
/// fork and exec, could otherwise reach it through `/proc` and write to it.
#[derive(Debug)]
pub(super) struct Executable(OwnedFd);

impl Executable {
    /// Of this process.
    pub(super) fn own() -> io::Result<Self> {
        // By its name rather than by `/proc/self/exe`, which cannot be mounted once the file has been replaced.
        let path = std::env::current_exe()?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, &path, flags)?;
        sys::set_mount_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
        Ok(Self(mount))
    }

    /// Starts the supervisor of the job in `job_dir`.
    pub(super) fn supervise(&self, job_dir: &Path) -> io::Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(job_dir.join("supervisor.log"))?;
        Command::new(sys::fd_path(&self.0))
            .arg0("flynn-host")
            .arg("supervise")
            .arg(job_dir)
            .current_dir("/")
            .env_clear()
            .envs(std::env::var_os("RUST_LOG").map(|filter| ("RUST_LOG", filter)))
            // One heap: a second one costs memory for nothing in a process with one thread.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
    }
}
