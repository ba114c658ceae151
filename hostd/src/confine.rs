//! Runs a program that can write in one directory only, whatever it is fed.
//!
//! It stays root, as it must to do its work, and sees all files where they are. But the mounts that it sees are its own,
//! and all of them are read-only, but for the directory; and no device can be opened, in the directory neither.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree,
};

use crate::sys;

/// What runs `program` so. Arguments can be added.
pub fn command(dir: &Path, program: &OsStr) -> Command {
    // This program itself, whatever is at its path by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg("confine").arg(dir).arg("--").arg(program);
    command
}

/// Becomes the program. Only in a process of one thread.
pub fn run(dir: &Path, command: &[OsString]) -> anyhow::Result<Infallible> {
    let [program, args @ ..] = command else {
        anyhow::bail!("no program is named");
    };
    shut(dir).with_context(|| format!("cannot confine {} to {}", program.display(), dir.display()))?;
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

fn shut(dir: &Path) -> io::Result<()> {
    sys::unshare_mounts()?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let own = open_tree(
        CWD,
        dir,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let harmless = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    sys::set_mount_attributes(root.as_fd(), harmless | libc::MOUNT_ATTR_RDONLY, true)?;
    sys::set_mount_attributes(own.as_fd(), harmless, false)?;
    let from = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&own, "", CWD, dir, from)?)
}
