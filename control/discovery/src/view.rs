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
/// The same for one who watches all services.
const QUEUE_OF_ALL: usize = 16 << 10;
/// Under what those are kept; no service has that name.
const ALL: &str = "";
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

/// A watch of all services.
#[derive(Debug)]
pub struct WatchOfAll {
    /// The state when the watch began: [`State::everything`] tells of it.
    pub present: State,
    /// Its index.
    pub index: u64,
    /// What came after, but for metadata. Ends when the watcher was too slow.
    pub changes: mpsc::Receiver<Arc<Event>>,
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
        inner.enter(service, sender)?;
        let mut present = inner.state.present(service);
        present.push(Event::new(service, EventKind::Current, self.applied()));
        Some(Watch { present, changes })
    }

    /// Watches all services. `None` when there are too many watchers.
    pub fn watch_all(&self) -> Option<WatchOfAll> {
        let (sender, changes) = mpsc::channel(QUEUE_OF_ALL);
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.enter(ALL, sender)?;
        Some(WatchOfAll {
            present: inner.state.clone(),
            index: self.applied(),
            changes,
        })
    }
}

impl Inner {
    fn enter(&mut self, service: &str, sender: mpsc::Sender<Arc<Event>>) -> Option<()> {
        if self.watchers.values().map(Vec::len).sum::<usize>() >= MAX_WATCHERS {
            self.watchers.retain(|_, watchers| {
                watchers.retain(|watcher| !watcher.is_closed());
                !watchers.is_empty()
            });
            if self.watchers.values().map(Vec::len).sum::<usize>() >= MAX_WATCHERS {
                return None;
            }
        }
        let watchers = self.watchers.entry(service.to_owned()).or_default();
        watchers.retain(|watcher| !watcher.is_closed());
        watchers.push(sender);
        Some(())
    }

    fn tell(&mut self, event: Event) {
        let event = Arc::new(event);
        // Who watches one service knows nothing of numbers; who watches all is told no metadata, for it may be secret.
        let of_one = !matches!(event.kind, EventKind::Service | EventKind::ServiceGone);
        let of_all = event.kind != EventKind::ServiceMeta;
        for (service, wanted) in [(event.service.as_str(), of_one), (ALL, of_all)] {
            let Some(watchers) = self.watchers.get_mut(service).filter(|_| wanted) else {
                continue;
            };
            watchers.retain(|watcher| watcher.try_send(Arc::clone(&event)).is_ok());
            if watchers.is_empty() {
                self.watchers.remove(service);
            }
        }
    }
}
