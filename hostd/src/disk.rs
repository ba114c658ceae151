//! How full the state directory's disk is.

use std::path::Path;

use flynn_api::{Error, ErrorCode, Result};

/// What must be free for a new job or layer.
const RESERVE: u64 = 64 << 20;

/// Refuses what would write to a disk that is nearly full.
pub fn check(state: &Path) -> Result<()> {
    let (free, size) = crate::sys::disk_space(state).map_err(|error| {
        Error::internal(format!("cannot look at the disk of {}: {error}", state.display()))
    })?;
    // Small disks, as in tests and labs, keep a twentieth.
    let reserve = RESERVE.min(size / 20);
    if free < reserve {
        let (free, path) = (free >> 20, state.display());
        return Err(full(format!(
            "the disk of {path} is nearly full ({free} MiB left)"
        )));
    }
    Ok(())
}

/// The error of a full disk; `what` says what could not be done.
pub fn full(what: impl std::fmt::Display) -> Error {
    let mut error = Error::new(
        ErrorCode::LimitExceeded,
        format!(
            "{what}: make room on this host (old layers, volumes, logs), or place the job on another one"
        ),
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
