//! The planner against a world that a seed determines, and its words.

use super::*;
use flynn_api::controller::VolumeReq;

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

    fn small(&mut self, sides: u64) -> u32 {
        u32::try_from(self.roll(sides)).unwrap()
    }
}

/// Formations, and jobs that a scheduler makes and ends in its own time.
struct World {
    dice: Dice,
    hosts: u32,
    release: Release,
    target: Processes,
    turns: Turns,
    old: Side,
    new: Side,
    failures: Vec<Job>,
    current: &'static str,
}

impl World {
    fn expected(&self, wanted: &Processes) -> Processes {
        let per = |kind: &str| {
            if self.release.processes[kind].omni {
                self.hosts
            } else {
                1
            }
        };
        wanted
            .iter()
            .map(|(kind, n)| (kind.clone(), n * per(kind)))
            .collect()
    }

    fn want(&mut self, old: Processes, new: Processes) {
        (self.old.expected, self.new.expected) = (self.expected(&old), self.expected(&new));
        (self.old.wanted, self.new.wanted) = (old, new);
    }

    /// One second passes. `health` of 100 new jobs come up and stay so; old ones always do.
    fn tick(&mut self, health: u64) {
        let whole = self.expected(&self.target);
        for kind in whole.keys() {
            let exclusive = self.turns.get(kind).is_some_and(|turn| turn.exclusive);
            for is_new in [false, true] {
                let (side, other) = if is_new {
                    (&mut self.new, &self.old)
                } else {
                    (&mut self.old, &self.new)
                };
                let wanted = of(&side.expected, kind);
                let others = of(&other.alive, kind);
                let alive = side.alive.entry(kind.clone()).or_default();
                let up = side.up.entry(kind.clone()).or_default();
                if *alive > wanted {
                    if self.dice.roll(4) > 0 {
                        *alive -= 1;
                        *up = (*up).min(*alive);
                    }
                } else if *alive < wanted {
                    // What cannot share waits until there is room on the host.
                    if (!exclusive || *alive + others < whole[kind]) && self.dice.roll(3) > 0 {
                        *alive += 1;
                    }
                } else if *up < *alive {
                    if !is_new || self.dice.roll(100) < health {
                        *up += 1;
                    } else {
                        *alive -= 1;
                        self.failures.insert(0, failed(kind));
                    }
                } else if is_new && *up > 0 && self.dice.roll(100) >= health.max(60) {
                    *up -= 1;
                    *alive -= 1;
                    self.failures.insert(0, failed(kind));
                }
            }
            let there = of(&self.old.alive, kind) + of(&self.new.alive, kind);
            assert!(
                !exclusive || there <= whole[kind],
                "{kind} shares what cannot be shared"
            );
        }
    }
}

fn failed(kind: &str) -> Job {
    Job {
        process_type: kind.into(),
        uuid: "u".into(),
        exit_status: Some(1),
        ..Job::default()
    }
}

fn process(keeps_data: bool, omni: bool) -> ProcessType {
    let volumes = vec![VolumeReq {
        path: "/data".into(),
        delete_on_stop: !keeps_data,
        limit: None,
    }];
    ProcessType {
        omni,
        volumes,
        ..ProcessType::default()
    }
}

fn release() -> Release {
    let processes = [
        ("agent".into(), process(true, true)),
        ("db".into(), process(true, false)),
        ("web".into(), process(false, false)),
    ];
    Release {
        processes: processes.into(),
        ..Release::default()
    }
}

fn world(seed: u64) -> (World, Strategy) {
    let mut dice = Dice(seed);
    let strategy = Strategy::ALL[usize::try_from(dice.roll(2)).unwrap()];
    let target: Processes = [
        ("agent", dice.small(2)),
        ("db", dice.small(4)),
        ("web", 1 + dice.small(4)),
    ]
    .into_iter()
    .filter(|(_, n)| *n > 0)
    .map(|(kind, n)| (kind.to_owned(), n))
    .collect();
    let release = release();
    let mut world = World {
        hosts: 1 + dice.small(3),
        turns: turns(strategy, &release, &target),
        dice,
        release,
        old: Side::default(),
        new: Side::default(),
        failures: Vec::new(),
        current: "old",
        target: target.clone(),
    };
    world.want(target, Processes::new());
    world.old.alive = world.old.expected.clone();
    world.old.up = world.old.expected.clone();
    (world, strategy)
}

