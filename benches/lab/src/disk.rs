//! The hosts' disks: ext4 images on a btrfs pool, which can copy one in no time.
//!
//! The pool is an image itself, mounted in the lab's mount namespace only. What a host had not synced is in its own
//! page cache and not in its image; so a copy of the image is what a power cut leaves.

use crate::tool;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The pool of a lab.
pub(crate) struct Pool {
    dir: PathBuf,
}

impl Pool {
    /// Makes and mounts it below the lab's state directory.
    pub(crate) fn new(state: &Path, hosts: u8, disk: u64) -> Result<Self> {
        let (image, dir) = (state.join("pool.img"), state.join("pool"));
        let file = File::create(&image).with_context(|| format!("cannot make {}", image.display()))?;
        // Room for each disk twice, as a power cut has it for a moment, and for btrfs itself.
        file.set_len(u64::from(hosts) * disk * 2 + (1 << 30))
            .context("cannot size the pool")?;
        tool::run(
            Command::new("mkfs.btrfs")
                .args(["-q", "-m", "single"])
                .arg(&image),
        )?;
        fs::create_dir(&dir)?;
        // It need not outlive the machine's own power cuts, so it waits for no flush below.
        tool::run(
            Command::new("mount")
                .args(["-o", "loop,nobarrier,noatime"])
                .args([&image, &dir]),
        )?;
        // Disks are written in place, as disks are.
        let opened = File::open(&dir)?;
        let flags = rustix::fs::ioctl_getflags(&opened).context("cannot read the pool's flags")?;
        rustix::fs::ioctl_setflags(&opened, flags | rustix::fs::IFlags::NOCOW)
            .context("cannot set the pool's flags")?;
        Ok(Self { dir })
    }

    /// The image of a host's disk.
    pub(crate) fn image(&self, host: u8, generation: u32) -> PathBuf {
        self.dir.join(format!("host{host}.{generation}.ext4"))
    }

    /// Makes a new disk.
    pub(crate) fn make(&self, host: u8, size: u64) -> Result<()> {
        let image = self.image(host, 0);
        let file = File::create(&image).with_context(|| format!("cannot make {}", image.display()))?;
        file.set_len(size).context("cannot size a disk")?;
        tool::run(
            Command::new("mkfs.ext4")
                .args(["-q", "-E", "lazy_itable_init=1,nodiscard"])
                .arg(&image),
        )
    }

    /// Copies a disk as it is now to its next generation.
    pub(crate) fn snapshot(&self, host: u8, generation: u32) -> Result<()> {
        let now = File::open(self.image(host, generation)).context("cannot open the disk")?;
        let next = File::create(self.image(host, generation + 1)).context("cannot make the disk's copy")?;
        rustix::fs::ioctl_ficlone(&next, &now).context("cannot copy the disk")
    }

    /// Drops a disk of an earlier generation.
    pub(crate) fn drop_image(&self, host: u8, generation: u32) -> Result<()> {
        fs::remove_file(self.image(host, generation)).context("cannot drop the old disk")
    }

    /// Unmounts it, once no host uses it.
    pub(crate) fn close(&self) -> Result<()> {
        rustix::mount::unmount(&self.dir, rustix::mount::UnmountFlags::empty())
            .context("cannot unmount the pool")
    }
}
