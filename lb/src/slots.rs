//! How many clients' connections there may be at a time.

use std::io;
use std::sync::Arc;

use rustix::process::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// However many files may be open.
const MOST: usize = 8192;
/// However few may be.
const LEAST: usize = 64;
/// Files for all that is no client's.
const OTHERS: u64 = 512;

/// The place of one client's connection, kept for as long as any part of it is there.
pub type Slot = Arc<OwnedSemaphorePermit>;

/// The places that there are, for HTTP and for TCP routes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Slots(Arc<Semaphore>);

impl Slots {
    /// So many.
    pub fn new(count: usize) -> Self {
        Self(Arc::new(Semaphore::new(count)))
    }

    /// As many as this process's limit of open files allows: each may need a second one, for its backend.
    pub fn of_process() -> Self {
        Self::new(count(getrlimit(Resource::Nofile).current))
    }

    /// A slot, as soon as there is one.
    pub async fn take(&self) -> io::Result<Slot> {
        let slot = Arc::clone(&self.0).acquire_owned().await;
        slot.map(Arc::new).map_err(io::Error::other)
    }

    /// How many nobody has.
    pub fn free(&self) -> usize {
        self.0.available_permits()
    }
}

/// The slots for so many open files; no number is no limit.
fn count(files: Option<u64>) -> usize {
    let places = files.map_or(MOST as u64, |files| files.saturating_sub(OTHERS) / 2);
    usize::try_from(places).unwrap_or(MOST).clamp(LEAST, MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_has_two_files() {
        let counts = [None, Some(1 << 20), Some(10_000), Some(1024), Some(0)].map(count);
        assert_eq!(counts, [MOST, MOST, 4744, 256, LEAST]);
    }
}