/// Runs one deployment to its end; a restart of the controller forgets nothing but the step's clock.
fn simulate(seed: u64) -> &'static str {
    let (mut world, strategy) = world(seed);
    let health = [0, 60, 90, 100, 100][usize::try_from(world.dice.roll(5)).unwrap()];
    let timeout = 8 + world.dice.roll(40);
    let (mut step, mut age, mut why) = (Step::Begin, 0, None);
    for _ in 0..4000 {
        let seen = Seen {
            step,
            step_age: Duration::from_secs(age),
            timeout: Duration::from_secs(timeout),
            target: &world.target,
            turns: &world.turns,
            old: &world.old,
            new: &world.new,
            failures: &world.failures,
        };
        let action = next(&seen);
        assert_eq!(action, next(&seen), "the same sight, the same action");
        match action {
            Action::Wait => assert!(age < timeout, "nothing waits beyond its time"),
            Action::Scale {
                old,
                new,
                step: then,
                failure,
            } => {
                for (kind, n) in &world.target {
                    let (of_old, of_new) = (of(&old, kind), of(&new, kind));
                    if world.turns.contains_key(kind) {
                        assert!(of_old + of_new <= *n, "never more of {kind} than before");
                    } else {
                        assert_eq!(of_old, *n, "{strategy}: {kind} runs until the new release is up");
                    }
                }
                if failure.is_some() {
                    assert!(matches!(step, Step::Up | Step::Down) && then == Step::BackDown);
                    why = failure;
                }
                let is_back = |step| matches!(step, Step::BackDown | Step::BackUp);
                assert!(
                    !is_back(step) || is_back(then),
                    "there is no way forward from the way back"
                );
                world.want(old, new);
                (step, age) = (then, 0);
                continue;
            }
            Action::Switch => {
                assert_eq!(step, Step::Up);
                let whole = world.expected(&world.target);
                assert_eq!(world.new.expected, whole);
                assert!(
                    whole.iter().all(|(kind, n)| of(&world.new.up, kind) >= *n),
                    "all of it is up"
                );
                world.current = "new";
                world.want(Processes::new(), world.target.clone());
                (step, age) = (Step::Drain, 0);
                continue;
            }
            Action::Complete => {
                assert_eq!((world.current, total(&world.old.alive)), ("new", 0));
                return "complete";
            }
            Action::Fail { why: now, restore } => {
                let why = now.or(why).expect("a failure has a reason");
                assert_eq!(restore, world.current == "old", "it is put back unless switched");
                assert!(why.contains("flynn ") || world.failures.is_empty(), "{why}");
                if !restore {
                    return "undrained";
                }
                assert_eq!(restored(&world.old.wanted, &world.target), world.target);
                return if step == Step::BackUp {
                    "went back"
                } else {
                    "failed"
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
    let mut outcomes = BTreeMap::<&str, u32>::new();
    for seed in 0..500 {
        let outcome = std::panic::catch_unwind(|| simulate(seed));
        let outcome = outcome.unwrap_or_else(|_| panic!("seed {seed} failed: simulate({seed}) replays it"));
        *outcomes.entry(outcome).or_default() += 1;
    }
    for end in ["complete", "failed", "went back"] {
        assert!(outcomes.get(end).is_some_and(|n| *n > 40), "{end}: {outcomes:?}");
    }
}

#[test]
fn a_failure_names_the_job_and_the_next_step() {
    let job = Job {
        id: "host1-u".into(),
        exit_status: Some(7),
        host_error: Some("killed by its memory limit".into()),
        ..failed("web")
    };
    let target: Processes = [("web".to_owned(), 2)].into();
    let new = Side {
        wanted: target.clone(),
        expected: target.clone(),
        ..Side::default()
    };
    let seen = Seen {
        step: Step::Up,
        step_age: Duration::ZERO,
        timeout: Duration::from_secs(9),
        target: &target,
        turns: &Turns::new(),
        old: &Side::default(),
        new: &new,
        failures: &vec![job; MAX_FAILURES + 1],
    };
    let Action::Fail {
        why: Some(why),
        restore: true,
    } = next(&seen)
    else {
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
fn what_cannot_share_goes_in_turn_whatever_the_strategy() {
    let release = release();
    let both: Processes = [("db".to_owned(), 1), ("web".to_owned(), 2)].into();
    let all_at_once = turns(Strategy::AllAtOnce, &release, &both);
    assert_eq!(all_at_once.keys().collect::<Vec<_>>(), ["db"]);
    assert_eq!(turns(Strategy::OneDownOneUp, &release, &both).len(), 2);
    assert_eq!(
        followed(Strategy::AllAtOnce, &release, &both),
        Strategy::AllAtOnce
    );
    let db: Processes = [("db".to_owned(), 1)].into();
    assert_eq!(
        followed(Strategy::AllAtOnce, &release, &db),
        Strategy::OneDownOneUp
    );
    let port = ProcessType {
        host_network: true,
        ..ProcessType::default()
    };
    assert!(must_take_turns(&port) && !must_take_turns(&process(false, true)));
}

#[test]
fn other_strategies_are_refused_by_name() {
    assert_eq!("all-at-once".parse(), Ok(Strategy::AllAtOnce));
    assert_eq!("one-down-one-up".parse(), Ok(Strategy::OneDownOneUp));
    let error = "one-by-one".parse::<Strategy>().unwrap_err();
    assert!(error.message.contains("all-at-once"), "{error}");
}
