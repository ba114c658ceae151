//! What is known of the hosts and their jobs, put together from lists, events and the scheduler's own acts.
//!
//! Lists are authoritative for what they can know; events may be late, doubled or lost. Each fact carries a stamp, so
//! that a list that was asked for before a job was started cannot make that job vanish.

use std::collections::{BTreeMap, BTreeSet};

use flynn_api::Meta;
use flynn_api::host::{ActiveJob, HostStatus, Job as Spec, JobState as HostJobState, label};
use flynn_api::resources::Resources;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

/// Label of a job: how often its like had been restarted when it was started.
pub const RESTARTS: &str = "flynn-scheduler.restarts";

/// Label of a job: the one whose end made room for it.
pub const REPLACES: &str = "flynn-scheduler.replaces";

/// How long a host that comes back may take to bring a `resurrect` job back before the job counts as over.
const RESURRECTION: SignedDuration = SignedDuration::from_secs(30);

/// How long jobs that are over are remembered once their host has forgotten them: longer than any backoff.
const REMEMBERED: SignedDuration = SignedDuration::from_secs(600);

/// Jobs that are over and remembered, per host.
const MAX_REMEMBERED: usize = 2000;

/// What jobs are counted by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Key {
    /// The app's id.
    pub app: String,
    /// The release's id.
    pub release: String,
    /// The process type; empty for one-off jobs.
    pub process_type: String,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Given to a host that has not yet said that it has it.
    Pending,
    /// The host makes it, or its services are not healthy yet.
    Starting,
    /// It runs and has been healthy.
    Up,
    /// Over.
    Down,
}

/// One job on one host.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// What it is counted by.
    pub key: Key,
    /// Where it stands.
    pub state: State,
    /// The scheduler has asked its host to stop it, then.
    pub asked_to_stop: Option<Timestamp>,
    /// It was given up together with its host.
    pub lost: bool,
    /// Of the platform.
    pub system: bool,
    /// Its supervisor restarts it.
    pub resurrect: bool,
    /// How often its like has been restarted, the supervisor's restarts not counted.
    pub restarts: u32,
    /// The job whose end made room for it.
    pub replaces: Option<String>,
    /// How often its supervisor has restarted it.
    pub supervisor_restarts: u32,
    /// Volumes.
    pub volumes: Vec<String>,
    /// Its ports are its host's own.
    pub host_network: bool,
    /// Limits.
    pub resources: Resources,
    /// Program and arguments, kept for one-off jobs alone.
    pub args: Vec<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When its process was started.
    pub started_at: Option<Timestamp>,
    /// When it was over.
    pub ended_at: Option<Timestamp>,
    /// Its exit status.
    pub exit_status: Option<i32>,
    /// Why it failed.
    pub error: Option<String>,
    /// Whether the host's last list had it.
    listed: bool,
    /// It ended against its will, and its host is expected to bring it back.
    returns: bool,
    stamp: u64,
}

impl Job {
    fn observed(active: &ActiveJob) -> Option<Self> {
        let spec = &active.job;
        let state = match active.status {
            status if status.is_terminal() => State::Down,
            HostJobState::Running if active.healthy => State::Up,
            _ => State::Starting,
        };
        Some(Self {
            state,
            supervisor_restarts: active.restarts,
            created_at: active.created_at,
            started_at: active.started_at,
            ended_at: active.ended_at,
            exit_status: active.exit_status,
            error: active.error.clone(),
            listed: true,
            // A host that is shut down says so as well.
            returns: spec.resurrect && (active.status != HostJobState::Done || active.error.is_some()),
            ..Self::pending(spec, active.created_at)?
        })
    }

    /// A job of the controller's that no host has taken yet; `None` for all others.
    fn pending(spec: &Spec, now: Timestamp) -> Option<Self> {
        let get = |name: &str| spec.metadata.get(name).cloned();
        let key = Key {
            app: get(label::APP_ID)?,
            release: get(label::RELEASE_ID)?,
            process_type: get(label::PROCESS_TYPE).unwrap_or_default(),
        };
        let args = if key.process_type.is_empty() {
            spec.config.args.clone()
        } else {
            Vec::new()
        };
        Some(Self {
            key,
            state: State::Pending,
            asked_to_stop: None,
            lost: false,
            system: get(label::SYSTEM_APP).is_some_and(|value| value == "true"),
            resurrect: spec.resurrect,
            restarts: get(RESTARTS).and_then(|value| value.parse().ok()).unwrap_or(0),
            replaces: get(REPLACES),
            supervisor_restarts: 0,
            volumes: spec
                .config
                .volumes
                .iter()
                .map(|volume| volume.volume_id.clone())
                .collect(),
            host_network: spec.config.host_network,
            resources: spec.resources.clone(),
            args,
            created_at: now,
            started_at: None,
            ended_at: None,
            exit_status: None,
            error: None,
            listed: false,
            returns: false,
            stamp: 0,
        })
    }

    /// Whether it counts towards what is wanted.
    pub fn is_live(&self) -> bool {
        self.state != State::Down && self.asked_to_stop.is_none()
    }

