//! This host's view of the registry: the state as far as the log was applied here, and those who watch it.
//!
//! Reading takes a lock for as long as the reader looks and never waits for disk or network. A watcher gets the present
//! state and every later change: both are taken under the same lock, so nothing is lost or told twice. A watcher that
//! does not keep up is cut off, and begins anew when it comes back.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use flynn_api::discovery::{Event, EventKind};
use tokio::sync::{mpsc, watch};

use crate::command::{Command, Outcome};
use crate::state::State;

/// Events that may wait for one watcher.
const QUEUE: usize = 1024;
/// Watchers that there may be.
const MAX_WATCHERS: usize = 20_000;

/// The view.
#[derive(Debug)]
pub struct View {
    inner: RwLock<Inner>,
    applied: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    watchers: HashMap<String, Vec<mpsc::Sender<Arc<Event>>>>,
}

/// A watch of one service.
#[derive(Debug)]
pub struct Watch {
    /// The state when the watch began, ending with `current`.
    pub present: Vec<Event>,
    /// What came after. Ends when the watcher was too slow.
    pub changes: mpsc::Receiver<Arc<Event>>,
}

impl Default for View {
    fn default() -> Self {
        Self {
            inner: RwLock::default(),
            applied: watch::Sender::new(0),
        }
    }
}

impl View {
    /// Looks at the state. `look` must be quick.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.inner.read().unwrap_or_else(PoisonError::into_inner).state)
    }

    /// The index of the last entry that was applied.
    pub fn applied(&self) -> u64 {
        *self.applied.borrow()
    }

    /// Waits until the entry at `index` is applied.
    pub async fn reached(&self, index: u64) {
        // The sender lives as long as `self`.
        let _ = self
            .applied
            .subscribe()
            .wait_for(|applied| *applied >= index)
            .await;
    }

    /// Applies the command at `index` and tells the watchers.
    pub fn apply(&self, index: u64, command: &Command) -> Outcome {
        let outcome = {
            let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
            let (outcome, events) = inner.state.apply(index, command);
            for event in events {
                inner.tell(event);
            }
            outcome
        };
        self.advance(index);
        outcome
    }

    /// The entry at `index` was applied and changed nothing here.
    pub fn advance(&self, index: u64) {
        self.applied.send_replace(index);
    }

    /// Takes over a snapshot. Watchers are cut off, for what happened in between is not known.
    pub fn replace(&self, index: u64, state: State) {
        {
            let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
            *inner = Inner {
                state,
                ..Inner::default()
            };
        }
        self.advance(index);
    }

    /// Cuts all watchers off.
    pub fn disconnect(&self) {
        self.inner
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .watchers
            .clear();
    }

    /// Watches a service, which need not be there yet. `None` when there are too many watchers.
    pub fn watch(&self, service: &str) -> Option<Watch> {
        let (sender, changes) = mpsc::channel(QUEUE);
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if inner.watchers.values().map(Vec::len).sum::<usize>() >= MAX_WATCHERS {
            inner.watchers.retain(|_, watchers| {
                watchers.retain(|watcher| !watcher.is_closed());
                !watchers.is_empty()
            });
            if inner.watchers.values().map(Vec::len).sum::<usize>() >= MAX_WATCHERS {
                return None;
            }
        }
        let watchers = inner.watchers.entry(service.to_owned()).or_default();
        watchers.retain(|watcher| !watcher.is_closed());
        watchers.push(sender);
        let mut present = inner.state.present(service);
        present.push(Event {
            service: service.to_owned(),
            kind: EventKind::Current,
            instance: None,
            service_meta: None,
            index: self.applied(),
        });
        Some(Watch { present, changes })
    }
}

impl Inner {
    fn tell(&mut self, event: Event) {
        let Some(watchers) = self.watchers.get_mut(&event.service) else {
            return;
        };
        let event = Arc::new(event);
        watchers.retain(|watcher| watcher.try_send(Arc::clone(&event)).is_ok());
        if watchers.is_empty() {
            self.watchers.remove(&event.service);
        }
    }
}
