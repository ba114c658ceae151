//! How often a member is told something: one that votes at once and always, one that learns in its turn.
//!
//! In a cluster of a hundred hosts nearly all members are learners, and a leader that told each of them everything at once
//! would do little else. They call no elections and nobody waits for them, so they can hear a little later, and need not
//! hear twice what they know.

use std::time::Duration;

use openraft::Instant;

use super::{LogId, Vote};

/// Learners get what is new one after the other: so many learners times this passes between two appends to one of them.
/// What comes first, and alone, goes at once.
const TURN: Duration = Duration::from_micros(500);

/// The most that passes.
const MAX_TURN: Duration = Duration::from_millis(100);

/// A heartbeat that says to a learner what it knows is left out for so long. It is less than after what a voter would call
/// an election, so that it does no harm to one that votes since this moment either.
const LEFT_OUT: Duration = Duration::from_millis(350);

/// What an append without entries says: whose it is, what the member's log is to hold, and what is committed.
pub type Heartbeat = (Vote, Option<LogId>, Option<LogId>);

/// When an append goes.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn<I> {
    /// At once, without a look at the clock: a timer would end with a whole millisecond only.
    Now,
    /// At this moment, which is to come.
    Later(I),
    /// Not at all: the member has just heard the same.
    LeftOut,
}

/// When one member is told something.
#[derive(Debug)]
pub struct Pace<I> {
    /// Not before, if it is a learner.
    next: Option<I>,
    /// The heartbeat that it has taken, if that was the last that it was told, and when that began.
    taken: Option<(I, Heartbeat)>,
}

impl<I> Default for Pace<I> {
    fn default() -> Self {
        Self {
            next: None,
            taken: None,
        }
    }
}

impl<I: Instant> Pace<I> {
    /// When an append goes to a member that is one of so many learners, or votes (0), as a voter always now.
    pub fn plan(&mut self, now: I, learners: usize, heartbeat: Option<&Heartbeat>) -> Turn<I> {
        if learners == 0 {
            return Turn::Now;
        }
        let is_known = |(at, taken): &(I, Heartbeat)| now - *at < LEFT_OUT && heartbeat == Some(taken);
        if self.taken.as_ref().is_some_and(is_known) {
            return Turn::LeftOut;
        }
        let turn = TURN
            .saturating_mul(u32::try_from(learners).unwrap_or(u32::MAX))
            .min(MAX_TURN);
        let later = self.next.filter(|next| *next > now);
        self.next = Some(later.unwrap_or(now) + turn);
        later.map_or(Turn::Now, Turn::Later)
    }

    /// What was sent at `began` was taken, if it was this heartbeat; not, or it was something else.
    pub fn sent(&mut self, began: I, taken: Option<Heartbeat>) {
        self.taken = taken.map(|heartbeat| (began, heartbeat));
    }
}

#[cfg(test)]
mod tests {
    use openraft::type_config::TypeConfigExt as _;
    use openraft::type_config::alias::InstantOf;

    use super::*;
    use crate::raft::TypeConfig;

    fn heartbeat(committed: u64) -> Heartbeat {
        let id = LogId::new(openraft::vote::RaftLeaderId::new(1, 1), committed);
        (Vote::new_committed(1, 1), None, Some(id))
    }

    type Moment = InstantOf<TypeConfig>;

    fn pace() -> (Pace<Moment>, Moment) {
        (Pace::default(), TypeConfig::now())
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn who_votes_is_told_at_once_and_always() {
        let (mut pace, now) = pace();
        for _ in 0..3 {
            assert_eq!(pace.plan(now, 0, Some(&heartbeat(1))), Turn::Now);
            pace.sent(now, Some(heartbeat(1)));
        }
    }

    #[test]
    fn a_learner_is_not_told_again_what_it_has_just_heard() {
        let (mut pace, now) = pace();
        assert_eq!(pace.plan(now, 10, Some(&heartbeat(1))), Turn::Now);
        pace.sent(now, Some(heartbeat(1)));
        for (after, turn) in [(130, Turn::LeftOut), (349, Turn::LeftOut), (350, Turn::Now)] {
            assert_eq!(pace.plan(now + after * MS, 10, Some(&heartbeat(1))), turn);
        }
    }

    #[test]
    fn a_learner_is_told_what_is_new_and_what_it_did_not_take() {
        let (mut pace, now) = pace();
        pace.sent(now, Some(heartbeat(1)));
        assert_eq!(pace.plan(now + 10 * MS, 10, Some(&heartbeat(2))), Turn::Now);
        assert_eq!(pace.plan(now + 20 * MS, 10, None), Turn::Now);
        pace.sent(now + 30 * MS, None);
        assert_eq!(pace.plan(now + 40 * MS, 10, Some(&heartbeat(1))), Turn::Now);
        // It votes now.
        pace.sent(now + 50 * MS, Some(heartbeat(1)));
        assert_eq!(pace.plan(now + 51 * MS, 0, Some(&heartbeat(1))), Turn::Now);
    }

    #[test]
    fn learners_take_turns() {
        let (mut pace, now) = pace();
        let later = |after: u32| Turn::Later(now + after * MS);
        for turn in [Turn::Now, later(50), later(100)] {
            assert_eq!(pace.plan(now, 100, None), turn);
        }
        // Who was not told anything for a while is told at once.
        let then = now + 200 * MS;
        assert_eq!(pace.plan(then, 100, None), Turn::Now);
        let planned_for_a_hundred = later(250);
        assert_eq!(pace.plan(then, 100_000, None), planned_for_a_hundred);
        let a_tenth_of_a_second_at_most = later(350);
        assert_eq!(pace.plan(then, 100_000, None), a_tenth_of_a_second_at_most);
    }
}
