//! Decides the next step of a deployment from what is seen. Pure: no clock, no database, no randomness.
//!
//! `all-at-once`: the new release is scaled up fully beside the old one; once all of its jobs are up it becomes the
//! current release and the old one is scaled to nothing; once the old jobs are gone the deployment is complete.
//! Until the switch a failure restores the old formation. After it there is nothing to go back to: the new release
//! serves.

use std::collections::BTreeMap;
use std::time::Duration;

use flynn_api::Error;
use flynn_api::controller::{Job, Processes, Release};
use serde::{Deserialize, Serialize};

/// More jobs of the new release than these going down fail the deployment.
pub(crate) const MAX_FAILURES: usize = 5;

/// How an app goes from one release to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Strategy {
    /// The new release up fully, then the old one down.
    #[default]
    AllAtOnce,
}

impl Strategy {
    const ALL: [Self; 1] = [Self::AllAtOnce];
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
                    format!("{text:?} is not known here; there is {}", known.join(", ")),
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
    /// The new release is coming up.
    Up,
    /// The new release is current; the old one's jobs are ending.
    Drain,
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
    /// Jobs of the new release that are to be up, by type.
    pub(crate) expected: &'a Processes,
    /// Jobs of the new release that are up, by type.
    pub(crate) up: &'a BTreeMap<String, u32>,
    /// Jobs of the new release that went down since the deployment began, the newest first.
    pub(crate) failures: &'a [Job],
    /// Jobs of the old release that are not down.
    pub(crate) old_jobs: u32,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing now.
    Wait,
    /// Put the new release's formation.
    ScaleUp,
    /// Make the new release current and scale the old one to nothing.
    Switch,
    /// It is done.
    Complete,
    /// It has failed.
    Fail {
        /// Why, and what to do.
        why: String,
        /// Put things back as they were before.
        restore: bool,
    },
}

/// The next action.
pub(crate) fn next(strategy: Strategy, seen: &Seen<'_>) -> Action {
    let Strategy::AllAtOnce = strategy;
    match seen.step {
        Step::Begin => Action::ScaleUp,
        Step::Up if missing(seen).is_empty() => Action::Switch,
        Step::Up if seen.failures.len() > MAX_FAILURES => fail(seen, "its jobs keep going down"),
        Step::Up if seen.step_age >= seen.timeout => {
            let missing: Vec<_> = missing(seen)
                .iter()
                .map(|(kind, n)| format!("{kind} {n}"))
                .collect();
            let seconds = seen.timeout.as_secs();
            fail(
                seen,
                &format!("after {seconds} s there are not yet up: {}", missing.join(", ")),
            )
        }
        Step::Drain if seen.old_jobs == 0 => Action::Complete,
        Step::Drain if seen.step_age >= seen.timeout => {
            let (n, seconds) = (seen.old_jobs, seen.timeout.as_secs());
            let why = format!(
                "the new release is up and current, but after {seconds} s {n} jobs of the old one have not ended: \
                 look at them with `flynn ps` and stop them with `flynn kill`"
            );
            Action::Fail { why, restore: false }
        }
        Step::Up | Step::Drain => Action::Wait,
    }
}

/// Jobs that are not up yet, by type.
fn missing(seen: &Seen<'_>) -> BTreeMap<String, u32> {
    let up = |kind: &str| seen.up.get(kind).copied().unwrap_or(0);
    let missing = seen
        .expected
        .iter()
        .map(|(kind, wanted)| (kind.clone(), wanted.saturating_sub(up(kind))));
    missing.filter(|(_, n)| *n > 0).collect()
}

fn fail(seen: &Seen<'_>, what: &str) -> Action {
    let mut why = format!("the new release did not come up: {what}");
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
    Action::Fail { why, restore: true }
}

