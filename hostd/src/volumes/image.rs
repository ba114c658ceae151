//! Volumes with a limit where the filesystem knows no quotas: an ext4 in a file, mounted by a loop device.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::tool::{Tool, long_for};
use crate::{ext4, files, sys};

const FILE: &str = "image.ext4";

/// The data's directory in the filesystem: beside `lost+found`, which programs that want an empty one do not like.
const DATA: &str = "data";

const RESIZE: Tool = Tool {
    program: "resize2fs",
    package: "e2fsprogs",
};

/// Makes an empty one in `dir`.
pub(super) fn make(dir: &Path, size: u64, (uid, gid): (u32, u32)) -> io::Result<()> {
    let root = dir.join("root");
    let data = root.join(DATA);
    files::private_dir(&data)?;
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o755))?;
    chown(&data, Some(uid), Some(gid))?;
    // Nothing is left to be zeroed once it is mounted: a loop device does that by holes.
    let extended = "nodiscard,lazy_itable_init=0,lazy_journal_init=0";
    let options = ["-E".as_ref(), extended.as_ref(), "-d".as_ref(), root.as_os_str()];
    ext4::make(&dir.join(FILE), size, &options)?.sync_all()?;
    files::remove_all(&root)
}

/// Mounts the one in `dir` at `target`, unless it is. Gives the directory of the data.
pub(super) fn open(dir: &Path, target: &Path) -> io::Result<PathBuf> {
    if !is_mounted(target)? {
        files::private_dir(target)?;
        // Containers that are not root's must be able to pass.
        fs::set_permissions(target, fs::Permissions::from_mode(0o755))?;
        let file = File::options().read(true).write(true).open(dir.join(FILE))?;
        // Two ext4 of one file would destroy it. The loop device keeps the lock for as long as it is there.
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            let what = "it is still mounted in another place: try again when the jobs that used it are gone";
            io::Error::new(io::ErrorKind::ResourceBusy, what)
        })?;
        // The device stays as long as it is open here or mounted.
        let (_device, path) = sys::loop_device(&file, true)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount(&path, target, "ext4", flags, None::<&CStr>)?;
    }
    Ok(target.join(DATA))
}

/// Makes it larger, whether it is mounted or not. When there is no room it stays as it was; what was broken off can be
/// done again.
pub(super) fn grow(dir: &Path, target: &Path, size: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(dir.join(FILE))?;
    let before = file.metadata()?.len();
    if before < size {
        ext4::reserve(&file, size).inspect_err(|_| {
            let _ = file.set_len(before);
        })?;
        file.sync_all()?;
    }
    let mounted = is_mounted(target)?;
    open(dir, target)?;
    // A mounted ext4 is made larger by the kernel, step by step: it is whole after each.
    let grown = device_of(target).and_then(|device| {
        sys::fit_loop_device(&File::open(&device)?)?;
        RESIZE.run(&[device.as_os_str()], long_for(size))
    });
    if !mounted {
        close(target)?;
    }
    grown.map(drop)
}

/// The block device of what is mounted there.
fn device_of(target: &Path) -> io::Result<PathBuf> {
    let device = fs::metadata(target)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}"))?;
    let name = link.file_name().ok_or(io::ErrorKind::NotFound)?;
    Ok(Path::new("/dev").join(name))
}

/// Unmounts it, where it is mounted.
pub(super) fn close(target: &Path) -> io::Result<()> {
    if is_mounted(target)? {
        unmount(target, UnmountFlags::DETACH)?;
    }
    // Nothing but the mount point: where something is mounted still, its data are not to go.
    match fs::remove_dir(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// How much of it is used, where it is mounted.
pub(super) fn used(target: &Path) -> io::Result<Option<u64>> {
    if !is_mounted(target)? {
        return Ok(None);
    }
    let stat = rustix::fs::statvfs(target)?;
    Ok(Some((stat.f_blocks - stat.f_bfree) * stat.f_frsize))
}

/// Whether something is mounted there.
pub(super) fn is_mounted(target: &Path) -> io::Result<bool> {
    let device = |path: &Path| fs::symlink_metadata(path).map(|metadata| metadata.dev());
    let above = target.parent().unwrap_or(Path::new("/"));
    match (device(target), device(above)) {
        (Ok(one), Ok(other)) => Ok(one != other),
        (Err(error), _) | (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}
