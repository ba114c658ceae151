//! Who is at which volume.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Locks by volumes' ids. Whoever works on volumes, or makes some under these ids, has them to itself; work on others
/// goes on.
#[derive(Debug, Default)]
pub(super) struct Locks {
    held: Mutex<BTreeSet<String>>,
    freed: Condvar,
}

/// Ids that nobody else works on for as long as this lives.
#[must_use]
pub(super) struct Lock<'a> {
    ids: Vec<String>,
    of: &'a Locks,
}

impl Locks {
    /// Waits until none of these is held. All are taken at once: who waits holds none, so nobody waits for ever.
    pub(super) fn lock(&self, ids: &[&str]) -> Lock<'_> {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        let mut held = self.held();
        while ids.iter().any(|id| held.contains(id)) {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.extend(ids.iter().cloned());
        Lock { ids, of: self }
    }

    fn held(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        let mut held = self.of.held();
        for id in &self.ids {
            held.remove(id);
        }
        self.of.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_who_wants_the_same_waits() {
        let locks = Locks::default();
        let first = locks.lock(&["one", "one", "two"]);
        drop(locks.lock(&["three"]));
        std::thread::scope(|scope| {
            let (done, waits) = mpsc::channel();
            let locks = &locks;
            scope.spawn(move || {
                let _lock = locks.lock(&["three", "two"]);
                done.send(()).unwrap();
            });
            assert!(waits.recv_timeout(Duration::from_millis(50)).is_err());
            // Who waits holds nothing.
            drop(locks.lock(&["three"]));
            drop(first);
            waits.recv().unwrap();
        });
        assert!(locks.held().is_empty());
    }
}