    /// Takes in what the host says. A `certain` word is a list that was asked for after all that is known here.
    fn update(&mut self, new: Self, certain: bool, now: Timestamp) {
        if self.resurrect {
            if new.supervisor_restarts < self.supervisor_restarts {
                return;
            }
        } else if self.state == State::Down && !self.lost && !certain {
            // Such a job never comes back: what says so is old.
            self.listed |= new.listed;
            return;
        }
        let asked_to_stop = self.asked_to_stop;
        // An instance that has been up and fails a check is still the one that is up.
        let state = match (self.state, new.state) {
            (State::Up, State::Starting) if new.supervisor_restarts == self.supervisor_restarts => State::Up,
            (_, State::Down) if new.returns && asked_to_stop.is_none() => {
                let ended_at = new.ended_at.unwrap_or(now);
                if now < ended_at + RESURRECTION {
                    State::Starting
                } else {
                    State::Down
                }
            }
            (_, state) => state,
        };
        *self = Self {
            state,
            asked_to_stop,
            lost: self.lost,
            ..new
        };
    }

    fn end(&mut self, now: Timestamp, error: &str) {
        self.state = State::Down;
        self.ended_at = Some(self.ended_at.unwrap_or(now));
        self.error.get_or_insert_with(|| error.to_owned());
    }
}

/// What a host is.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Facts {
    /// Tags for placement.
    pub tags: Meta,
    /// Thousandths of a core.
    pub cpu: u64,
    /// Bytes.
    pub memory: u64,
    /// Its jobs are to go to other hosts.
    pub draining: bool,
}

impl From<&HostStatus> for Facts {
    fn from(status: &HostStatus) -> Self {
        Self {
            tags: status.tags.clone(),
            cpu: status.cpu,
            memory: status.memory,
            draining: status.draining,
        }
    }
}

/// One host.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// discoverd lists it.
    pub registered: bool,
    /// Its API answers.
    pub answering: bool,
    /// It is being shut down.
    pub shutting_down: bool,
    /// Its jobs have been listed at least once.
    pub listed: bool,
    /// Since when it is known.
    pub since: Timestamp,
    /// What it is.
    pub facts: Facts,
    /// Its volumes.
    pub volumes: BTreeSet<String>,
    /// Its jobs, by id.
    pub jobs: BTreeMap<String, Job>,
}

impl Host {
    /// Whether it may be given jobs.
    pub fn is_ready(&self) -> bool {
        self.registered && self.answering && self.listed && !self.shutting_down && !self.facts.draining
    }

    /// Whether both signals say that it is gone.
    pub fn is_gone(&self) -> bool {
        !self.registered && !self.answering
    }

    /// Jobs that run or shall run, whoever asked for them.
    pub fn live_jobs(&self) -> impl Iterator<Item = (&String, &Job)> {
        self.jobs.iter().filter(|(_, job)| job.is_live())
    }
}

/// Everything that is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    hosts: BTreeMap<String, Host>,
    /// discoverd has been asked for the hosts at least once.
    pub hosts_known: bool,
    stamp: u64,
}

/// When a list was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked(u64);

impl View {
    /// The hosts by id.
    pub fn hosts(&self) -> &BTreeMap<String, Host> {
        &self.hosts
    }

    /// All jobs with their hosts' ids.
    pub fn jobs(&self) -> impl Iterator<Item = (&String, &String, &Job)> {
        self.hosts
            .iter()
            .flat_map(|(host, state)| state.jobs.iter().map(move |(id, job)| (host, id, job)))
    }

    /// A job by its id.
    pub fn job(&self, id: &str) -> Option<&Job> {
        self.hosts.values().find_map(|host| host.jobs.get(id))
    }

