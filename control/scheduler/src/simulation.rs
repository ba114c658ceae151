//! The core against a simulated cluster: hosts that crash jobs, vanish, come back, and tell late, twice or never.

use std::collections::{BTreeMap, BTreeSet};

use flynn_api::controller::{App, ExpandedFormation, ProcessType, Release, VolumeReq};
use flynn_api::host::{ActiveJob, Job as Spec, JobState as HostJobState};
use jiff::{SignedDuration, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::plan::{Desired, Start, plan};
use crate::start::spec_of;
use crate::view::{Key, View};

const SEEDS: u64 = 500;

#[derive(Default)]
struct SimHost {
    up: bool,
    registered: bool,
    /// The scheduler reaches it.
    reachable: bool,
    jobs: BTreeMap<String, ActiveJob>,
    /// Events that have not arrived yet.
    events: Vec<ActiveJob>,
    /// A list that was asked for and has not arrived.
    list: Option<(crate::view::Asked, BTreeMap<String, ActiveJob>)>,
    volumes: BTreeSet<String>,
}

struct Sim {
    random: StdRng,
    now: Timestamp,
    hosts: BTreeMap<String, SimHost>,
    formations: BTreeMap<(String, String), ExpandedFormation>,
    desired: Desired,
    controller_away: bool,
    view: View,
    /// Starts on their way: host, job, whether the scheduler gets the answer.
    puts: Vec<(String, Spec)>,
    deletes: Vec<(String, String)>,
    next_id: u64,
    faults: bool,
    /// How likely a job is to crash in a step.
    crashes: f64,
}

fn formation(app: u32, release: u32, random: &mut StdRng) -> ExpandedFormation {
    let mut processes = BTreeMap::new();
    let mut counts = BTreeMap::new();
    for process_type in ["web", "worker", "agent"] {
        if process_type != "web" && random.random_bool(0.5) {
            continue;
        }
        let volumes = if process_type == "worker" && app == 0 {
            vec![VolumeReq {
                path: "/data".into(),
                delete_on_stop: false,
                limit: None,
            }]
        } else {
            Vec::new()
        };
        let omni = process_type == "agent";
        processes.insert(
            process_type.to_owned(),
            ProcessType {
                omni,
                volumes,
                ..ProcessType::default()
            },
        );
        counts.insert(
            process_type.to_owned(),
            random.random_range(0..if omni { 2 } else { 5 }),
        );
    }
    ExpandedFormation {
        app: App {
            id: format!("app{app}"),
            name: format!("app{app}"),
            ..App::default()
        },
        release: Release {
            id: format!("release{release}"),
            processes,
            ..Release::default()
        },
        processes: counts,
        ..ExpandedFormation::default()
    }
}

/// A job that a host has just taken.
fn taken(host_id: &str, job: Spec, now: Timestamp) -> ActiveJob {
    ActiveJob {
        job,
        status: HostJobState::Starting,
        host_id: host_id.to_owned(),
        internal_ip: None,
        ports: Vec::new(),
        user_namespace: None,
        pid: None,
        supervisor_pid: None,
        paused: false,
        created_at: now,
        started_at: None,
        ended_at: None,
        exit_status: None,
        error: None,
        restarts: 0,
        oom_killed: false,
        healthy: false,
    }
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let hosts = (0..random.random_range(1..5))
            .map(|n| {
                let host = SimHost {
                    up: true,
                    registered: true,
                    reachable: true,
                    ..SimHost::default()
                };
                (format!("host{n}"), host)
            })
            .collect();
        let formations = (0..random.random_range(1..4))
            .map(|app| formation(app, app, &mut random))
            .map(|formation| {
                (
                    (formation.app.id.clone(), formation.release.id.clone()),
                    formation,
                )
            })
            .collect();
        Self {
            random,
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            hosts,
            formations,
            desired: Desired::default(),
            controller_away: false,
            view: View::default(),
            puts: Vec::new(),
            deletes: Vec::new(),
            next_id: 0,
            faults: true,
            // Some clusters have apps that do not stay up.
            crashes: if seed.is_multiple_of(4) { 0.4 } else { 0.02 },
        }
    }

    fn chance(&mut self, probability: f64) -> bool {
        self.faults && self.random.random_bool(probability)
    }

    fn step(&mut self) {
        self.now += SignedDuration::from_millis(self.random.random_range(10..2000));
        self.change_the_world();
        self.tell_the_scheduler();
        self.schedule();
        self.deliver();
        self.run_jobs();
    }

    fn change_the_world(&mut self) {
        if self.chance(0.01) {
            self.restart_scheduler();
        }
        if self.chance(0.02) {
            self.controller_away = !self.controller_away;
        }
        if !self.controller_away && self.chance(0.03) {
            let keys: Vec<_> = self.formations.keys().cloned().collect();
            let key = keys[self.random.random_range(0..keys.len())].clone();
            if self.random.random_bool(0.2) && keys.len() > 1 {
                self.formations.remove(&key);
            } else if let Some(formation) = self.formations.get_mut(&key) {
                for (process_type, count) in &mut formation.processes {
                    *count = self
                        .random
                        .random_range(0..if process_type == "agent" { 2 } else { 6 });
                }
            }
        }
        let names: Vec<String> = self.hosts.keys().cloned().collect();
        for name in names {
            let (dies, cut, unregister) = (self.chance(0.004), self.chance(0.02), self.chance(0.01));
            let host = self.hosts.get_mut(&name).unwrap();
            if dies {
                // A power cut: every job is over, and nobody tells.
                host.up = !host.up;
                host.jobs.clear();
                host.events.clear();
                host.list = None;
            }
            if cut {
                host.reachable = !host.reachable;
            }
            if unregister || !host.up && self.random.random_bool(0.1) {
                host.registered = false;
            } else if host.up && self.random.random_bool(0.3) {
                host.registered = true;
            }
            if !self.faults {
                (host.up, host.reachable, host.registered) = (true, true, true);
            }
        }
        if !self.faults {
            self.controller_away = false;
        }
    }

    /// Another scheduler leads, and knows nothing; of the calls under way some still arrive.
    fn restart_scheduler(&mut self) {
        self.view = View::default();
        self.desired = Desired::default();
        self.deletes.clear();
        for host in self.hosts.values_mut() {
            (host.list, host.events) = (None, Vec::new());
        }
        for (host_id, spec) in std::mem::take(&mut self.puts) {
            let host = self.hosts.get_mut(&host_id).unwrap();
            if host.up && self.random.random_bool(0.5) {
                host.jobs
                    .entry(spec.id.clone())
                    .or_insert_with(|| taken(&host_id, spec, self.now));
            }
        }
    }

    fn tell_the_scheduler(&mut self) {
        if self.controller_away {
            self.desired.fresh = false;
        } else if !self.faults || self.random.random_bool(0.5) {
            self.desired = Desired::new(self.formations.values().cloned().collect(), self.now);
        }
        if !self.faults || self.random.random_bool(0.5) {
            let registered = self.hosts.iter().filter(|(_, host)| host.registered);
            self.view
                .registered(&registered.map(|(id, _)| (id.clone(), false)).collect(), self.now);
        }
        let names: Vec<String> = self.hosts.keys().cloned().collect();
        for name in names {
            let (lose, double, late) = (self.chance(0.1), self.chance(0.1), self.chance(0.3));
            let ask = !self.faults || self.random.random_bool(0.2);
            let host = self.hosts.get_mut(&name).unwrap();
            let answers = host.up && host.reachable;
            self.view.answering(&name, answers, self.now);
            if !answers {
                host.events.clear();
                host.list = None;
                continue;
            }
            if !late {
                let mut events = std::mem::take(&mut host.events);
                if lose {
                    events.pop();
                }
                if double && let Some(first) = events.first().cloned() {
                    events.push(first);
                }
                for event in events {
                    self.view.observe(&name, &event, self.now);
                }
                // A list may arrive long after it was made.
                if let Some((asked, jobs)) = host.list.take() {
                    self.view.list(&name, asked, &jobs, self.now);
                    self.view.host(&name, self.now).volumes = host.volumes.clone();
                }
            }
            if ask && host.list.is_none() {
                host.list = Some((self.view.ask(), host.jobs.clone()));
            }
        }
        self.view.prune(self.now);
    }

    fn schedule(&mut self) {
        let plan = plan(&self.desired, &self.view, self.now);
        assert_eq!(
            plan,
            crate::plan::plan(&self.desired, &self.view, self.now),
            "a plan is a function"
        );
        assert!(
            self.desired.fresh || plan.stops.is_empty(),
            "nothing is stopped on partial knowledge"
        );
        assert!(self.desired.as_of.is_some() || plan.starts.is_empty());
        for stop in &plan.stops {
            self.view.stopping(&stop.id, self.now);
            self.deletes.push((stop.host.clone(), stop.id.clone()));
        }
        for start in &plan.starts {
            self.check_backoff(&start.key, start.restarts);
            self.next_id += 1;
            let id = format!("{}-{:032}", start.host, self.next_id);
            let formation = &self.desired.formations[&(start.key.app.clone(), start.key.release.clone())];
            let spec = spec_of(formation, start, &id).unwrap();
            self.view.starting(&start.host, &spec, self.now);
            self.puts.push((start.host.clone(), spec));
        }
        self.check_counts(&plan.starts);
        let again = crate::plan::plan(&self.desired, &self.view, self.now);
        assert!(
            again.starts.is_empty() && again.stops.is_empty(),
            "a plan that is carried out is done: {again:?}"
        );
    }

    /// A restart that has to wait has waited since the end of a job that the scheduler had seen.
    fn check_backoff(&self, key: &Key, restarts: u32) {
        let wait = crate::backoff::delay(restarts);
        let waited = self.view.jobs().any(|(_, _, job)| {
            job.key == *key && (job.lost || job.ended_at.is_some_and(|at| at + wait <= self.now))
        });
        assert!(
            wait.is_zero() || waited,
            "{key:?} was restarted for the {restarts}th time too early"
        );
    }

    fn deliver(&mut self) {
        for (host_id, spec) in std::mem::take(&mut self.puts) {
            let host = self.hosts.get_mut(&host_id).unwrap();
            let wanted = self.view.job(&spec.id).is_some_and(crate::view::Job::is_live);
            if !wanted {
                continue;
            }
            if !host.up || !host.reachable || self.faults && self.random.random_bool(0.1) {
                self.puts.push((host_id, spec)); // tried again
                continue;
            }
            if self.faults && self.random.random_bool(0.05) {
                self.view.refused(&spec.id, "no room", self.now);
                continue;
            }
            let active = taken(&host_id, spec.clone(), self.now);
            host.volumes
                .extend(spec.config.volumes.iter().map(|volume| volume.volume_id.clone()));
            host.jobs.entry(spec.id.clone()).or_insert_with(|| active.clone());
            host.events.push(active);
            if self.faults && self.random.random_bool(0.2) {
                self.puts.push((host_id, spec)); // the answer was lost: tried again
            } else {
                self.view.taken(&spec.id);
            }
        }
        for (host_id, id) in std::mem::take(&mut self.deletes) {
            let host = self.hosts.get_mut(&host_id).unwrap();
            if !host.up || !host.reachable {
                self.view.not_stopping(&id);
                continue;
            }
            match host.jobs.get_mut(&id) {
                None => self.view.gone(&id, self.now),
                Some(job) if !job.status.is_terminal() => {
                    job.status = HostJobState::Done;
                    job.ended_at = Some(self.now);
                    host.events.push(job.clone());
                }
                Some(_) => {}
            }
        }
    }

    fn run_jobs(&mut self) {
        let (faults, now, crashes) = (self.faults, self.now, self.crashes);
        for host in self.hosts.values_mut().filter(|host| host.up) {
            for job in host.jobs.values_mut() {
                let changed = match job.status {
                    HostJobState::Starting if !faults || self.random.random_bool(0.5) => {
                        (job.status, job.started_at) = (HostJobState::Running, Some(now));
                        job.healthy = !faults || self.random.random_bool(0.7);
                        true
                    }
                    HostJobState::Running if faults && self.random.random_bool(crashes) => {
                        (job.status, job.ended_at, job.exit_status) =
                            (HostJobState::Crashed, Some(now), Some(1));
                        true
                    }
                    HostJobState::Running if !job.healthy => {
                        job.healthy = !faults || self.random.random_bool(0.7);
                        job.healthy
                    }
                    _ => false,
                };
                if changed {
                    host.events.push(job.clone());
                }
            }
        }
    }

    fn running(&self, key: &Key, host_id: Option<&str>) -> usize {
        let hosts = self
            .hosts
            .iter()
            .filter(|(id, host)| host.up && host_id.is_none_or(|host| host == *id));
        hosts
            .flat_map(|(_, host)| host.jobs.values())
            .filter(|job| !job.status.is_terminal())
            .filter(|job| {
                let label = |name: &str| job.job.metadata.get(name).map(String::as_str).unwrap_or_default();
                label(flynn_api::host::label::APP_ID) == key.app
                    && label(flynn_api::host::label::RELEASE_ID) == key.release
                    && label(flynn_api::host::label::PROCESS_TYPE) == key.process_type
            })
            .count()
    }

    /// What was started brings no kind above what is wanted, as far as the scheduler can know.
    fn check_counts(&self, starts: &[Start]) {
        for start in starts {
            let formation = &self.desired.formations[&(start.key.app.clone(), start.key.release.clone())];
            let omni = formation.release.processes[&start.key.process_type].omni;
            let live = self.view.jobs().filter(|(host, _, job)| {
                job.key == start.key && job.is_live() && (!omni || **host == start.host)
            });
            assert!(
                live.count() <= formation.processes[&start.key.process_type] as usize,
                "too many of {start:?}"
            );
        }
    }

    fn converged(&self) -> Result<(), String> {
        let mut wanted_keys = BTreeSet::new();
        for ((app, release), formation) in &self.formations {
            for (process_type, count) in &formation.processes {
                let key = Key {
                    app: app.clone(),
                    release: release.clone(),
                    process_type: process_type.clone(),
                };
                let omni = formation.release.processes[process_type].omni;
                let places: Vec<Option<&str>> = if omni {
                    self.hosts.keys().map(|id| Some(id.as_str())).collect()
                } else {
                    vec![None]
                };
                for place in places {
                    let running = self.running(&key, place);
                    if running != *count as usize {
                        return Err(format!("{key:?} at {place:?}: {running} run, {count} wanted"));
                    }
                }
                wanted_keys.insert(key);
            }
        }
        for host in self.hosts.values() {
            for job in host.jobs.values().filter(|job| !job.status.is_terminal()) {
                let label = |name: &str| job.job.metadata[name].clone();
                let key = Key {
                    app: label(flynn_api::host::label::APP_ID),
                    release: label(flynn_api::host::label::RELEASE_ID),
                    process_type: label(flynn_api::host::label::PROCESS_TYPE),
                };
                if !wanted_keys.contains(&key) {
                    return Err(format!("{key:?} still runs and nobody wants it"));
                }
            }
        }
        Ok(())
    }

    /// With volumes, no two jobs of one release share one.
    fn volumes_are_exclusive(&self) -> bool {
        let mut seen = BTreeSet::new();
        let live = self.hosts.iter().filter(|(_, host)| host.up);
        live.flat_map(|(id, host)| host.jobs.values().map(move |job| (id, job)))
            .filter(|(_, job)| !job.status.is_terminal())
            .flat_map(|(id, job)| {
                job.job
                    .config
                    .volumes
                    .iter()
                    .map(move |volume| (id, &volume.volume_id))
            })
            .all(|volume| seen.insert(volume))
    }
}

fn run(seed: u64) {
    let mut sim = Sim::new(seed);
    for _ in 0..120 {
        sim.step();
    }
    sim.faults = false;
    // Until what was not known has been told: a job that ended unseen may still count for a while.
    let (mut steps, mut settled) = (0, 0);
    while settled < 5 {
        sim.step();
        match sim.converged() {
            Ok(()) => settled += 1,
            Err(why) => {
                assert!(steps < 150, "seed {seed}: {why}");
                settled = 0;
            }
        }
        steps += 1;
    }
    assert!(
        sim.volumes_are_exclusive(),
        "seed {seed}: two jobs share a volume"
    );
    for _ in 0..10 {
        sim.step();
        assert_eq!(sim.converged(), Ok(()), "seed {seed}: it does not stay so");
    }
}

#[test]
fn converges_whatever_happens() {
    // `SEED=n` replays one.
    if let Some(seed) = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        return run(seed);
    }
    for seed in 0..SEEDS {
        let result = std::panic::catch_unwind(|| run(seed));
        if let Err(why) = result {
            eprintln!("seed {seed} failed; replay it with SEED={seed}");
            std::panic::resume_unwind(why);
        }
    }
}
