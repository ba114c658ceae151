//! What was sent on one connection and may still be lost: pure, the time is told.
//!
//! TCP says which bytes the other host has taken, not which its program has read. What was taken for [`SETTLED`] counts
//! as read. If a connection breaks otherwise than by an orderly end, the program may have ended with bytes unread: then
//! as many as a socket's buffer holds are sent again as well. A log aggregator says itself what it has.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::logs::record::Id;
use crate::logs::segment::Position;

/// How long the other host must have had bytes.
pub(super) const SETTLED: Duration = Duration::from_secs(5);

/// What the other host may keep of what its program has not read.
pub(super) const UNREAD: u64 = 8 << 20;

/// What is sent within this time is looked at together.
const SLOT: Duration = Duration::from_millis(250);

/// What a slot holds, in bytes.
const FILLED: u64 = 1 << 20;

/// Slots at most: what more there is joins the last one.
const SLOTS: usize = 256;

/// A job's id.
pub(super) type Job = Arc<str>;

/// What was sent and is not known to have been read.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// Whether each sending is looked at for itself.
    fine: bool,
    /// Oldest first.
    open: VecDeque<Slot>,
    /// Those that count as read, as far back as bytes may be unread nonetheless.
    settled: VecDeque<Slot>,
    /// Where on the connection everything before is known to have been read.
    read: u64,
}

#[derive(Debug)]
struct Slot {
    begun: Duration,
    /// Where on the connection it was begun.
    from: u64,
    /// Where on the connection it ends.
    end: u64,
    /// Since when the other host has had it.
    taken: Option<Duration>,
    /// From where to where each job's log was sent.
    moved: BTreeMap<Job, (Option<Position>, Position)>,
}

impl Window {
    /// Of a sink that says what it has, or not.
    pub(super) fn new(acknowledges: bool) -> Self {
        Self {
            fine: acknowledges,
            ..Self::default()
        }
    }

    /// Notes that a job's log was sent between these positions, with which the connection is at `end` bytes.
    pub(super) fn sent(&mut self, now: Duration, job: &Job, from: Option<Position>, to: Position, end: u64) {
        let full = self.open.len() >= SLOTS;
        let fine = self.fine;
        let fits = |slot: &&mut Slot| {
            let open = !fine && now < slot.begun + SLOT && slot.end - slot.from < FILLED;
            slot.taken.is_none() && (full || open)
        };
        let slot = match self.open.back_mut().filter(fits) {
            Some(slot) => slot,
            None => self.open.push_back_mut(Slot {
                begun: now,
                from: end,
                end,
                taken: None,
                moved: BTreeMap::new(),
            }),
        };
        slot.end = end;
        slot.moved.entry(Arc::clone(job)).or_insert((from, to)).1 = to;
    }

    /// Notes how many bytes of the connection the other host has. Gives how far jobs' logs count as read now.
    pub(super) fn taken(&mut self, now: Duration, bytes: u64) -> BTreeMap<Job, Position> {
        for slot in &mut self.open {
            if slot.end <= bytes {
                slot.taken.get_or_insert(now);
            }
        }
        let mut read = BTreeMap::new();
        while let Some(slot) = self
            .open
            .pop_front_if(|slot| slot.taken.is_some_and(|taken| now >= taken + SETTLED))
        {
            let to = slot.moved.iter().map(|(job, (_, to))| (Arc::clone(job), *to));
            read.extend(to);
            self.read = slot.end;
            self.settled.push_back(slot);
        }
        let bound = self.read.saturating_sub(UNREAD);
        while self.settled.pop_front_if(|slot| slot.end < bound).is_some() {}
        read
    }

    /// Notes that the other side has a job's records up to this one. Gives how far its log is known to have been read, if
    /// that is further than before.
    pub(super) fn acknowledged(&mut self, job: &str, id: Id) -> Option<Position> {
        let mut read = None;
        for slot in &mut self.open {
            let has = |(_, to): &(Option<Position>, Position)| {
                let last = Id {
                    run: to.segment.0.run,
                    seq: to.next.saturating_sub(1),
                };
                last <= id
            };
            if slot.moved.get(job).is_some_and(has)
                && let Some((_, to)) = slot.moved.remove(job)
            {
                read = Some(to);
            }
        }
        while let Some(slot) = self.open.pop_front_if(|slot| slot.moved.is_empty()) {
            self.read = slot.end;
        }
        read
    }

    /// Bytes that are not known to have been read, of a connection that is at `end` bytes.
    pub(super) fn unread(&self, end: u64) -> u64 {
        end - self.read
    }