    fn next(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// A host is there, as far as discoverd or itself says.
    pub fn host(&mut self, id: &str, now: Timestamp) -> &mut Host {
        self.hosts.entry(id.to_owned()).or_insert_with(|| Host {
            registered: false,
            answering: false,
            shutting_down: false,
            listed: false,
            since: now,
            facts: Facts::default(),
            volumes: BTreeSet::new(),
            jobs: BTreeMap::new(),
        })
    }

    /// What discoverd says of the hosts: ids, and whether each is being shut down.
    pub fn registered(&mut self, hosts: &BTreeMap<String, bool>, now: Timestamp) {
        self.hosts_known = true;
        for host in self.hosts.values_mut() {
            host.registered = false;
        }
        for (id, shutting_down) in hosts {
            let host = self.host(id, now);
            host.registered = true;
            host.shutting_down = *shutting_down;
        }
        self.give_up(now);
    }

    /// Whether a host's API answers.
    pub fn answering(&mut self, id: &str, answers: bool, now: Timestamp) {
        self.host(id, now).answering = answers;
        self.give_up(now);
    }

    /// Jobs of hosts that are gone by both signals are over.
    fn give_up(&mut self, now: Timestamp) {
        for host in self.hosts.values_mut().filter(|host| host.is_gone()) {
            host.listed = false;
            for job in host.jobs.values_mut().filter(|job| job.state != State::Down) {
                job.end(
                    now,
                    "its host is gone: it left discoverd and its API does not answer",
                );
                job.lost = true;
            }
        }
    }

    /// Call before a host is asked for its jobs, and hand the answer to [`View::list`].
    pub fn ask(&mut self) -> Asked {
        Asked(self.next())
    }

    /// All jobs that a host knows.
    pub fn list(&mut self, host_id: &str, asked: Asked, jobs: &BTreeMap<String, ActiveJob>, now: Timestamp) {
        for job in self.host(host_id, now).jobs.values_mut() {
            job.listed = false;
        }
        for active in jobs.values() {
            self.take(host_id, active, Some(asked), now);
        }
        let host = self.host(host_id, now);
        host.listed = true;
        for (id, job) in &mut host.jobs {
            let forgotten = !jobs.contains_key(id) && job.stamp <= asked.0;
            if forgotten && job.state != State::Down && job.state != State::Pending {
                job.end(now, "its host no longer knows it");
            }
        }
        Self::forget(host, now);
    }

    /// One job, as its host describes it in an event.
    pub fn observe(&mut self, host_id: &str, active: &ActiveJob, now: Timestamp) {
        self.take(host_id, active, None, now);
    }

    fn take(&mut self, host_id: &str, active: &ActiveJob, asked: Option<Asked>, now: Timestamp) {
        let Some(mut new) = Job::observed(active) else {
            return;
        };
        new.stamp = self.next();
        if new.state == State::Down && new.ended_at.is_none() {
            new.ended_at = Some(now);
        }
        let jobs = &mut self.host(host_id, now).jobs;
        if let Some(job) = jobs.get_mut(&active.job.id) {
            let certain = asked.is_some_and(|asked| job.stamp <= asked.0);
            if asked.is_none() || certain {
                job.update(new, certain, now);
            } else {
                job.listed = true;
            }
        } else {
            // `update` knows whose turn it is to restart it.
            let mut job = Job {
                state: State::Pending,
                ..new.clone()
            };
            job.update(new, true, now);
            jobs.insert(active.job.id.clone(), job);
        }
    }

    /// The host has removed what it kept of a job.
    pub fn forgotten(&mut self, host_id: &str, id: &str, now: Timestamp) {
        if let Some(job) = self.host(host_id, now).jobs.get_mut(id) {
            job.listed = false;
            if job.state != State::Down {
                job.end(now, "its host no longer knows it");
            }
        }
    }

    /// The scheduler is about to start a job.
    pub fn starting(&mut self, host_id: &str, spec: &Spec, now: Timestamp) {
        let stamp = self.next();
        if let Some(job) = Job::pending(spec, now) {
            self.host(host_id, now)
                .jobs
                .entry(spec.id.clone())
                .or_insert(Job { stamp, ..job });
        }
    }

    /// The host has taken the job.
    pub fn taken(&mut self, id: &str) {
        let stamp = self.next();
        if let Some(job) = self.find(id)
            && job.state == State::Pending
        {
            job.state = State::Starting;
            job.stamp = stamp;
        }
    }

    /// The host will not take the job.
    pub fn refused(&mut self, id: &str, why: &str, now: Timestamp) {
        let stamp = self.next();
        if let Some(job) = self.find(id)
            && job.state == State::Pending
        {
            job.end(now, why);
            job.stamp = stamp;
        }
    }

    /// The scheduler is about to stop a job.
    pub fn stopping(&mut self, id: &str, now: Timestamp) {
        if let Some(job) = self.find(id) {
            job.asked_to_stop = Some(now);
        }
    }

    /// The job could not be asked to stop: its host did not answer.
    pub fn not_stopping(&mut self, id: &str) {
        if let Some(job) = self.find(id) {
            job.asked_to_stop = None;
        }
    }

    /// The host does not know the job that it was asked to stop.
    pub fn gone(&mut self, id: &str, now: Timestamp) {
        let stamp = self.next();
        if let Some(job) = self.find(id)
            && job.state != State::Down
        {
            job.end(now, "its host no longer knows it");
            job.stamp = stamp;
        }
    }

    fn find(&mut self, id: &str) -> Option<&mut Job> {
        self.hosts.values_mut().find_map(|host| host.jobs.get_mut(id))
    }

    /// Lets go of what is of no use any more.
    pub fn prune(&mut self, now: Timestamp) {
        for host in self.hosts.values_mut() {
            Self::forget(host, now);
        }
        self.hosts
            .retain(|_, host| !host.is_gone() || !host.jobs.is_empty());
    }

    fn forget(host: &mut Host, now: Timestamp) {
        let ended = |job: &Job| {
            if job.listed {
                None
            } else {
                job.ended_at.filter(|_| job.state == State::Down)
            }
        };
        host.jobs
            .retain(|_, job| ended(job).is_none_or(|at| now < at + REMEMBERED));
        let mut over: Vec<_> = host
            .jobs
            .iter()
            .filter_map(|(id, job)| Some((ended(job)?, id.clone())))
            .collect();
        if over.len() > MAX_REMEMBERED {
            over.sort();
            for (_, id) in &over[..over.len() - MAX_REMEMBERED] {
                host.jobs.remove(id);
            }
        }
    }
}
