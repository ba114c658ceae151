//! Who may act: everything that changes jobs, volumes or files passes here, so that a successor finds nothing half done.
//!
//! It is open while this daemon is the one. For a handover it is closed and waits until nobody is inside; then it is left
//! for good, and whoever comes turns to the successor, or opened again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

/// How long the gate stays closed for those inside: whoever comes waits meanwhile.
const CLOSED: Duration = Duration::from_secs(5);

/// What has been inside for so long is likely to stay: it is waited for before the gate is closed.
const LONG: Duration = Duration::from_secs(1);

/// Between looks at who is inside.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    Closed,
    Left,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    inside: BTreeMap<u64, (String, Instant)>,
    next: u64,
}

/// The gate. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate(Arc<watch::Sender<State>>);

/// To act, for as long as it is held.
#[derive(Debug)]
#[must_use]
pub(super) struct Pass {
    gate: Gate,
    number: u64,
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.0.send_modify(|state| {
            state.inside.remove(&self.number);
        });
    }
}

/// The gate is closed and nobody is inside. It opens again unless it is left.
#[derive(Debug)]
#[must_use]
pub(super) struct Closed(Gate);

impl Closed {
    /// Leaves it for good.
    pub(super) fn leave(self) {
        self.0.0.send_modify(|state| state.phase = Phase::Left);
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.reopen();
    }
}

impl Gate {
    /// To do this; none once the gate was left.
    pub(super) async fn enter(&self, what: &str) -> Option<Pass> {
        let mut changes = self.0.subscribe();
        loop {
            let mut entered = None;
            self.0.send_if_modified(|state| {
                if state.phase == Phase::Open {
                    entered = Some(state.add(what));
                }
                entered.is_some()
            });
            if let Some(number) = entered {
                return Some(self.pass(number));
            }
            // The sender is this gate's own.
            let seen = changes
                .wait_for(|state| state.phase != Phase::Closed)
                .await
                .ok()?;
            if seen.phase == Phase::Left {
                return None;
            }
        }
    }

    /// For work that goes on when whoever is inside, and calls this, has gone.
    pub(super) fn beside(&self, what: &str) -> Pass {
        let mut number = 0;
        self.0.send_modify(|state| number = state.add(what));
        self.pass(number)
    }

    fn pass(&self, number: u64) -> Pass {
        Pass {
            gate: self.clone(),
            number,
        }
    }

    /// Closes it once nobody is inside who has been there for long, and waits for the rest. After `patience` it is open
    /// as before, and what goes on inside is given.
    pub(super) async fn close(&self, patience: Duration) -> Result<Closed, Vec<String>> {
        let deadline = Instant::now() + patience;
        loop {
            while self
                .0
                .borrow()
                .inside
                .values()
                .any(|(_, since)| since.elapsed() > LONG)
            {
                if Instant::now() > deadline {
                    return Err(self.inside());
                }
                sleep(LOOK).await;
            }
            self.0.send_modify(|state| state.phase = Phase::Closed);
            let closed = Closed(self.clone());
            let mut changes = self.0.subscribe();
            let empty = changes.wait_for(|state| state.inside.is_empty());
            if timeout_at(Instant::now() + CLOSED, empty).await.is_ok() {
                return Ok(closed);
            }
            if Instant::now() > deadline {
                return Err(self.inside());
            }
        }
    }

    fn reopen(&self) {
        self.0.send_if_modified(|state| {
            let closed = state.phase == Phase::Closed;
            if closed {
                state.phase = Phase::Open;
            }
            closed
        });
    }

    /// What goes on inside.
    fn inside(&self) -> Vec<String> {
        let state = self.0.borrow();
        state.inside.values().map(|(what, _)| what.clone()).collect()
    }

    /// Whether another daemon acts by now.
    pub(super) fn is_left(&self) -> bool {
        self.0.borrow().phase == Phase::Left
    }

    /// Comes back once it was left.
    pub(super) async fn left(&self) {
        // The sender is this gate's own.
        let _ = self
            .0
            .subscribe()
            .wait_for(|state| state.phase == Phase::Left)
            .await;
    }
}

impl State {
    fn add(&mut self, what: &str) -> u64 {
        self.next += 1;
        self.inside.insert(self.next, (what.to_owned(), Instant::now()));
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_closes_when_nobody_is_inside_and_opens_again() {
        let gate = Gate::default();
        let inside = gate.enter("one").await.unwrap();
        let beside = gate.beside("two");
        drop(inside);
        let closing = tokio::spawn({
            let gate = gate.clone();
            async move { gate.close(Duration::from_secs(1)).await }
        });
        sleep(Duration::from_millis(500)).await;
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter("three").await.is_some() }
        });
        sleep(Duration::from_millis(100)).await;
        assert!(!closing.is_finished() && !waiting.is_finished());
        drop(beside);
        let closed = closing.await.unwrap().unwrap();
        assert!(!waiting.is_finished());
        drop(closed);
        assert!(waiting.await.unwrap() && !gate.is_left());
        gate.close(Duration::ZERO).await.unwrap().leave();
        assert!(gate.enter("four").await.is_none() && gate.is_left());
        gate.left().await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_is_named_and_stops_nobody() {
        let gate = Gate::default();
        let _long = gate.enter("a long transfer").await.unwrap();
        sleep(LONG * 2).await;
        let closing = tokio::spawn({
            let gate = gate.clone();
            async move { gate.close(Duration::from_secs(30)).await.unwrap_err() }
        });
        sleep(Duration::from_secs(10)).await;
        let other = timeout_at(Instant::now() + Duration::from_secs(1), gate.enter("short")).await;
        assert!(other.is_ok());
        drop(other);
        assert_eq!(closing.await.unwrap(), ["a long transfer"]);
    }
}
