//! Process 1 of a host: mounts `/proc`, says that the host is up, and reaps.

use super::host::BOOT_ID;
use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::process::{WaitOptions, wait};
use std::io::Write;

pub(super) fn main() -> Result<i32> {
    super::die_with_parent()?;
    // A session of its own, so that no terminal's signals reach the host.
    rustix::process::setsid().context("cannot make a session")?;
    unmount("/proc", UnmountFlags::DETACH).context("cannot unmount the machine's /proc")?;
    mount(
        "proc",
        "/proc",
        "proc",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        None,
    )
    .context("cannot mount /proc")?;
    // A host that boots again must see that it has.
    mount_bind(BOOT_ID, "/proc/sys/kernel/random/boot_id").context("cannot set the boot's id")?;
    println!("up");
    std::io::stdout().flush()?;
    loop {
        if matches!(wait(WaitOptions::empty()), Err(rustix::io::Errno::CHILD)) {
            // No children yet: new ones come as orphans, without a word. Looking often is all there is to do without
            // signal handlers, and a zombie costs nothing.
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}
