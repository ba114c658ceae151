//! squashfs files, the same for the same content.

use super::recipes;
use crate::exec;
use anyhow::Result;
use std::path::Path;
use std::process::Command;

/// Packs a directory.
pub(super) fn pack(root: &Path, file: &Path) -> Result<()> {
    let epoch = recipes::EPOCH.to_string();
    exec::quiet(
        Command::new("mksquashfs")
            .args([root, file])
            .args([
                "-comp",
                "zstd",
                "-Xcompression-level",
                "9",
                "-noappend",
                "-no-progress",
                "-quiet",
            ])
            .args(["-mkfs-time", &epoch, "-all-time", &epoch])
            // It refuses the variable beside the options.
            .env_remove("SOURCE_DATE_EPOCH"),
    )
    .map(drop)
}

/// Unpacks into a directory that is not there yet.
pub(super) fn unpack(file: &Path, root: &Path) -> Result<()> {
    exec::quiet(
        Command::new("unsquashfs")
            .args(["-no-progress", "-quiet", "-dest"])
            .args([root, file]),
    )
    .map(drop)
}
