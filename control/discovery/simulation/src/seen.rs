//! What happened in a run: a fault that did not happen proves nothing.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex};

use crate::executor::elapsed;

/// How often each thing happened. Clones share it. With `TRACE=1` all is printed, with the time.
#[derive(Clone)]
pub(crate) struct Seen {
    times: Arc<Mutex<BTreeMap<&'static str, u64>>>,
    trace: bool,
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            times: Arc::default(),
            trace: std::env::var("TRACE").is_ok_and(|trace| trace == "1"),
        }
    }
}

impl Seen {
    pub(crate) fn note(&self, what: &'static str) {
        self.note_of(what, "");
    }

    /// [`Seen::note`], and of whom.
    pub(crate) fn note_of(&self, what: &'static str, whom: impl Display) {
        if self.trace {
            eprintln!("{:>12.6} {what} {whom}", elapsed().as_secs_f64());
        }
        *self.times.lock().unwrap().entry(what).or_default() += 1;
    }

    pub(crate) fn all(&self) -> BTreeMap<&'static str, u64> {
        self.times.lock().unwrap().clone()
    }
}
