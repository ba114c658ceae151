//! From what is wanted and what is there to what is to be done. Pure: the same input gives the same plan.
//!
//! Invariants:
//! - Nothing is stopped unless the controller's list is whole and fresh, nothing started before every host's jobs
//!   are known.
//! - Live jobs of a formation never exceed its count by the plan's doing.
//! - The last healthy job of a platform or critical app's process type is not stopped while nothing else replaces it,
//!   or waits for what it has and cannot share (volumes, ports of its host).
//! - What cannot be shared is handed over between releases: the new job is started once the old one is down.
//! - `resurrect` jobs are replaced only when they are over for good ([`crate::view`]).

use std::collections::{BTreeMap, BTreeSet};

use flynn_api::Meta;
use flynn_api::controller::{ExpandedFormation, ProcessType, SYSTEM_CRITICAL};
use flynn_api::resources::Resources;
use flynn_api::spec::volume_id;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::backoff;
use crate::place::{self, Load};
use crate::view::{Host, Job, Key, State, View};

/// How long a host that discoverd lists may keep everybody waiting for its jobs' list.
const UNLISTED: SignedDuration = SignedDuration::from_secs(60);

/// When a job that was asked to stop is asked again: its own patience (30 s) and some more.
const ASK_AGAIN: SignedDuration = SignedDuration::from_secs(45);

/// What the controller wants.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// Formations by app and release.
    pub formations: BTreeMap<(String, String), ExpandedFormation>,
    /// When the list was asked for; `None` before it has been read whole for the first time.
    pub as_of: Option<Timestamp>,
    /// The controller answers and tells of changes. Without it counts are kept, and nothing is stopped.
    pub fresh: bool,
}

impl Desired {
    /// The whole list, as read now.
    pub fn new(formations: Vec<ExpandedFormation>, as_of: Timestamp) -> Self {
        let formations = formations
            .into_iter()
            .filter(|formation| !formation.deleted)
            .map(|formation| {
                (
                    (formation.app.id.clone(), formation.release.id.clone()),
                    formation,
                )
            })
            .collect();
        Self {
            formations,
            as_of: Some(as_of),
            fresh: true,
        }
    }
}

/// A job to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Start {
    /// What it is counted by.
    pub key: Key,
    /// Where.
    pub host: String,
    /// Which volumes it gets.
    pub volume_index: u32,
    /// How often its like has been restarted.
    pub restarts: u32,
    /// The job whose end made room for it.
    pub replaces: Option<String>,
}

/// A job to be stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stop {
    /// Which.
    pub id: String,
    /// Where.
    pub host: String,
    /// Why, for the log.
    pub reason: &'static str,
}

/// Something that is wanted and cannot be done now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Blocked {
    /// What.
    pub key: Key,
    /// Why, and what would help.
    pub reason: String,
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Jobs to start.
    pub starts: Vec<Start>,
    /// Jobs to stop.
    pub stops: Vec<Stop>,
    /// What cannot be done.
    pub blocked: Vec<Blocked>,
    /// When to plan again even if nothing happens.
    pub wake_at: Option<Timestamp>,
}

/// Plans.
pub fn plan(desired: &Desired, view: &View, now: Timestamp) -> Plan {
    let Some(as_of) = desired.as_of else {
        return Plan::default();
    };
    let mut planner = Planner::new(desired, view, now);
    if desired.fresh {
        planner.stop_unknown(as_of);
        planner.stop_again();
    }
    let may_start = planner.may_start();
    for ((app, release), formation) in &desired.formations {
        let types: BTreeSet<&String> = formation
            .processes
            .keys()
            .chain(formation.release.processes.keys())
            .collect();
        for process_type in types {
            let key = Key {
                app: app.clone(),
                release: release.clone(),
                process_type: process_type.clone(),
            };
            planner.formation(formation, &key, may_start);
        }
    }
    planner.plan
}

