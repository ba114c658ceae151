//! What must hold, by name. Told of every entry that a member applies and of every answer that a client gets; a breach
//! ends the run.
//!
//! - **agreement**: what one member applies at an index, all do; and what was applied never changes.
//! - **determinism**: at each index the members' states are the one that the log up to there makes of nothing.
//! - **leader completeness**: no two members lead by the same vote, and a new leader holds all that was applied before.
//!   (By openraft's rule votes are ordered by term, then by member: a term may have two leaders, of whom only the later
//!   one can still commit.)
//! - **log matching**: where two logs have the same entry, all before it is the same.
//! - **durability**: an acknowledged write is in the log at the index and with the outcome that were told.
//! - **no echo**: a command is in the log once, if it was acknowledged; never, if it was refused by all; once or not at
//!   all, if nobody knows.
//! - **real time**: a write or read that began after another had ended has a greater index, or for reads the same.
//! - **quorums meet**: any majority before a change of the voters meets any majority after it, and the new voters are
//!   no fewer than the majority of the old.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use flynn_api::discovery::Consistency;
use flynn_discovery::command::{Command, Outcome};
use flynn_discovery::raft::{Entry, LogId, Vote};
use flynn_discovery::state::State;
use flynn_discovery::voters::{MAX_VOTERS, majority};
use openraft::EntryPayload;

use crate::seen::Seen;

struct Line {
    entry: Entry,
    outcome: Option<Outcome>,
    /// After it.
    state: State,
    voters: Vec<BTreeSet<u64>>,
}

/// The log as it was applied.
pub(crate) struct Chronicle {
    lines: Vec<Line>,
    leaders: BTreeMap<(u64, u64), usize>,
    /// The greatest index that an answer named: whatever begins later must not be older.
    known: u64,
    /// Who said so.
    source: String,
    /// Commands that clients gave to the cluster and gave up on.
    unknown: Vec<Command>,
    /// Commands that all members who were asked refused.
    never: Vec<Command>,
    acknowledged: Vec<Command>,
    seen: Seen,
}

/// The chronicle as all hold it.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<Chronicle>>);

impl Shared {
    pub(crate) fn new(seen: Seen) -> Self {
        Self(Arc::new(Mutex::new(Chronicle {
            lines: Vec::new(),
            leaders: BTreeMap::new(),
            known: 0,
            source: String::new(),
            unknown: Vec::new(),
            never: Vec::new(),
            acknowledged: Vec::new(),
            seen,
        })))
    }

    pub(crate) fn write(&self) -> MutexGuard<'_, Chronicle> {
        self.0.lock().unwrap()
    }
}

impl Chronicle {
    /// How many entries were applied by anybody.
    pub(crate) fn length(&self) -> usize {
        self.lines.len()
    }

    fn line(&self, index: u64) -> &Line {
        let line = usize::try_from(index)
            .ok()
            .and_then(|index| self.lines.get(index));
        line.unwrap_or_else(|| panic!("durability: {index} was never applied"))
    }

    /// A member applies an entry.
    pub(crate) fn applied(&mut self, member: u64, entry: &Entry) {
        let index = entry.log_id.index;
        if index < self.lines.len() as u64 {
            let line = self.line(index);
            assert!(
                line.entry == *entry,
                "agreement: {member} applies {} where {} was applied",
                entry.log_id,
                line.entry.log_id
            );
            return;
        }
        assert!(
            index == self.lines.len() as u64,
            "agreement: {member} applies {index} before {}",
            self.lines.len()
        );
        let before = self.lines.last();
        let mut state = before.map(|line| line.state.clone()).unwrap_or_default();
        let mut voters = before.map(|line| line.voters.clone()).unwrap_or_default();
        let mut outcome = None;
        match &entry.payload {
            EntryPayload::Normal(command) => outcome = Some(state.apply(index, command).0),
            EntryPayload::Membership(membership) => {
                let next = membership.get_joint_config().clone();
                meet(&voters, &next);
                if voters.last() != next.last() {
                    self.seen.note_of("other voters", format_args!("{next:?}"));
                }
                voters = next;
            }
            EntryPayload::Blank => {}
        }
        self.lines.push(Line {
            entry: entry.clone(),
            outcome,
            state,
            voters,
        });
    }

    /// A member's state reflects `index`.
    pub(crate) fn state(&self, member: u64, index: u64, state: &State) {
        assert!(
            self.line(index).state == *state,
            "determinism: at {index} {member} has another state"
        );
    }

    /// Whether it is known who leads by `vote`.
    pub(crate) fn knows(&self, vote: &Vote) -> bool {
        self.leaders.contains_key(&key(vote))
    }