    /// Whether all is known to have been read.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// The connection is over: where each job's log is to be sent from on the next one. `orderly` says that the other
    /// side has closed it, and had read what it had.
    pub(super) fn over(&mut self, orderly: bool) -> BTreeMap<Job, Option<Position>> {
        let settled = self.settled.iter().filter(|_| !orderly);
        let mut again = BTreeMap::new();
        for slot in settled.chain(&self.open) {
            for (job, (from, _)) in &slot.moved {
                again.entry(Arc::clone(job)).or_insert(*from);
            }
        }
        *self = Self::new(self.fine);
        again
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::logs::segment::Segment;

    fn at(next: u64) -> Position {
        Position {
            segment: Segment(Id { run: 1, seq: 1 }),
            offset: next,
            next,
        }
    }

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn what_was_taken_for_a_while_counts_as_read() {
        let (mut window, job) = (Window::default(), Job::from("one-1"));
        window.sent(ms(0), &job, None, at(5), 100);
        window.sent(ms(100), &job, Some(at(5)), at(9), 200);
        window.sent(ms(300), &job, Some(at(9)), at(11), 300);
        assert!(window.taken(ms(400), 250).is_empty());
        assert_eq!(window.taken(ms(5400), 250), [(Arc::clone(&job), at(9))].into());
        assert_eq!(window.unread(300), 100);
        assert_eq!(window.over(true), [(job, Some(at(9)))].into());
        assert!(window.is_empty());
    }

    #[test]
    fn a_broken_connection_sends_what_may_be_unread_again() {
        let (mut window, job) = (Window::default(), Job::from("one-1"));
        let mut end = 0;
        for step in 0..10 {
            end += UNREAD / 2;
            window.sent(ms(step * 1000), &job, Some(at(step)), at(step + 1), end);
            window.taken(ms(step * 1000), end);
        }
        window.taken(ms(60_000), end);
        assert!(window.is_empty());
        assert_eq!(window.over(false), [(job, Some(at(7)))].into());
    }

    #[test]
    fn an_aggregator_says_what_it_has() {
        let (mut window, one, two) = (Window::default(), Job::from("one-1"), Job::from("one-2"));
        window.sent(ms(0), &one, None, at(5), 100);
        window.sent(ms(0), &two, None, at(5), 200);
        window.sent(ms(300), &one, Some(at(5)), at(9), 300);
        assert_eq!(window.acknowledged("one-1", Id { run: 1, seq: 3 }), None);
        assert_eq!(window.acknowledged("one-1", Id { run: 1, seq: 7 }), Some(at(5)));
        assert_eq!(window.unread(300), 300);
        assert_eq!(window.acknowledged("one-2", Id { run: 2, seq: 1 }), Some(at(5)));
        assert_eq!(window.unread(300), 100);
        assert_eq!(window.over(true), [(one, Some(at(5)))].into());
    }

    proptest! {
        /// Whatever the other host says and when, sending goes on from where its program surely has all before.
        #[test]
        fn nothing_unread_is_passed_over(
            steps in proptest::collection::vec((0_u64..900, 0_u64..3, 1_u64..400, 0_u64..1000), 1..200), orderly: bool,
        ) {
            let jobs = [Job::from("a"), Job::from("b"), Job::from("c")];
            let mut window = Window::default();
            let (mut now, mut end, mut taken) = (0, 0, 0);
            let mut next = [1_u64; 3];
            // When the other host had which record.
            let mut sent: Vec<(usize, u64, u64, Option<u64>)> = Vec::new();
            let mut read: BTreeMap<Job, u64> = BTreeMap::new();
            for (pause, job, bytes, acknowledged) in steps {
                now += pause;
                let job = usize::try_from(job).unwrap();
                let from = (next[job] > 1).then(|| at(next[job]));
                end += bytes;
                next[job] += 1;
                sent.push((job, next[job] - 1, end, None));
                window.sent(ms(now), &jobs[job], from, at(next[job]), end);
                taken = (taken + acknowledged).min(end);
                for record in &mut sent {
                    if record.2 <= taken {
                        record.3.get_or_insert(now);
                    }
                }
                for (job, position) in window.taken(ms(now), taken) {
                    read.insert(job, position.next);
                }
                for (job, number, _, had) in &sent {
                    let settled = had.is_some_and(|had| ms(now) >= ms(had) + SETTLED);
                    let counts = read.get(&jobs[*job]).is_some_and(|next| number < next);
                    prop_assert!(settled || !counts);
                }
            }
            let again = window.over(orderly);
            for (index, job) in jobs.iter().enumerate() {
                let known = read.get(job).copied().unwrap_or(1);
                let from = again.get(job).map_or(next[index], |from| from.map_or(1, |from| from.next));
                prop_assert!(from <= known);
            }
        }
    }
}
