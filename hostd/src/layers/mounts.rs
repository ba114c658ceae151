//! Mounted layers: each once, for all jobs that use it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use flynn_api::Digest;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::paths::Paths;
use crate::{files, sys};

/// The kernel's mark of a squashfs.
const SQUASHFS_MAGIC: i64 = 0x7371_7368;

/// Which layers are mounted, and for whom.
#[derive(Debug, Default)]
pub struct Mounts {
    users: BTreeMap<Digest, BTreeSet<String>>,
}

impl Mounts {
    /// Mounts layers for a job, those that are not mounted.
    pub fn acquire(&mut self, paths: &Paths, job: &str, layers: &[Digest]) -> io::Result<()> {
        for layer in layers {
            mount_layer(&paths.layer(*layer), &Paths::layer_mount(*layer)).map_err(|error| {
                io::Error::new(error.kind(), format!("cannot mount layer {layer}: {error}"))
            })?;
            self.users.entry(*layer).or_default().insert(job.to_owned());
        }
        Ok(())
    }

    /// Notes that a job has gone. Layers without a user are unmounted.
    pub fn release(&mut self, job: &str) {
        self.users.retain(|layer, users| {
            users.remove(job);
            if users.is_empty() {
                unmount_layer(&Paths::layer_mount(*layer));
            }
            !users.is_empty()
        });
    }

    /// Unmounts what an earlier daemon has left and nobody uses.
    pub fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(Paths::layer_mounts())? {
            let entry = entry?;
            let digest = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<Digest>().ok());
            if digest.is_some_and(|digest| !self.users.contains_key(&digest)) {
                unmount_layer(&entry.path());
            }
        }
        Ok(())
    }
}

fn is_mounted(target: &Path) -> bool {
    rustix::fs::statfs(target).is_ok_and(|stat| stat.f_type == SQUASHFS_MAGIC)
}

fn mount_layer(file: &Path, target: &Path) -> io::Result<()> {
    if is_mounted(target) {
        return Ok(());
    }
    files::private_dir(target)?;
    // Containers that are not root's must be able to pass.
    fs::set_permissions(target, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    // The device stays as long as it is open here or mounted.
    let (_device, path) = sys::loop_device(&File::open(file)?, false)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    Ok(mount(&path, target, "squashfs", flags, None::<&CStr>)?)
}

fn unmount_layer(target: &Path) {
    if is_mounted(target)
        && let Err(error) = unmount(target, UnmountFlags::DETACH)
    {
        tracing::warn!(path = %target.display(), %error, "cannot unmount a layer");
    }
    let _ = fs::remove_dir(target);
}
