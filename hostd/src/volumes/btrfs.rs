//! Volumes as subvolumes of a btrfs, by its own program.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx, syncfs};

use super::QUICK;
use crate::tool::{SHORT, Tool};
use crate::{files, sys};

/// The kernel's mark of a btrfs.
const MAGIC: i64 = 0x9123_683e;

/// The inode of every subvolume's root.
const ROOT_INODE: u64 = 256;

pub(super) const TOOL: Tool = Tool {
    program: "btrfs",
    package: "btrfs-progs",
};

fn btrfs(words: &[&str], paths: &[&Path]) -> io::Result<String> {
    btrfs_within(words, paths, SHORT)
}

fn btrfs_within(words: &[&str], paths: &[&Path], limit: Duration) -> io::Result<String> {
    let words = words.iter().map(OsStr::new);
    let args: Vec<&OsStr> = words.chain(paths.iter().map(|path| path.as_os_str())).collect();
    TOOL.run(&args, limit)
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

/// Has all that was written be on the disk.
///
/// That makes a directory removable whose subvolumes were removed. Linux (6.18 at least) cannot replay a log of a btrfs in
/// which a directory went in the same transaction as a subvolume in it: after a power cut within the half minute that a
/// transaction lasts, the filesystem would not be mounted any more (`failed to lookup inode`, -ENOENT, in
/// `check_item_in_log`). So the two are never in one.
pub(super) fn settle(dir: &Path) -> io::Result<()> {
    if is_on(dir)? {
        syncfs(File::open(dir)?)?;
    }
    Ok(())
}

/// Has a subvolume never change again.
pub(super) fn set_read_only(data: &Path) -> io::Result<()> {
    btrfs(
        &["property", "set", "-ts"],
        &[data, Path::new("ro"), Path::new("true")],
    )
    .map(drop)
}

/// Where the filesystem is mounted that a path is on.
pub(super) fn mount_point(path: &Path) -> io::Result<PathBuf> {
    let mount = |path: &Path| {
        let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)?;
        Ok::<_, io::Error>(stat.stx_mnt_id)
    };
    let own = mount(path)?;
    let mut top = path;
    while let Some(above) = top.parent()
        && mount(above)? == own
    {
        top = above;
    }
    Ok(top.to_owned())
}

/// How many bytes a limited subvolume refers to; none where quotas are off.
pub(super) fn used(data: &Path) -> Option<u64> {
    let shown = btrfs_within(&["qgroup", "show", "--raw", "-f"], &[data], QUICK).ok()?;
    referenced(&shown).next_back().map(|(_, bytes)| bytes)
}

/// The same of all subvolumes of a filesystem, by their ids.
pub(super) fn all_used(path: &Path) -> BTreeMap<u64, u64> {
    let shown = btrfs_within(&["qgroup", "show", "--raw"], &[path], QUICK).unwrap_or_default();
    referenced(&shown).collect()
}

/// The id of a subvolume in its filesystem.
pub(super) fn id(data: &Path) -> io::Result<u64> {
    sys::subvolume_id(&File::open(data)?)
}

/// The first two columns of the lines that begin with a subvolume's group.
fn referenced(shown: &str) -> impl DoubleEndedIterator<Item = (u64, u64)> {
    shown.lines().filter_map(|line| {
        let mut columns = line.split_whitespace();
        let id = columns.next()?.strip_prefix("0/")?.parse().ok()?;
        Some((id, columns.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_tables_are_read() {
        let old = "qgroupid         rfer         excl \n--------         ----         ---- \n0/257           16384        16384 \n";
        let new = "Qgroupid    Referenced    Exclusive Path\n--------    ----------    --------- ----\n0/258           20480         4096 a/data\n";
        let all = |shown: &str| referenced(shown).collect::<Vec<_>>();
        assert_eq!((all(old), all(new)), (vec![(257, 16384)], vec![(258, 20480)]));
        assert_eq!(all("ERROR: quotas not enabled"), []);
    }
}