struct Planner<'a> {
    desired: &'a Desired,
    view: &'a View,
    now: Timestamp,
    /// Jobs that somebody wants, by what they are counted by.
    jobs: BTreeMap<&'a Key, Vec<Placed<'a>>>,
    /// Ready hosts.
    loads: BTreeMap<String, Load>,
    plan: Plan,
}

#[derive(Clone, Copy)]
struct Placed<'a> {
    id: &'a String,
    host_id: &'a String,
    host: &'a Host,
    job: &'a Job,
}

impl<'a> Planner<'a> {
    fn new(desired: &'a Desired, view: &'a View, now: Timestamp) -> Self {
        let mut jobs: BTreeMap<&Key, Vec<Placed<'_>>> = BTreeMap::new();
        for (host_id, host) in view.hosts() {
            for (id, job) in &host.jobs {
                // One-off jobs are nobody's to count.
                if !job.key.process_type.is_empty() {
                    jobs.entry(&job.key).or_default().push(Placed {
                        id,
                        host_id,
                        host,
                        job,
                    });
                }
            }
        }
        let ready = view.hosts().iter().filter(|(_, host)| host.is_ready());
        let loads = ready.map(|(id, host)| (id.clone(), Load::of(host))).collect();
        Self {
            desired,
            view,
            now,
            jobs,
            loads,
            plan: Plan::default(),
        }
    }

    /// Every host's jobs are known, or the host has been silent for so long that waiting helps nobody.
    fn may_start(&mut self) -> bool {
        let silent = |host: &&Host| !host.listed && !host.is_gone();
        let until = self
            .view
            .hosts()
            .values()
            .filter(silent)
            .map(|host| host.since + UNLISTED)
            .max();
        match until {
            _ if !self.view.hosts_known => false,
            Some(until) if until > self.now => {
                self.wake_at(until);
                false
            }
            _ => true,
        }
    }

