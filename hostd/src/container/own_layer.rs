//! The topmost layer of a container's file system: what the container itself writes.
//!
//! It is in the job's directory or, where the job says how much it may write (`temp_disk`), on an ext4 of that size in a
//! file there. Nobody but the container has that mounted: it goes with the container.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use flynn_api::server::disk;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::launch::Launch;
use crate::{ext4, files, sys};

/// The file of an ext4, and where the container sees that until its root is changed.
const IMAGE: &str = "temp.ext4";
const MOUNT: &str = "temp";

/// The directories that an overlay wants, and what makes a layer of its own of them.
const UPPER: &str = "upper";
const WORK: &str = "work";

/// An empty layer.
#[derive(Debug)]
pub struct OwnLayer {
    /// The ext4, mounted nowhere.
    temp_disk: Option<OwnedFd>,
}

impl OwnLayer {
    /// All that there may be of it in a job's directory.
    pub const NAMES: [&str; 4] = [UPPER, WORK, MOUNT, IMAGE];

    /// Makes one in place of the one that is there: each run begins with the image as it is.
    pub fn make(launch: &Launch, job_dir: &Path) -> io::Result<Self> {
        for name in Self::NAMES {
            files::remove_all(&job_dir.join(name))?;
        }
        let Some(size) = launch.temp_disk else {
            directories(launch, job_dir)?;
            return Ok(Self { temp_disk: None });
        };
        let mount = make_temp_disk(job_dir, size).map_err(|error| {
            // It may have taken what there was.
            let _ = files::remove_all(&job_dir.join(IMAGE));
            let what = format!("the temporary disk of {} MB (temp_disk): {error}", size >> 20);
            io::Error::new(error.kind(), what)
        })?;
        directories(launch, Path::new(&sys::fd_path(&mount)))?;
        Ok(Self {
            temp_disk: Some(mount),
        })
    }

    /// The descriptor that init is to keep.
    pub(super) fn as_raw(&self) -> Option<RawFd> {
        self.temp_disk.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Shows it in this mount namespace, which is the container's. Gives the directories for the overlay, and for its work.
    pub(super) fn show(&self, job_dir: &Path) -> io::Result<(PathBuf, PathBuf)> {
        let mut dir = job_dir.to_owned();
        if let Some(mount) = &self.temp_disk {
            dir.push(MOUNT);
            move_mount(mount, "", CWD, &dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        }
        Ok((dir.join(UPPER), dir.join(WORK)))
    }
}

fn directories(launch: &Launch, dir: &Path) -> io::Result<()> {
    let (upper, work) = (dir.join(UPPER), dir.join(WORK));
    std::fs::create_dir(&work)?;
    std::fs::create_dir(&upper)?;
    // This becomes the container's root directory.
    std::fs::set_permissions(&upper, Permissions::from_mode(0o755))?;
    if let Some(first) = launch.first_id() {
        std::os::unix::fs::chown(&upper, Some(first), Some(first))?;
    }
    Ok(())
}

/// The container's init cannot do this: no device of the host's is allowed to it.
fn make_temp_disk(job_dir: &Path, size: u64) -> io::Result<OwnedFd> {
    if !disk::has_room(job_dir, size)? {
        let what = "the host's disk has no room for it: take a smaller one, or make room";
        return Err(io::Error::new(io::ErrorKind::StorageFull, what));
    }
    files::private_dir(&job_dir.join(MOUNT))?;
    // No journal: nobody looks at it again after a crash. Its tables are zeroed by nobody, for that makes holes.
    let options = ["-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=1"].map(AsRef::as_ref);
    let image = ext4::make(&job_dir.join(IMAGE), size, &options)?;
    // The device stays as long as it is open here or mounted.
    let (_device, path) = sys::loop_device(&image, true)?;
    let filesystem = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&filesystem, "source", path)?;
    // Nor does anybody wait for it to be on the disk: the end of a container would.
    for flag in ["noinit_itable", "nobarrier"] {
        fsconfig_set_flag(&filesystem, flag)?;
    }
    fsconfig_create(&filesystem)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    Ok(fsmount(&filesystem, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
