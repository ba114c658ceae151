//! This host's view of the registry: the state as far as the log was applied here, and those who watch it.
//!
//! Reading takes a lock for as long as the reader looks and never waits for disk or network. A watcher gets the present
//! state, or, when it resumes, what it has missed ([`History`]), and every later change: both are taken under the same
//! lock, so nothing is lost or told twice. A watcher that does not keep up is cut off, and resumes when it comes back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use flynn_api::discovery::{Event, Position};
use flynn_api::{Error, ErrorCode};
use tokio::sync::{mpsc, watch};

use crate::command::{Command, Outcome};
use crate::history::{Change, History};
use crate::state::State;

/// Changes that may wait for one watcher.
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
    cut_off: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    /// What the state reflects.
    index: u64,
    history: History,
    watchers: HashMap<String, Vec<mpsc::Sender<Arc<Change>>>>,
}

/// A watch: of one service (whose present state is its events), or of all ([`State::everything`] tells of it).
#[derive(Debug)]
pub struct Watch<P> {
    /// What is told first.
    pub begin: Begin<P>,
    /// The index that this brings the watcher to.
    pub index: u64,
    /// What came after. Ends when the watcher was too slow.
    pub changes: mpsc::Receiver<Arc<Change>>,
}

/// How a watch begins.
#[derive(Debug)]
pub enum Begin<P> {
    /// With what is there.
    Anew(P),
    /// With what was missed.
    Missed(Vec<Arc<Change>>),
}

impl Default for View {
    fn default() -> Self {
        Self {
            inner: RwLock::default(),
            applied: watch::Sender::new(0),
            cut_off: AtomicU64::new(0),
        }
    }
}

impl View {
    /// Looks at the state. `look` must be quick.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.inner().state)
    }

    /// [`View::read`], and the index that the state reflects.
    pub fn read_at<T>(&self, look: impl FnOnce(&State) -> T) -> (u64, T) {
        let inner = self.inner();
        (inner.index, look(&inner.state))
    }

    fn inner(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn inner_mut(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
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
        let outcome = self.apply_all([(index, Some(command))]).pop();
        outcome.unwrap_or(Outcome::Done { index })
    }

    /// Applies what came of the entries at these indices (without a command: nothing here) and tells the watchers. Who
    /// waits for an index is woken once for all of them.
    pub fn apply_all<'c>(
        &self,
        entries: impl IntoIterator<Item = (u64, Option<&'c Command>)>,
    ) -> Vec<Outcome> {
        let (outcomes, index) = {
            let mut inner = self.inner_mut();
            let apply = |(index, command): (u64, Option<&Command>)| {
                inner.index = index;
                let Some(command) = command else {
                    return Outcome::Done { index };
                };
                let (outcome, events) = inner.state.apply(index, command);
                let cut_off = inner.tell(index, events);
                self.cut_off.fetch_add(cut_off, Ordering::Relaxed);
                outcome
            };
            let outcomes: Vec<Outcome> = entries.into_iter().map(apply).collect();
            (outcomes, inner.index)
        };
        self.applied.send_replace(index);
        outcomes
    }

    /// Takes over a snapshot. Watchers are cut off, for what happened in between is not known here.
    pub fn replace(&self, index: u64, state: State) {
        *self.inner_mut() = Inner {
            state,
            index,
            history: History::from(index),
            watchers: HashMap::new(),
        };
        self.applied.send_replace(index);
    }

    /// Cuts all watchers off.
    pub fn disconnect(&self) {
        self.inner_mut().watchers.clear();
    }

    /// How many watches there are, and how many changes wait for the slowest of them.
    pub fn watches(&self) -> (usize, usize) {
        let inner = self.inner();
        let there = inner
            .watchers
            .values()
            .flatten()
            .filter(|watcher| !watcher.is_closed());
        there.fold((0, 0), |(count, most), watcher| {
            (count + 1, most.max(watcher.max_capacity() - watcher.capacity()))
        })
    }

    /// How many watchers were cut off because they were too slow.
    pub fn cut_off(&self) -> &AtomicU64 {
        &self.cut_off
    }

    /// Watches a service, which need not be there yet: from now on, or from where an earlier watch has come to. Fails when
    /// that is too long ago ([`ErrorCode::Gone`]), or when there are too many watchers.
    pub fn watch(&self, service: &str, since: Option<Position>) -> Result<Watch<Vec<Event>>, Error> {
        self.enter(service, QUEUE, since, |state| state.present(service))
    }

    /// [`View::watch`] of all services.
    pub fn watch_all(&self, since: Option<Position>) -> Result<Watch<State>, Error> {
        self.enter(ALL, QUEUE_OF_ALL, since, State::clone)
    }

    fn enter<P>(
        &self,
        service: &str,
        queue: usize,
        since: Option<Position>,
        present: impl FnOnce(&State) -> P,
    ) -> Result<Watch<P>, Error> {
        let (sender, changes) = mpsc::channel(queue);
        let mut inner = self.inner_mut();
        let begin = match since {
            None => Begin::Anew(present(&inner.state)),
            Some(since) => {
                let missed = inner.history.after(since).ok_or_else(|| gone(since))?;
                let service = (service != ALL).then_some(service);
                Begin::Missed(
                    missed
                        .filter(|change| change.concerns(service))
                        .cloned()
                        .collect(),
                )
            }
        };
        inner.enter(service, sender)?;
        Ok(Watch {
            begin,
            index: inner.index,
            changes,
        })
    }
}

/// A watch cannot go on from there.
pub fn gone(since: Position) -> Error {
    let message = format!(
        "the changes since {since} are not all known here any more: begin anew, without since and Last-Event-ID"
    );
    Error::new(ErrorCode::Gone, message)
}

impl Inner {
    fn enter(&mut self, service: &str, sender: mpsc::Sender<Arc<Change>>) -> Result<(), Error> {
        if self.watchers.values().map(Vec::len).sum::<usize>() >= MAX_WATCHERS {
            self.watchers.retain(|_, watchers| {
                watchers.retain(|watcher| !watcher.is_closed());
                !watchers.is_empty()
            });
            if self.watchers.values().map(Vec::len).sum::<usize>() >= MAX_WATCHERS {
                let message = "there are too many watchers: close some";
                return Err(Error::new(ErrorCode::LimitExceeded, message));
            }
        }
        let watchers = self.watchers.entry(service.to_owned()).or_default();
        watchers.retain(|watcher| !watcher.is_closed());
        watchers.push(sender);
        Ok(())
    }

    /// Gives how many were cut off.
    fn tell(&mut self, index: u64, events: Vec<Event>) -> u64 {
        let mut cut_off = 0;
        for change in self.history.push(index, events) {
            let service = change.event.service.as_str();
            for (key, of) in [(service, Some(service)), (ALL, None)] {
                let Some(watchers) = self.watchers.get_mut(key).filter(|_| change.concerns(of)) else {
                    continue;
                };
                watchers.retain(|watcher| {
                    let told = watcher.try_send(Arc::clone(change));
                    cut_off += u64::from(matches!(told, Err(mpsc::error::TrySendError::Full(_))));
                    told.is_ok()
                });
                if watchers.is_empty() {
                    self.watchers.remove(key);
                }
            }
        }
        cut_off
    }
}