    fn wake_at(&mut self, at: Timestamp) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |other| other.min(at)));
    }

    fn stop(&mut self, placed: Placed<'_>, reason: &'static str) {
        if placed.host.answering {
            let (id, host) = (placed.id.clone(), placed.host_id.clone());
            self.plan.stops.push(Stop { id, host, reason });
        }
    }

    fn block(&mut self, key: &Key, reason: impl Into<String>) {
        self.plan.blocked.push(Blocked {
            key: key.clone(),
            reason: reason.into(),
        });
    }

    /// Stops jobs of formations that are not there (any more).
    fn stop_unknown(&mut self, as_of: Timestamp) {
        let unknown: Vec<_> = self
            .jobs
            .iter()
            .filter(|(key, _)| {
                !self
                    .desired
                    .formations
                    .contains_key(&(key.app.clone(), key.release.clone()))
            })
            .flat_map(|(_, jobs)| jobs.iter().copied())
            // A list that is older than the job cannot know what the job is for.
            .filter(|placed| placed.job.is_live() && placed.job.created_at < as_of)
            .collect();
        for placed in unknown {
            if self.may_end(placed.job.system, &placed.job.key) {
                self.stop(placed, "no formation wants it");
            }
        }
    }

    /// Asks again where a job goes on running.
    fn stop_again(&mut self) {
        let deaf: Vec<_> = self
            .jobs
            .values()
            .flatten()
            .copied()
            .filter(|placed| placed.job.state != State::Down)
            .filter_map(|placed| Some((placed, placed.job.asked_to_stop? + ASK_AGAIN)))
            .collect();
        for (placed, again) in deaf {
            if again <= self.now {
                self.stop(placed, "it was asked to stop and still runs");
            } else {
                self.wake_at(again);
            }
        }
    }

    /// Whether a job may be stopped so that none is left of its formation: always, unless the platform needs one of
    /// its kind and no other release's is up. One that cannot come up beside it is given way.
    fn may_end(&self, needed: bool, key: &Key) -> bool {
        !needed
            || self.releases_wanted(key).any(|(formation, _)| {
                let release = &formation.release.id;
                if *release == key.release {
                    return false;
                }
                let process = formation.release.processes.get(&key.process_type);
                let up = |placed: &Placed<'_>| placed.job.is_live() && placed.job.state == State::Up;
                process.is_some_and(cannot_share)
                    || self
                        .alike(key)
                        .any(|(other, placed)| other.release == *release && up(placed))
            })
    }

    /// The formations of all releases that want jobs of this app and type, and how many.
    fn releases_wanted<'s>(&'s self, key: &'s Key) -> impl Iterator<Item = (&'s ExpandedFormation, u32)> {
        let of_app = self
            .desired
            .formations
            .range((key.app.clone(), String::new())..)
            .take_while(|((app, _), _)| *app == key.app);
        of_app
            .map(|(_, formation)| {
                let n = formation.processes.get(&key.process_type);
                (formation, n.copied().unwrap_or(0))
            })
            .filter(|(_, n)| *n > 0)
    }

    /// All releases' jobs of this app and type.
    fn alike<'s>(&'s self, key: &'s Key) -> impl Iterator<Item = (&'s Key, &'s Placed<'a>)> {
        let alike = |other: &Key| other.app == key.app && other.process_type == key.process_type;
        self.jobs
            .iter()
            .filter(move |(other, _)| alike(other))
            .flat_map(|(other, jobs)| jobs.iter().map(move |placed| (*other, placed)))
    }

    fn formation(&mut self, formation: &ExpandedFormation, key: &Key, may_start: bool) {
        let count = formation.processes.get(&key.process_type).copied().unwrap_or(0);
        let process = formation.release.processes.get(&key.process_type);
        let omni = process.is_some_and(|process| process.omni);
        let tags = formation.tags.get(&key.process_type);
        let jobs = self.jobs.get(key).cloned().unwrap_or_default();
        let (mut kept, mut misplaced) = (Vec::new(), Vec::new());
        for placed in jobs.iter().filter(|placed| placed.job.is_live()) {
            let known = placed.host.is_ready();
            let fits = !known || place::tags_match(&placed.host.facts.tags, tags);
            if fits {
                kept.push(*placed);
            } else {
                misplaced.push(*placed);
            }
        }
        let process_moves = |process: &ProcessType| !process.omni && !keeps_volumes(process);
        let mut leaving: Vec<_> = if process.is_some_and(process_moves) {
            kept.extract_if(.., |placed| placed.host.facts.draining).collect()
        } else {
            Vec::new()
        };
        let needed = formation.app.is_system()
            || formation
                .app
                .meta
                .get(SYSTEM_CRITICAL)
                .is_some_and(|value| value == "true");
        if self.desired.fresh {
            for placed in &misplaced {
                self.stop(*placed, "its host has not the tags that are wanted");
            }
            if count > 0 || self.may_end(needed, key) {
                self.stop_surplus(kept.clone(), count, omni);
                self.stop_drained(leaving, &kept, count);
            }
        } else {
            // What is not stopped is still there.
            kept.append(&mut misplaced);
            kept.append(&mut leaving);
        }
        if !may_start || count == 0 {
            return;
        }
        let Some(process) = process else {
            return self.block(
                key,
                "the release has no such process type: scale it to 0 or release one that has",
            );
        };
        let wanted = Wanted {
            formation,
            key,
            tags,
            resources: &process.resources,
            count,
            indices: self.releases_wanted(key).map(|(_, n)| n).sum(),
            host_network: process.host_network,
        };
        if omni {
            let hosts: Vec<String> = self.fitting(tags).cloned().collect();
            for host in hosts {
                let here = |placed: &&Placed<'_>| *placed.host_id == host;
                let live = kept.iter().filter(here).count();
                let jobs: Vec<_> = jobs.iter().filter(here).copied().collect();
                self.start_missing(&wanted, &jobs, live, Some(&host));
            }
        } else {
            self.start_missing(&wanted, &jobs, kept.len(), None);
        }
    }

    fn fitting<'s>(&'s self, tags: Option<&'s Meta>) -> impl Iterator<Item = &'s String> {
        self.loads
            .keys()
            .filter(move |id| place::tags_match(&self.view.hosts()[*id].facts.tags, tags))
    }

    fn stop_surplus(&mut self, mut jobs: Vec<Placed<'_>>, count: u32, omni: bool) {
        // The first to go come first.
        jobs.sort_by_key(|placed| {
            let state = match placed.job.state {
                State::Pending => 0,
                _ if placed.host.shutting_down => 1,
                State::Starting => 2,
                _ => 3,
            };
            (
                !placed.job.lost,
                state,
                std::cmp::Reverse(placed.job.created_at),
                placed.id,
            )
        });
        let mut left: BTreeMap<&String, usize> = BTreeMap::new();
        for placed in &jobs {
            *left.entry(placed.host_id).or_default() += 1;
        }
        let mut all = jobs.len();
        for placed in jobs {
            let here = left.entry(placed.host_id).or_default();
            let surplus = if omni { *here } else { all } > count as usize;
            if surplus {
                *here -= 1;
                all -= 1;
                self.stop(placed, "there are more than wanted");
            }
        }
    }

    /// Stops jobs on hosts that are drained, as many as others are up in their place.
    fn stop_drained(&mut self, mut leaving: Vec<Placed<'_>>, kept: &[Placed<'_>], count: u32) {
        let up = kept.iter().filter(|placed| placed.job.state == State::Up).count();
        let needed = (count as usize).saturating_sub(up);
        // Those that are up stay the longest.
        leaving.sort_by_key(|placed| (placed.job.state != State::Up, placed.id));
        for placed in leaving.into_iter().skip(needed) {
            self.stop(placed, "its host is drained, and others have taken its place");
        }
    }

    /// Starts what is missing: `live` of `jobs` count.
    fn start_missing(
        &mut self,
        wanted: &Wanted<'_>,
        jobs: &[Placed<'_>],
        live: usize,
        host: Option<&String>,
    ) {
        let missing = (wanted.count as usize).saturating_sub(live);
        // Empty places, the latest first: jobs that ended by themselves and that no other has replaced.
        let replaced: BTreeSet<&String> = jobs
            .iter()
            .filter_map(|placed| placed.job.replaces.as_ref())
            .collect();
        let is_empty = |placed: &&Placed<'_>| {
            let job = placed.job;
            job.state == State::Down && job.asked_to_stop.is_none() && !replaced.contains(placed.id)
        };
        let mut places: Vec<_> = jobs.iter().filter(is_empty).collect();
        places.sort_by_key(|placed| (std::cmp::Reverse(placed.job.ended_at), placed.id));
        let mut taken: BTreeSet<u32> = self
            .alike(wanted.key)
            .filter(|(_, placed)| host.is_none_or(|host| host == placed.host_id))
            .filter_map(|(_, placed)| wanted.index_of(placed.job))
            .collect();
        for place in (0..missing).map(|place| places.get(place)) {
            let (restarts, not_before) = match place.map(|placed| placed.job) {
                Some(job) if job.lost => (job.restarts, self.now),
                Some(job) => {
                    let ended_at = job.ended_at.unwrap_or(self.now).min(self.now);
                    let restarts = backoff::next(job.restarts, job.started_at, ended_at);
                    (restarts, ended_at + backoff::delay(restarts))
                }
                None => (0, self.now),
            };
            if not_before > self.now {
                self.wake_at(not_before);
                continue;
            }
            match self.place(wanted, &taken, host) {
                Ok((host, volume_index)) => {
                    taken.insert(volume_index);
                    if let Some(load) = self.loads.get_mut(&host) {
                        load.add(wanted.key, wanted.resources);
                    }
                    self.plan.starts.push(Start {
                        key: wanted.key.clone(),
                        host,
                        volume_index,
                        restarts,
                        replaces: place.map(|placed| placed.id.clone()),
                    });
                }
                Err(reason) => return self.block(wanted.key, reason),
            }
        }
    }

    /// Whether no job that is to go first has the host's ports.
    fn has_room(&self, wanted: &Wanted<'_>, host: &String) -> bool {
        let in_the_way = |other: &Key, placed: &Placed<'_>| {
            let job = placed.job;
            let goes = job.asked_to_stop.is_some() || other.release != wanted.key.release;
            placed.host_id == host && job.host_network && job.state != State::Down && goes
        };
        !wanted.host_network
            || !self
                .alike(wanted.key)
                .any(|(other, placed)| in_the_way(other, placed))
    }

    /// A host and, for a job with volumes, their index: where volumes are already, else the best host.
    fn place(
        &self,
        wanted: &Wanted<'_>,
        taken: &BTreeSet<u32>,
        host: Option<&String>,
    ) -> Result<(String, u32), &'static str> {
        let fits = |id: &&String| host.is_none_or(|host| host == *id);
        let hosts: BTreeSet<&String> = self.fitting(wanted.tags).filter(fits).collect();
        let best = |hosts: &BTreeSet<&String>| {
            let loads = self.loads.iter().filter(|(id, _)| hosts.contains(id));
            place::best(loads, wanted.key, wanted.resources).cloned()
        };
        if hosts.is_empty() {
            return Err(if self.loads.is_empty() {
                "no host is ready"
            } else {
                "no host that is ready has the tags wanted"
            });
        }
        let hosts: BTreeSet<&String> = hosts.into_iter().filter(|id| self.has_room(wanted, id)).collect();
        if hosts.is_empty() {
            return Err("its ports are in use by a job of another release, or by one that is stopping");
        }
        let Some(path) = wanted.volume_path() else {
            return best(&hosts).map(|host| (host, 0)).ok_or("no host is ready");
        };
        let mut new = None;
        for index in (0..wanted.indices).filter(|index| !taken.contains(index)) {
            let volume = volume_id(&wanted.key.app, &wanted.key.process_type, path, index);
            let owners =
                self.view.hosts().iter().filter(|(id, owner)| {
                    host.is_none_or(|host| host == *id) && owner.volumes.contains(&volume)
                });
            let owners: Vec<&String> = owners.map(|(id, _)| id).collect();
            match owners.iter().find(|id| hosts.contains(*id)) {
                Some(owner) => return Ok(((*owner).clone(), index)),
                None if owners.is_empty() && new.is_none() => new = Some(index),
                None => {}
            }
        }
        match new {
            Some(index) => best(&hosts).map(|host| (host, index)).ok_or("no host is ready"),
            None => Err("its volumes are in use by jobs that are stopping, or on hosts that are not ready"),
        }
    }
}