    /// `member` leads by `vote`, since a moment when there were `before` lines already; these ids are in its log, which
    /// goes up to `last`, and what was before them is in its snapshot.
    pub(crate) fn leads(
        &mut self,
        member: u64,
        vote: &Vote,
        before: usize,
        last: Option<LogId>,
        log: &[LogId],
    ) {
        let (term, node) = key(vote);
        assert!(
            member == node,
            "leader completeness: {member} leads by the vote of {node}"
        );
        if self.leaders.keys().any(|(other, _)| *other == term) {
            self.seen.note("two leaders in a term, one after the other");
        }
        self.leaders.insert((term, node), before);
        self.seen
            .note_of("a leader was elected", format_args!("{member} {term}"));
        let length = last.map_or(0, |last| last.index + 1);
        assert!(
            length >= before as u64,
            "leader completeness: {member} leads with a log of {length} entries, {before} were applied"
        );
        for id in log.iter().filter(|id| id.index < before as u64) {
            let line = self.line(id.index);
            assert!(
                line.entry.log_id == *id,
                "leader completeness: {member} leads with {id} where {} was applied",
                line.entry.log_id
            );
        }
    }

    /// Two members' logs.
    pub(crate) fn match_logs(one: &[LogId], other: &[LogId]) {
        let other: BTreeMap<u64, &LogId> = other.iter().map(|id| (id.index, id)).collect();
        let both = one.iter().filter_map(|id| Some((id, *other.get(&id.index)?)));
        let mut same = false;
        for (id, in_other) in both.rev() {
            assert!(
                !same || id == in_other,
                "log matching: {id} and {in_other}, though what comes later is the same"
            );
            same |= id == in_other;
        }
    }

    fn learn(&mut self, index: u64, source: impl FnOnce() -> String) {
        if index > self.known {
            (self.known, self.source) = (index, source());
        }
    }

    /// What an answer must not be older than, for a call that begins now.
    pub(crate) fn known(&self) -> u64 {
        self.known
    }

    /// A client was told what came of its command. It had begun when `known` was known.
    pub(crate) fn acknowledged(&mut self, member: u64, command: Command, known: u64, outcome: &Outcome) {
        let logged =
            |line: &Line| matches!(&line.entry.payload, EntryPayload::Normal(logged) if *logged == command);
        let Some(at) = self.lines.iter().rposition(logged) else {
            panic!("durability: {command} was acknowledged, and applied by nobody");
        };
        assert!(
            self.lines[at].outcome.as_ref() == Some(outcome),
            "durability: {command} at {at} has another outcome than was told"
        );
        let index = at as u64;
        assert!(
            index > known,
            "real time: {command} is at {index}, {known} was known before"
        );
        self.learn(index, || format!("a write that {member} took"));
        self.seen.note("a write was acknowledged");
        self.acknowledged.push(command);
    }

    /// A client does not know what became of its command.
    pub(crate) fn unknown(&mut self, command: Command) {
        self.seen.note("a write's outcome is not known");
        self.unknown.push(command);
    }

    /// All who were asked said that they did not take it.
    pub(crate) fn never(&mut self, command: Command) {
        self.seen.note("a write was taken by nobody");
        self.never.push(command);
    }

    /// A client has read the state at `index`.
    pub(crate) fn read(&mut self, member: u64, strength: Consistency, known: u64, index: u64, state: &State) {
        assert!(
            index >= known,
            "real time: a {strength:?} read at {member} saw {index}, {known} was known before it began, by {}",
            self.source
        );
        self.state(0, index, state);
        self.learn(index, || format!("a {strength:?} read at {member}"));
        self.seen.note("a read was answered");
    }

    /// All is over: every command is there as often as it may be.
    pub(crate) fn close(&self) {
        let count = |command: &Command| {
            let entries = self.lines.iter().map(|line| &line.entry.payload);
            entries
                .filter(|payload| matches!(payload, EntryPayload::Normal(logged) if logged == command))
                .count()
        };
        for command in &self.acknowledged {
            assert_eq!(count(command), 1, "no echo: {command} was acknowledged once");
        }
        for command in &self.unknown {
            match count(command) {
                0 => self.seen.note("an unknown write was not done"),
                1 => self.seen.note("an unknown write was done"),
                times => panic!("no echo: {command} is there {times} times"),
            }
        }
        for command in &self.never {
            assert_eq!(count(command), 0, "no echo: nobody took {command}");
        }
    }
}

fn key(vote: &Vote) -> (u64, u64) {
    (vote.leader_id.term, vote.leader_id.node_id)
}

/// Every majority before meets every majority after.
fn meet(before: &[BTreeSet<u64>], after: &[BTreeSet<u64>]) {
    let (Some(old), Some(new)) = (before.last(), after.last()) else {
        return;
    };
    assert!(
        new.len() >= majority(old.len()) && new.len() <= MAX_VOTERS,
        "quorums meet: {new:?} after {old:?}"
    );
    let all: Vec<u64> = before
        .iter()
        .chain(after)
        .flatten()
        .copied()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let agrees = |configs: &[BTreeSet<u64>], set: u32| {
        configs.iter().all(|config| {
            let there = (0..all.len()).filter(|at| set & (1 << at) != 0 && config.contains(&all[*at]));
            there.count() >= majority(config.len())
        })
    };
    let everybody = (1_u32 << all.len()) - 1;
    for set in 0..=everybody {
        // Who is not in a majority before must not be one after.
        assert!(
            !(agrees(before, set) && agrees(after, everybody & !set)),
            "quorums meet: {after:?} may go on without {before:?}"
        );
    }
}
