//! How full a disk is, and the error of a full one, the same wherever it is found.

use std::fmt;
use std::io;
use std::path::Path;

use crate::{Error, ErrorCode, Result};

/// What must be free for a new job or layer.
const RESERVE: u64 = 64 << 20;

/// What a disk has for users other than root, and how large it is, in bytes.
pub fn space(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path)?;
    Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
}

/// What must stay free on a disk of this size. Small disks, as in tests and labs, keep a twentieth.
fn reserve(size: u64) -> u64 {
    RESERVE.min(size / 20)
}

/// Whether a file of so many bytes leaves the disk that `path` is on something.
pub fn has_room(path: &Path, bytes: u64) -> io::Result<bool> {
    let (free, size) = space(path)?;
    Ok(bytes.saturating_add(reserve(size)) <= free)
}

/// What is left of the disk that `path` is on, in MiB, if that is nearly nothing.
pub fn nearly_full(path: &Path) -> io::Result<Option<u64>> {
    let (free, size) = space(path)?;
    Ok((free < reserve(size)).then_some(free >> 20))
}

/// Refuses what would write to a disk that is nearly full.
pub fn check(path: &Path) -> Result<()> {
    let shown = path.display();
    match nearly_full(path) {
        Ok(None) => Ok(()),
        Ok(Some(free)) => Err(full(format!(
            "the disk of {shown} is nearly full ({free} MiB left)"
        ))),
        Err(error) => Err(Error::internal(format!(
            "cannot look at the disk of {shown}: {error}"
        ))),
    }
}

/// The error of a full disk; `what` says what could not be done, and on which host if that is not plain.
pub fn full(what: impl fmt::Display) -> Error {
    let mut error = Error::new(
        ErrorCode::LimitExceeded,
        format!("{what}: make room on that host (old layers, volumes, logs), then try again"),
    );
    error.detail = Some(serde_json::json!({ "resource": "disk" }));
    error.retry = true;
    error
}

/// Whether an error is [`full`]'s.
pub fn is_full(error: &Error) -> bool {
    error
        .detail
        .as_ref()
        .is_some_and(|detail| detail["resource"] == "disk")
}
