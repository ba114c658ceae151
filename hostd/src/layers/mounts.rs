//! Mounted layers: each once, for all jobs that use it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::SystemTime;

use flynn_api::Digest;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::paths::Paths;
use crate::{files, sys};

/// The kernel's mark of a squashfs.
const SQUASHFS_MAGIC: i64 = 0x7371_7368;

/// Which layers are mounted, and for whom they stay.
#[derive(Debug, Default)]
pub struct Mounts {
    users: BTreeMap<Digest, BTreeSet<String>>,
}

impl Mounts {
    /// Notes that a job needs these layers, whether they are there yet or not: from now on they stay.
    pub fn hold(&mut self, job: &str, layers: impl IntoIterator<Item = Digest>) {
        for layer in layers {
            self.users.entry(layer).or_default().insert(job.to_owned());
        }
    }

    /// Whether a job needs a layer.
    pub fn is_held(&self, layer: Digest) -> bool {
        self.users.contains_key(&layer)
    }

    /// The jobs that need a layer.
    pub fn users(&self, layer: Digest) -> Vec<String> {
        let users = self.users.get(&layer).into_iter().flatten();
        users.cloned().collect()
    }

    /// The layers that a job needs.
    pub fn held_by(&self, job: &str) -> Vec<Digest> {
        let held = self.users.iter().filter(|(_, users)| users.contains(job));
        held.map(|(layer, _)| *layer).collect()
    }

    /// Mounts layers for a job, those that are not mounted.
    pub fn acquire(&mut self, paths: &Paths, job: &str, layers: &[Digest]) -> io::Result<()> {
        self.hold(job, layers.iter().copied());
        for layer in layers {
            mount_layer(&paths.layer(*layer), &Paths::layer_mount(*layer)).map_err(|error| {
                io::Error::new(error.kind(), format!("cannot mount layer {layer}: {error}"))
            })?;
        }
        Ok(())
    }

    /// Has those who come from now on use a layer's new file, where that has taken a damaged one's place.
    pub fn renew(&self, paths: &Paths, layer: Digest) -> io::Result<()> {
        if self.is_held(layer) {
            mount_layer(&paths.layer(layer), &Paths::layer_mount(layer))?;
        }
        Ok(())
    }

    /// Notes that a job has gone. Layers without a user are unmounted.
    pub fn release(&mut self, paths: &Paths, job: &str) {
        self.users.retain(|layer, users| {
            users.remove(job);
            if users.is_empty() {
                // Unused from now on, as far as the file still is there.
                let _ = File::open(paths.layer(*layer)).and_then(|file| touch(&file));
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

/// Whether what is mounted is this file, and not one that was set aside.
fn is_mount_of(target: &Path, file: &Path) -> bool {
    let backing = || -> io::Result<String> {
        let device = fs::metadata(target)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/loop/backing_file"))
    };
    // Where the kernel does not say, nothing was set aside as far as anybody knows.
    backing().map_or(true, |backing| {
        let name = |path: &Path| path.file_name().map(ToOwned::to_owned);
        name(Path::new(backing.trim_end())) == name(file)
    })
}

fn mount_layer(file: &Path, target: &Path) -> io::Result<()> {
    let opened = File::open(file);
    if is_mounted(target) {
        if opened.is_err() || is_mount_of(target, file) {
            return Ok(());
        }
        // Containers have mounts of their own of what they use.
        unmount(target, UnmountFlags::DETACH)?;
    }
    let opened = opened?;
    touch(&opened)?;
    files::private_dir(target)?;
    // Containers that are not root's must be able to pass.
    fs::set_permissions(target, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    // The device stays as long as it is open here or mounted.
    let (_device, path) = sys::loop_device(&opened, false)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    Ok(mount(&path, target, "squashfs", flags, None::<&CStr>)?)
}

/// Notes that a layer is made use of.
fn touch(file: &File) -> io::Result<()> {
    file.set_modified(SystemTime::now())
}

fn unmount_layer(target: &Path) {
    if is_mounted(target)
        && let Err(error) = unmount(target, UnmountFlags::DETACH)
    {
        tracing::warn!(path = %target.display(), %error, "cannot unmount a layer");
    }
    let _ = fs::remove_dir(target);
}
