//! Volumes as subvolumes of a btrfs, by its own program.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use super::tool;
use crate::files;

/// The kernel's mark of a btrfs.
const MAGIC: i64 = 0x9123_683e;

/// The inode of every subvolume's root.
const ROOT_INODE: u64 = 256;

pub(super) const PROGRAM: &str = "btrfs";
const PACKAGE: &str = "btrfs-progs";

fn btrfs(words: &[&str], paths: &[&Path]) -> io::Result<String> {
    let words = words.iter().map(OsStr::new);
    let args: Vec<&OsStr> = words.chain(paths.iter().map(|path| path.as_os_str())).collect();
    tool::run(PROGRAM, PACKAGE, &args)
}

/// The error of its program when that could not be started.
pub(crate) fn tool_missing(error: &io::Error) -> io::Error {
    tool::missing(PROGRAM, PACKAGE, error)
}

/// The error of its program when that has failed, of what it said.
pub(crate) fn tool_failed(stderr: &[u8]) -> io::Error {
    tool::failed(PROGRAM, stderr)
}

/// Whether a path is on a btrfs.
pub(super) fn is_on(path: &Path) -> io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type == MAGIC)
}

/// Whether its program can be run.
pub(super) fn is_there() -> io::Result<()> {
    btrfs(&["--version"], &[]).map(drop)
}

/// Whether a path is a subvolume.
pub(super) fn is_subvolume(path: &Path) -> bool {
    let root =
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir() && metadata.ino() == ROOT_INODE);
    root && is_on(path).unwrap_or(false)
}

/// Makes an empty subvolume.
pub(super) fn make(data: &Path, limit: Option<u64>, (uid, gid): (u32, u32)) -> io::Result<()> {
    btrfs(&["subvolume", "create", "--"], &[data])?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o755))?;
    chown(data, Some(uid), Some(gid))?;
    set_limit(data, limit)
}

/// Limits what a subvolume may hold.
pub(super) fn set_limit(data: &Path, limit: Option<u64>) -> io::Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let limit = limit.to_string();
    let set = || btrfs(&["qgroup", "limit", &limit], &[data]);
    // Quotas cost, and are off until the first limit.
    if set().is_err() {
        btrfs(&["quota", "enable"], &[data])?;
        set()?;
    }
    Ok(())
}

/// Makes a copy that shares all with its source until one of them is written.
pub(super) fn copy(from: &Path, to: &Path, read_only: bool) -> io::Result<()> {
    let words: &[&str] = if read_only {
        &["subvolume", "snapshot", "-r", "--"]
    } else {
        &["subvolume", "snapshot", "--"]
    };
    btrfs(words, &[from, to]).map(drop)
}

/// Removes a subvolume.
pub(super) fn remove(data: &Path) -> io::Result<()> {
    let removed = btrfs(&["subvolume", "delete", "--"], &[data]);
    match removed {
        Ok(_) => Ok(()),
        // Jobs can have made subvolumes within.
        Err(_) if data.exists() => files::remove_all(data),
        Err(error) => Err(error),
    }
}

/// How many bytes a limited subvolume refers to; none where quotas are off.
pub(super) fn used(data: &Path) -> Option<u64> {
    let shown = btrfs(&["qgroup", "show", "--raw", "-f"], &[data]).ok()?;
    referenced(&shown)
}

/// The second column of the last line that begins with a subvolume's group.
fn referenced(shown: &str) -> Option<u64> {
    let group = |line: &str| -> Option<u64> {
        let mut columns = line.split_whitespace();
        columns.next()?.strip_prefix("0/")?;
        columns.next()?.parse().ok()
    };
    shown.lines().filter_map(group).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_tables_are_read() {
        let old = "qgroupid         rfer         excl \n--------         ----         ---- \n0/257           16384        16384 \n";
        let new = "Qgroupid    Referenced    Exclusive Path\n--------    ----------    --------- ----\n0/258           20480         4096 a/data\n";
        assert_eq!((referenced(old), referenced(new)), (Some(16384), Some(20480)));
        assert_eq!(referenced("ERROR: quotas not enabled"), None);
    }
}
