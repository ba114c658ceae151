//! Decides the next step of a deployment from what is seen. Pure: no clock, no database, no randomness.
//!
//! Each process type goes over in one of two ways. *Beside*: its new jobs come up fully while the old ones run. *In
//! turn*: one old job goes, and once it is down a new one takes its place; when that is up it is the next one's turn.
//! The strategy `all-at-once` lets types go beside, except those that cannot share ([`must_take_turns`]);
//! `one-down-one-up` lets all of them go in turn.
//!
//! First all that go beside come up, then the others take their turns, type after type in the order of their names;
//! an omnipresent type goes wholesale, since its count is per host. Then the new release becomes the current one, and
//! what is left of the old one is scaled to nothing; once that is down the deployment is complete.
//!
//! Until the switch a failure leads back: turns already taken are taken back in the same way, and what went beside
//! goes. After the switch there is nothing to go back to: the new release serves.

use std::collections::BTreeMap;
use std::time::Duration;

use flynn_api::Error;
use flynn_api::controller::{Job, ProcessType, Processes, Release};
use serde::{Deserialize, Serialize};

/// More jobs of the new release than these going down fail the deployment.
pub(crate) const MAX_FAILURES: usize = 5;

/// How an app goes from one release to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Strategy {
    /// The new release up fully, then the old one down; types that cannot share in turn.
    #[default]
    AllAtOnce,
    /// One old job down, then one new job up, and so on.
    OneDownOneUp,
}

impl Strategy {
    const ALL: [Self; 2] = [Self::AllAtOnce, Self::OneDownOneUp];
}

impl std::fmt::Display for Strategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

impl std::str::FromStr for Strategy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|strategy| strategy.to_string() == text)
            .ok_or_else(|| {
                let known: Vec<_> = Self::ALL.iter().map(Self::to_string).collect();
                Error::invalid_field(
                    "strategy",
                    format!("{text:?} is not known here; there are {}", known.join(", ")),
                )
            })
    }
}

/// Where a deployment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Step {
    /// Nothing has been done.
    Begin,
    /// Jobs of the new release are coming up.
    Up,
    /// Jobs of the old release make room.
    Down,
    /// On the way back: jobs of the new release make room.
    BackDown,
    /// On the way back: jobs of the old release are coming up.
    BackUp,
    /// The new release is current; the old one's jobs are ending.
    Drain,
}

/// One of the two releases, as it is seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Side {
    /// What its formation wants, by type; omnipresent types per host.
    pub(crate) wanted: Processes,
    /// The jobs that this makes, by type.
    pub(crate) expected: Processes,
    /// Its jobs that are up, by type.
    pub(crate) up: BTreeMap<String, u32>,
    /// Its jobs that are not down, by type.
    pub(crate) alive: BTreeMap<String, u32>,
}

/// What is seen of a deployment under way.
#[derive(Clone, Debug)]
pub(crate) struct Seen<'a> {
    /// Where it stands.
    pub(crate) step: Step,
    /// For how long.
    pub(crate) step_age: Duration,
    /// For how long at most.
    pub(crate) timeout: Duration,
    /// What the new release shall have in the end, by type.
    pub(crate) target: &'a Processes,
    /// The types that go in turn.
    pub(crate) turns: &'a Turns,
    /// The old release.
    pub(crate) old: &'a Side,
    /// The new one.
    pub(crate) new: &'a Side,
    /// Jobs of the new release that went down since the deployment began, the newest first.
    pub(crate) failures: &'a [Job],
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing now.
    Wait,
    /// Put both formations, and go to this step.
    Scale {
        /// The old release's.
        old: Processes,
        /// The new release's.
        new: Processes,
        /// What is waited for then.
        step: Step,
        /// Why there is no way forward, when this is the first step of the way back.
        failure: Option<String>,
    },
    /// Make the new release current and scale the old one to nothing.
    Switch,
    /// It is done.
    Complete,
    /// It has failed.
    Fail {
        /// Why, and what to do; `None`: as was said when the way back began.
        why: Option<String>,
        /// Put things back as they were before.
        restore: bool,
    },
}

