//! Which instances still send heartbeats.
//!
//! Kept by the Raft leader in memory alone: a heartbeat costs no log entry. A new leader knows nothing of the past, so it
//! gives everybody a full lease before it takes anybody out; so does one that finds it was stopped for a while, for the
//! heartbeats of that time may wait in its sockets. No clock of its own: the caller says what time it is.

use std::collections::HashMap;

use crate::command::Registration;

/// When a leader's own rounds are this far apart, it was stopped (milliseconds).
const PAUSE: u64 = 3_000;

/// Heartbeats under one leadership.
#[derive(Debug)]
pub(crate) struct Liveness {
    ttl: u64,
    term: u64,
    since: u64,
    round: u64,
    last: HashMap<String, HashMap<String, u64>>,
}

impl Liveness {
    /// With leases of `ttl` milliseconds.
    pub(crate) fn new(ttl: u64) -> Self {
        Self {
            ttl,
            term: 0,
            since: 0,
            round: 0,
            last: HashMap::new(),
        }
    }

    fn lead(&mut self, term: u64, now: u64) {
        if term != self.term {
            self.term = term;
            self.begin(now);
        }
    }

    fn begin(&mut self, now: u64) {
        (self.since, self.round) = (now, now);
        self.last.clear();
    }

    /// An instance of `service` was heard of while leading in `term`.
    pub(crate) fn heard(&mut self, term: u64, now: u64, service: &str, id: &str) {
        self.lead(term, now);
        match self.last.get_mut(service).and_then(|of| of.get_mut(id)) {
            Some(last) => *last = now,
            None => {
                self.last
                    .entry(service.to_owned())
                    .or_default()
                    .insert(id.to_owned(), now);
            }
        }
    }

    /// Those of `registered` whose lease has run out; what is kept of others than `registered` is forgotten.
    pub(crate) fn expired(
        &mut self,
        term: u64,
        now: u64,
        registered: impl Iterator<Item = Registration>,
    ) -> Vec<Registration> {
        self.lead(term, now);
        if now.saturating_sub(self.round) > PAUSE {
            self.begin(now);
        }
        self.round = now;
        let mut before = std::mem::take(&mut self.last);
        let mut expired = Vec::new();
        for registration in registered {
            let last = before
                .get_mut(&registration.service)
                .and_then(|of| of.remove(&registration.id));
            // Nobody is older than the leadership.
            let heard = last.unwrap_or(self.since);
            if now.saturating_sub(heard) > self.ttl {
                expired.push(registration);
            } else if let Some(last) = last {
                self.last
                    .entry(registration.service)
                    .or_default()
                    .insert(registration.id, last);
            }
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> std::iter::Once<Registration> {
        std::iter::once(Registration {
            service: "web".into(),
            id: "a".into(),
            index: 7,
        })
    }

    #[test]
    fn the_silent_expire_after_their_lease() {
        let mut liveness = Liveness::new(10_000);
        liveness.heard(1, 0, "web", "a");
        for now in (1_000..=10_000).step_by(1_000) {
            assert_eq!(liveness.expired(1, now, one()), []);
        }
        assert_eq!(liveness.expired(1, 11_000, one()).len(), 1);
    }

    #[test]
    fn heartbeats_keep_alive() {
        let mut liveness = Liveness::new(10_000);
        for now in (0..100_000).step_by(1_000) {
            if now % 9_000 == 0 {
                liveness.heard(1, now, "web", "a");
            }
            assert_eq!(liveness.expired(1, now, one()), []);
        }
    }

    #[test]
    fn a_new_leader_waits_a_full_lease() {
        let mut liveness = Liveness::new(10_000);
        liveness.heard(1, 0, "web", "a");
        assert_eq!(liveness.expired(2, 50_000, one()), []);
        for now in (51_000..=60_000).step_by(1_000) {
            assert_eq!(liveness.expired(2, now, one()), [], "{now}");
        }
        assert_eq!(liveness.expired(2, 61_000, one()).len(), 1);
    }

    #[test]
    fn a_leader_that_was_stopped_expires_nobody_for_a_lease() {
        let mut liveness = Liveness::new(10_000);
        liveness.heard(1, 0, "web", "a");
        assert_eq!(liveness.expired(1, 1_000, one()), []);
        assert_eq!(liveness.expired(1, 60_000, one()), [], "stopped for 59 s");
        assert_eq!(liveness.expired(1, 61_000, one()), []);
    }
}