/// Refuses a deployment whose strategy would do harm.
///
/// `all-at-once` runs old and new side by side. A volume belongs to one job at a time, so the new jobs would start on
/// empty ones, and the data would stay behind with the old.
pub(crate) fn check(strategy: Strategy, new: &Release, processes: &Processes) -> Result<(), Error> {
    let Strategy::AllAtOnce = strategy;
    let keeps_data = |kind: &&String| {
        let process = new.processes.get(*kind);
        process.is_some_and(|process| process.volumes.iter().any(|volume| !volume.delete_on_stop))
    };
    match processes.keys().find(keeps_data) {
        None => Ok(()),
        Some(kind) => Err(Error::conflict(format!(
            "{kind} keeps data on a volume, and {strategy} would start its new jobs beside the old ones, without that \
             data. Scale {kind} to 0, deploy, then scale it up again: the next job takes the volume over"
        ))),
    }
}

/// The counts that the new release starts with: those of the old one, as far as it has such processes.
pub(crate) fn carried_over(old: &Processes, has: impl Fn(&str) -> bool) -> Processes {
    old.iter()
        .filter(|(kind, n)| **n > 0 && has(kind))
        .map(|(kind, n)| (kind.clone(), *n))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::controller::{ProcessType, VolumeReq};

    /// A generator of numbers that a seed determines (SplitMix64).
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % sides
        }
    }

    /// Formations, and jobs that a scheduler makes and ends in its own time.
    struct World {
        dice: Dice,
        wanted_new: Option<Processes>,
        wanted_old: Processes,
        new_up: BTreeMap<String, u32>,
        old_jobs: u32,
        failures: Vec<Job>,
        current: &'static str,
    }

    impl World {
        /// One second passes. `health` of 100 starts come up and stay so.
        fn tick(&mut self, health: u64) {
            for (kind, wanted) in self.wanted_new.clone().unwrap_or_default() {
                let up = self.new_up.entry(kind.clone()).or_default();
                if *up > 0 && self.dice.roll(100) >= health.max(50) {
                    *up -= 1;
                    self.failures.insert(
                        0,
                        Job {
                            process_type: kind,
                            uuid: "u".into(),
                            ..Job::default()
                        },
                    );
                } else if *up < wanted && self.dice.roll(3) > 0 {
                    if self.dice.roll(100) < health {
                        *up += 1;
                    } else {
                        let exit_status = Some(1);
                        let job = Job {
                            process_type: kind,
                            uuid: "u".into(),
                            exit_status,
                            ..Job::default()
                        };
                        self.failures.insert(0, job);
                    }
                }
            }
            if self.wanted_new.is_none() {
                self.new_up.clear();
            }
            let wanted_old: u32 = self.wanted_old.values().sum();
            if self.old_jobs > wanted_old && self.dice.roll(4) > 0 {
                self.old_jobs -= 1;
            }
            self.old_jobs = self.old_jobs.max(wanted_old);
        }
    }

    /// Runs one deployment to its end; a restart of the controller forgets nothing but the step's clock.
    fn simulate(seed: u64) -> String {
        let mut dice = Dice(seed);
        let processes: Processes = [("web", 1 + dice.roll(4)), ("worker", dice.roll(3))]
            .into_iter()
            .map(|(kind, n)| (kind.to_owned(), u32::try_from(n).unwrap()))
            .filter(|(_, n)| *n > 0)
            .collect();
        let health = [0, 30, 70, 95, 100][usize::try_from(dice.roll(5)).unwrap()];
        let timeout = 5 + dice.roll(40);
        let mut world = World {
            old_jobs: processes.values().sum(),
            wanted_old: processes.clone(),
            wanted_new: None,
            new_up: BTreeMap::new(),
            failures: Vec::new(),
            current: "old",
            dice,
        };
        let (mut step, mut age) = (Step::Begin, 0);
        for _ in 0..400 {
            let seen = Seen {
                step,
                step_age: Duration::from_secs(age),
                timeout: Duration::from_secs(timeout),
                expected: &processes,
                up: &world.new_up,
                failures: &world.failures,
                old_jobs: world.old_jobs,
            };
            let action = next(Strategy::AllAtOnce, &seen);
            assert_eq!(
                action,
                next(Strategy::AllAtOnce, &seen),
                "the same sight, the same action"
            );
            match action {
                Action::Wait => {
                    assert!(age < timeout, "nothing waits beyond its time");
                    assert!(step != Step::Up || world.failures.len() <= MAX_FAILURES);
                }
                Action::ScaleUp => {
                    assert_eq!(step, Step::Begin);
                    world.wanted_new = Some(processes.clone());
                    (step, age) = (Step::Up, 0);
                    continue;
                }
                Action::Switch => {
                    assert_eq!(step, Step::Up);
                    assert_eq!(
                        world.wanted_old, processes,
                        "the old release ran until the new one was up"
                    );
                    for (kind, n) in &processes {
                        assert!(world.new_up[kind] >= *n, "all of the new release is up");
                    }
                    world.current = "new";
                    world.wanted_old.clear();
                    (step, age) = (Step::Drain, 0);
                    continue;
                }
                Action::Complete => {
                    assert_eq!((world.current, world.old_jobs), ("new", 0));
                    return "complete".into();
                }
                Action::Fail { why, restore } => {
                    assert_eq!(
                        restore,
                        world.current == "old",
                        "it is put back if and only if not switched"
                    );
                    assert!(!restore || world.wanted_old == processes);
                    assert!(why.contains("flynn ") || world.failures.is_empty(), "{why}");
                    return if restore {
                        "failed".into()
                    } else {
                        "undrained".into()
                    };
                }
            }
            world.tick(health);
            age = if world.dice.roll(200) == 0 { 0 } else { age + 1 };
        }
        panic!("it never ended");
    }

    #[test]
    fn five_hundred_deployments() {
        let mut outcomes = BTreeMap::<String, u32>::new();
        for seed in 0..500 {
            let outcome = std::panic::catch_unwind(|| simulate(seed));
            let outcome =
                outcome.unwrap_or_else(|_| panic!("seed {seed} failed: simulate({seed}) replays it"));
            *outcomes.entry(outcome).or_default() += 1;
        }
        assert!(
            outcomes["complete"] > 100 && outcomes["failed"] > 100,
            "both ends were reached: {outcomes:?}"
        );
    }

    #[test]
    fn a_failure_names_the_job_and_the_next_step() {
        let job = Job {
            id: "host1-u".into(),
            process_type: "web".into(),
            exit_status: Some(7),
            host_error: Some("killed by its memory limit".into()),
            ..Job::default()
        };
        let expected = [("web".to_owned(), 2)].into();
        let seen = Seen {
            step: Step::Up,
            step_age: Duration::ZERO,
            timeout: Duration::from_secs(9),
            expected: &expected,
            up: &BTreeMap::new(),
            failures: &vec![job; MAX_FAILURES + 1],
            old_jobs: 0,
        };
        let Action::Fail { why, restore: true } = next(Strategy::AllAtOnce, &seen) else {
            panic!()
        };
        for part in [
            "web job host1-u",
            "exit status 7",
            "memory limit",
            "flynn log -j host1-u",
        ] {
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn counts_carry_over_as_far_as_processes_do() {
        let old = [
            ("web".to_owned(), 2),
            ("gone".to_owned(), 1),
            ("off".to_owned(), 0),
        ]
        .into();
        assert_eq!(
            carried_over(&old, |kind| kind != "gone"),
            [("web".to_owned(), 2)].into()
        );
    }

    #[test]
    fn data_is_not_left_behind() {
        let volume = |delete_on_stop| VolumeReq {
            path: "/data".into(),
            delete_on_stop,
        };
        let release = |volume| {
            let process = ProcessType {
                volumes: vec![volume],
                ..ProcessType::default()
            };
            Release {
                processes: [("db".to_owned(), process)].into(),
                ..Release::default()
            }
        };
        let runs: Processes = [("db".to_owned(), 1)].into();
        let why = check(Strategy::AllAtOnce, &release(volume(false)), &runs).unwrap_err();
        assert!(why.message.contains("Scale db to 0, deploy"), "{why}");
        assert!(
            check(Strategy::AllAtOnce, &release(volume(true)), &runs).is_ok(),
            "a volume that goes with its job"
        );
        assert!(
            check(Strategy::AllAtOnce, &release(volume(false)), &Processes::new()).is_ok(),
            "nothing runs"
        );
    }

    #[test]
    fn other_strategies_are_refused_by_name() {
        assert_eq!("all-at-once".parse(), Ok(Strategy::AllAtOnce));
        let error = "one-by-one".parse::<Strategy>().unwrap_err();
        assert!(error.message.contains("all-at-once"), "{error}");
    }
}
