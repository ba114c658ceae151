//! Who makes or ends a lab does it alone: a lock on its state directory. It goes with the process that has it.

use anyhow::{Context, Result};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a lab may be in the making before it is ended all the same.
const PATIENCE: Duration = Duration::from_secs(30);

/// Takes the lock, waiting for who has it; none when there is no such directory any more.
pub(crate) fn alone(dir: &Path) -> Result<Option<File>> {
    let lock = match File::open(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        lock => lock.with_context(|| format!("cannot open {}", dir.display()))?,
    };
    let begun = Instant::now();
    while let Err(error) = lock.try_lock() {
        if let TryLockError::Error(error) = error {
            return Err(error).with_context(|| format!("cannot lock {}", dir.display()));
        }
        if begun.elapsed() > PATIENCE {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Whoever had it may have removed the directory, and another may have made one of that name.
    let same = dir
        .metadata()
        .is_ok_and(|there| lock.metadata().is_ok_and(|ours| ours.ino() == there.ino()));
    Ok(same.then_some(lock))
}
