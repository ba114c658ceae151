//! Whether anything goes on in a connection that carries many requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The requests of one connection. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Activity(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    under_way: AtomicUsize,
    /// Requests that have begun, and those that have ended.
    turns: AtomicUsize,
}

/// A request that is under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay(Activity);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let counts = &self.0.0;
        counts.turns.fetch_add(1, Ordering::Relaxed);
        counts.under_way.fetch_sub(1, Ordering::Release);
    }
}

impl Activity {
    /// A request begins.
    pub(crate) fn begin(&self) -> UnderWay {
        self.0.under_way.fetch_add(1, Ordering::Relaxed);
        self.0.turns.fetch_add(1, Ordering::Relaxed);
        UnderWay(self.clone())
    }

    /// Resolves once no request has been under way for as long as `limit`, at the latest after twice as long: requests
    /// only count, so that they cost nothing. At the beginning there may be none for as long as `first`.
    pub(crate) async fn ceased(&self, first: Duration, limit: Duration) {
        let (mut look, mut seen) = (first, self.turns());
        loop {
            tokio::time::sleep(look).await;
            let idle = self.0.under_way.load(Ordering::Acquire) == 0;
            let turns = self.turns();
            if idle && turns == seen {
                return;
            }
            (look, seen) = (limit, turns);
        }
    }

    fn turns(&self) -> usize {
        self.0.turns.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    const FIRST: Duration = Duration::from_secs(10);
    const LIMIT: Duration = Duration::from_mins(1);

    #[tokio::test(start_paused = true)]
    async fn what_never_begins_has_ceased_early() {
        let begun = Instant::now();
        Activity::default().ceased(FIRST, LIMIT).await;
        assert!((FIRST..LIMIT).contains(&begun.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_is_under_way_lasts() {
        let (activity, begun) = (Activity::default(), Instant::now());
        let request = activity.begin();
        let ended = tokio::spawn(async move {
            tokio::time::sleep(LIMIT * 10).await;
            drop(request);
        });
        activity.ceased(FIRST, LIMIT).await;
        assert!(ended.is_finished());
        assert!((LIMIT * 11..=LIMIT * 12).contains(&begun.elapsed()));
    }
}
