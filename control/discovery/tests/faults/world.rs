//! What all threads share: the history, what has happened, and what must not have.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use flynn_api::tls::Identity;
use tokio::sync::watch;

use crate::bed::HOSTS;
use crate::history::{History, Value};
use crate::watches::Watcher;

/// Registers that clients write.
const REGISTERS: usize = 5;
/// What has happened is shown from here on.
const SHOWN: usize = 80;

/// How far the run is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Phase {
    /// Clients read and write.
    Load,
    /// Nobody writes any more, but all ask still.
    Settle,
    Over,
}

pub(crate) struct World {
    pub(crate) history: History,
    /// By host.
    pub(crate) watchers: Vec<Watcher>,
    pub(crate) identity: Identity,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) dns: Tally,
    pub(crate) reads: Tally,
    /// From the start of a discoverd, or its waking, to its first answer.
    pub(crate) starts: Tally,
    value: AtomicU64,
    notes: Mutex<Vec<String>>,
    faults: Mutex<Vec<String>>,
}

/// Questions that were answered, and the longest that one took, in microseconds.
#[derive(Default)]
pub(crate) struct Tally {
    answered: AtomicU64,
    longest: AtomicU64,
}

impl Tally {
    pub(crate) fn add(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.answered.fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(took, Ordering::Relaxed);
    }

    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    pub(crate) fn longest(&self) -> Duration {
        Duration::from_micros(self.longest.load(Ordering::Relaxed))
    }
}

impl World {
    pub(crate) fn new(identity: Identity) -> Self {
        Self {
            history: History::new(REGISTERS),
            watchers: (0..HOSTS).map(|_| Watcher::default()).collect(),
            identity,
            phase: watch::Sender::new(Phase::Load),
            dns: Tally::default(),
            reads: Tally::default(),
            starts: Tally::default(),
            value: AtomicU64::new(1),
            notes: Mutex::default(),
            faults: Mutex::default(),
        }
    }

    /// A value that nobody has written yet.
    pub(crate) fn value(&self) -> Value {
        self.value.fetch_add(1, Ordering::Relaxed)
    }

    /// Something has happened.
    pub(crate) fn note(&self, what: &str) {
        let at = self.history.now().as_secs_f64();
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.push(format!("{at:>11.6}  {what}"));
    }

    /// Something has happened that must not.
    pub(crate) fn wrong(&self, what: &str) {
        self.note(&format!("WRONG: {what}"));
        self.faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what.to_owned());
    }

    /// What must not have happened.
    pub(crate) fn all_wrong(&self) -> Vec<String> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What has happened last.
    pub(crate) fn notes(&self) -> String {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes[notes.len().saturating_sub(SHOWN)..].join("\n")
    }
}

/// The name of a register: a service, whose metadata it is.
pub(crate) fn register(number: usize) -> String {
    format!("key-{number}")
}