/// How a type takes its turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// All at once, since its count is per host.
    pub(crate) wholesale: bool,
    /// Its old and new jobs cannot share. The scheduler holds the new one back until the old one is down: it sees
    /// that on the host. This controller might not, for the old job may be what it works with (its database).
    pub(crate) exclusive: bool,
}

/// The types that go in turn.
pub(crate) type Turns = BTreeMap<String, Turn>;

/// Whether old and new jobs of a type cannot be there side by side: a volume that outlives its job belongs to one job
/// at a time, and so does a port of the host.
fn must_take_turns(process: &ProcessType) -> bool {
    process.host_network || process.volumes.iter().any(|volume| !volume.delete_on_stop)
}

/// The types that go in turn, of those that run.
pub(crate) fn turns(strategy: Strategy, new: &Release, target: &Processes) -> Turns {
    let turn = |kind: &String| {
        let process = new.processes.get(kind)?;
        let exclusive = must_take_turns(process);
        let wholesale = process.omni;
        (exclusive || strategy == Strategy::OneDownOneUp)
            .then(|| (kind.clone(), Turn { wholesale, exclusive }))
    };
    target.keys().filter_map(turn).collect()
}

/// The strategy that a deployment really follows: where every type has to go in turn, that is what it is called.
pub(crate) fn followed(strategy: Strategy, new: &Release, target: &Processes) -> Strategy {
    let turns = turns(strategy, new, target);
    if !target.is_empty() && target.keys().all(|kind| turns.contains_key(kind)) {
        Strategy::OneDownOneUp
    } else {
        strategy
    }
}

/// The next action.
pub(crate) fn next(seen: &Seen<'_>) -> Action {
    let late = seen.step_age >= seen.timeout;
    let seconds = seen.timeout.as_secs();
    match seen.step {
        Step::Begin => {
            let beside = seen
                .target
                .iter()
                .filter(|(kind, _)| !seen.turns.contains_key(*kind));
            scale(seen.old.wanted.clone(), beside.map(owned).collect(), Step::Up)
        }
        Step::Up if missing(seen.new).is_empty() => take_turn(seen, &seen.old.wanted, &seen.new.wanted)
            .map_or(Action::Switch, |(old, new)| scale(old, new, Step::Down)),
        Step::Down if surplus(seen, seen.old).is_empty() => {
            let new = fill(seen, &seen.old.wanted, &seen.new.wanted);
            scale(seen.old.wanted.clone(), new, Step::Up)
        }
        Step::Up | Step::Down if seen.failures.len() > MAX_FAILURES => {
            back(seen, "the new release did not come up: its jobs keep going down")
        }
        Step::Up if late => {
            let missing = counts(&missing(seen.new));
            let what =
                format!("the new release did not come up: after {seconds} s there are not yet up: {missing}");
            back(seen, &what)
        }
        Step::Down if late => {
            let left = counts(&surplus(seen, seen.old));
            let what =
                format!("after {seconds} s jobs of the old release that make room have not ended: {left}");
            back(seen, &what)
        }
        Step::BackDown if surplus(seen, seen.new).is_empty() => {
            let old = fill(seen, &seen.new.wanted, &seen.old.wanted);
            scale(old, seen.new.wanted.clone(), Step::BackUp)
        }
        Step::BackUp if missing(seen.old).is_empty() => {
            let done = Action::Fail {
                why: None,
                restore: true,
            };
            take_turn(seen, &seen.new.wanted, &seen.old.wanted)
                .map_or(done, |(new, old)| scale(old, new, Step::BackDown))
        }
        // What is wanted is put back; the scheduler goes on from there.
        Step::BackDown | Step::BackUp if late => Action::Fail {
            why: None,
            restore: true,
        },
        Step::Drain if total(&seen.old.alive) == 0 => Action::Complete,
        Step::Drain if late => {
            let n = total(&seen.old.alive);
            let why = format!(
                "the new release is up and current, but after {seconds} s {n} jobs of the old one have not ended: \
                 look at them with `flynn ps` and stop them with `flynn kill`"
            );
            Action::Fail {
                why: Some(why),
                restore: false,
            }
        }
        Step::Up | Step::Down | Step::BackDown | Step::BackUp | Step::Drain => Action::Wait,
    }
}