/// Whether old and new jobs of a type cannot be there side by side. The controller's deployments know the same rule.
fn cannot_share(process: &ProcessType) -> bool {
    process.host_network || keeps_volumes(process)
}

/// Whether its jobs have data on their hosts that outlive them.
fn keeps_volumes(process: &ProcessType) -> bool {
    process.volumes.iter().any(|volume| !volume.delete_on_stop)
}

/// One process type of a formation.
struct Wanted<'a> {
    formation: &'a ExpandedFormation,
    key: &'a Key,
    tags: Option<&'a Meta>,
    resources: &'a Resources,
    /// How many: altogether, or on each host.
    count: u32,
    /// How many all releases together want: that many sets of volumes there are.
    indices: u32,
    /// Its ports are its host's own.
    host_network: bool,
}

impl<'a> Wanted<'a> {
    fn volume_path(&self) -> Option<&'a str> {
        let process = self.formation.release.processes.get(&self.key.process_type)?;
        process.volumes.first().map(|volume| volume.path.as_str())
    }

    /// The index of the volumes that a job of this kind uses, unless it is over.
    fn index_of(&self, job: &Job) -> Option<u32> {
        let path = self.volume_path().filter(|_| job.state != State::Down)?;
        let volume = |index: &u32| volume_id(&self.key.app, &self.key.process_type, path, *index);
        (0..self.indices).find(|index| job.volumes.contains(&volume(index)))
    }
}
