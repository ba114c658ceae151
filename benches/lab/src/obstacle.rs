//! Whether this machine can have a lab.

use std::fs;
use std::path::Path;

/// Why this machine cannot have a lab, if so. Tests that need one are decided upon by this, and skipped.
pub fn obstacle() -> Option<&'static str> {
    let tool = |name: &str| {
        ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|dir| Path::new(dir).join(name).exists())
    };
    let have = |text: &str, word: &str| fs::read_to_string(text).is_ok_and(|text| text.contains(word));
    if !rustix::process::geteuid().is_root() {
        Some("they need root")
    } else if !["ip", "nft", "mkfs.btrfs", "mkfs.ext4", "mount"]
        .into_iter()
        .all(tool)
    {
        Some("iproute2, nftables, btrfs-progs, e2fsprogs and mount are needed")
    } else if !have("/proc/mounts", " cgroup2 ") {
        Some("no cgroup v2 is mounted")
    } else {
        None
    }
}