fn owned((kind, n): (&String, &u32)) -> (String, u32) {
    (kind.clone(), *n)
}

fn scale(old: Processes, new: Processes, step: Step) -> Action {
    Action::Scale {
        old,
        new,
        step,
        failure: None,
    }
}

fn of(counts: &BTreeMap<String, u32>, kind: &str) -> u32 {
    counts.get(kind).copied().unwrap_or(0)
}

fn total(counts: &BTreeMap<String, u32>) -> u32 {
    counts.values().sum()
}

fn counts(counts: &BTreeMap<String, u32>) -> String {
    let counts: Vec<_> = counts.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    counts.join(", ")
}

/// The next turn from one release's counts to the other's: the first type that still has jobs to give makes room.
/// A count of 0 is written out: it says that none is wanted, and not that nothing is known.
fn take_turn(seen: &Seen<'_>, from: &Processes, to: &Processes) -> Option<(Processes, Processes)> {
    let (kind, turn) = seen.turns.iter().find(|(kind, _)| of(from, kind) > 0)?;
    let mut from = from.clone();
    let left = if turn.wholesale { 0 } else { of(&from, kind) - 1 };
    from.insert(kind.clone(), left);
    let mut to = to.clone();
    if turn.exclusive {
        to.insert(kind.clone(), of(seen.target, kind).saturating_sub(left));
    }
    Some((from, to))
}

/// The counts of a release once it has taken all the room that the other one has made.
fn fill(seen: &Seen<'_>, from: &Processes, to: &Processes) -> Processes {
    let mut to = to.clone();
    for kind in seen.turns.keys() {
        to.insert(kind.clone(), of(seen.target, kind).saturating_sub(of(from, kind)));
    }
    to
}

/// Jobs that are not up yet, by type.
fn missing(side: &Side) -> BTreeMap<String, u32> {
    let missing = side
        .expected
        .iter()
        .map(|(kind, wanted)| (kind.clone(), wanted.saturating_sub(of(&side.up, kind))));
    missing.filter(|(_, n)| *n > 0).collect()
}

/// Jobs that are to make room and have not, by type.
fn surplus(seen: &Seen<'_>, side: &Side) -> BTreeMap<String, u32> {
    let surplus = seen.turns.keys().map(|kind| {
        let n = of(&side.alive, kind).saturating_sub(of(&side.expected, kind));
        (kind.clone(), n)
    });
    surplus.filter(|(_, n)| *n > 0).collect()
}

/// There is no way forward.
fn back(seen: &Seen<'_>, what: &str) -> Action {
    let mut why = what.to_owned();
    if let Some(job) = seen.failures.first() {
        let id = if job.id.is_empty() { &job.uuid } else { &job.id };
        why.push_str(&format!("; last went down {} job {id}", job.process_type));
        if let Some(status) = job.exit_status {
            why.push_str(&format!(" with exit status {status}"));
        }
        if let Some(error) = &job.host_error {
            why.push_str(&format!(" ({error})"));
        }
        why.push_str(&format!(". `flynn log -j {id}` shows what it said"));
    }
    why.push_str(". The release before it runs on");
    let untouched = |kind: &String| of(&seen.old.wanted, kind) >= of(seen.target, kind);
    if seen.turns.keys().all(untouched) {
        return Action::Fail {
            why: Some(why),
            restore: true,
        };
    }
    // Room that nobody has taken yet goes back first, by way of the next step.
    Action::Scale {
        old: seen.old.wanted.clone(),
        new: seen.new.wanted.clone(),
        step: Step::BackDown,
        failure: Some(why),
    }
}

/// The counts that the new release starts with: those of the old one, as far as it has such processes.
pub(crate) fn carried_over(old: &Processes, has: impl Fn(&str) -> bool) -> Processes {
    old.iter()
        .filter(|(kind, n)| **n > 0 && has(kind))
        .map(|(kind, n)| (kind.clone(), *n))
        .collect()
}

/// The old release's counts before the deployment took any turn.
pub(crate) fn restored(old: &Processes, target: &Processes) -> Processes {
    let mut restored = old.clone();
    restored.extend(target.iter().map(owned));
    restored
}

#[cfg(test)]
mod tests;
