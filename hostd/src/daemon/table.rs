//! All jobs of the host, and the stream of what happens to them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flynn_api::host::{ActiveJob, Job, JobEvent, JobEventKind, JobState, UserNamespace};
use flynn_api::{Error, Result, redact};
use tokio::sync::broadcast;

use crate::control::Request;
use crate::status::Status;

/// Events that a slow listener may be behind; one that is further behind is cut off and starts over.
const EVENTS: usize = 1024;

/// One job.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) job: Arc<Job>,
    pub(super) status: Status,
    pub(super) ports: Vec<u16>,
    /// None before its start.
    pub(super) user_namespace: Option<UserNamespace>,
    /// Whether somebody in this daemon looks after it: starts it or follows its supervisor.
    pub(super) attended: bool,
}

impl Entry {
    /// Whether the job's supervisor, which may be of an earlier version, knows of this.
    pub(super) fn understands(&self, request: &Request) -> Result<()> {
        if self.status.protocol >= request.since() {
            return Ok(());
        }
        Err(Error::conflict(format!(
            "job {} was started by an earlier version of flynn-host, which cannot do this: it can when it is started anew",
            self.job.id
        )))
    }
}

/// The jobs by id.
#[derive(Debug)]
pub(super) struct Table {
    host_id: String,
    entries: Mutex<BTreeMap<String, Entry>>,
    events: broadcast::Sender<JobEvent>,
}

impl Table {
    pub(super) fn new(host_id: &str) -> Self {
        let events = broadcast::Sender::new(EVENTS);
        Self {
            host_id: host_id.to_owned(),
            entries: Mutex::default(),
            events,
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job unless its id is taken; gives who has it then.
    pub(super) fn insert(&self, entry: Entry, event: Option<JobEventKind>) -> Result<(), Box<Entry>> {
        let mut entries = self.entries();
        if let Some(there) = entries.get(&entry.job.id) {
            return Err(Box::new(there.clone()));
        }
        if let Some(event) = event {
            self.announce(event, &entry);
        }
        entries.insert(entry.job.id.clone(), entry);
        Ok(())
    }

    pub(super) fn get(&self, id: &str) -> Option<Entry> {
        self.entries().get(id).cloned()
    }

    pub(super) fn all(&self) -> Vec<Entry> {
        self.entries().values().cloned().collect()
    }

    /// Changes an entry without telling anyone.
    pub(super) fn note(&self, id: &str, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries().get_mut(id) {
            change(entry);
        }
    }

    /// Takes a job's new status over and tells of the difference.
    pub(super) fn update(&self, id: &str, status: Status) {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(id) else { return };
        let event = event_of(&entry.status, &status);
        // A supervisor may not have heard of it yet.
        let stop_requested = entry.status.stop_requested;
        entry.status = status;
        entry.status.stop_requested |= stop_requested;
        if let Some(event) = event {
            self.announce(event, entry);
        }
    }

    /// Takes a job's changed description over and tells of it.
    pub(super) fn replace(&self, id: &str, job: Arc<Job>) {
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(id) {
            entry.job = job;
            self.announce(JobEventKind::Update, entry);
        }
    }

    /// Tells of something that does not show in a job's status.
    pub(super) fn tell(&self, id: &str, event: JobEventKind) {
        let entries = self.entries();
        if let Some(entry) = entries.get(id) {
            self.announce(event, entry);
        }
    }

    /// Forgets a job.
    pub(super) fn remove(&self, id: &str) {
        let mut entries = self.entries();
        if let Some(entry) = entries.remove(id) {
            self.announce(JobEventKind::Cleanup, &entry);
        }
    }

    /// Under the table's lock, so that events come in the order of what they tell of.
    fn announce(&self, event: JobEventKind, entry: &Entry) {
        let job = self.active(entry);
        // Without listeners there is nobody to tell.
        let _ = self.events.send(JobEvent {
            event,
            job_id: entry.job.id.clone(),
            job,
        });
    }

    /// All jobs as events of now, and the events from now on.
    pub(super) fn subscribe(&self) -> (Vec<JobEvent>, broadcast::Receiver<JobEvent>) {
        let entries = self.entries();
        let current = |entry: &Entry| JobEvent {
            event: JobEventKind::Current,
            job_id: entry.job.id.clone(),
            job: self.active(entry),
        };
        (entries.values().map(current).collect(), self.events.subscribe())
    }

    /// The job as the API shows it: without secrets.
    pub(super) fn active(&self, entry: &Entry) -> ActiveJob {
        let status = &entry.status;
        let mut job = Job::clone(&entry.job);
        job.config.env = redact::env(&job.config.env);
        for manifest in job
            .artifacts
            .iter_mut()
            .filter_map(|artifact| artifact.manifest.as_mut())
        {
            for entrypoint in manifest.entrypoints.values_mut() {
                entrypoint.env = redact::env(&entrypoint.env);
            }
        }
        let unsigned = |pid: i32| u32::try_from(pid).ok();
        ActiveJob {
            job,
            status: status.state,
            host_id: self.host_id.clone(),
            internal_ip: status.address,
            ports: entry.ports.clone(),
            user_namespace: entry.user_namespace.clone(),
            pid: status.pid.and_then(unsigned),
            supervisor_pid: status.supervisor.and_then(|supervisor| unsigned(supervisor.pid)),
            created_at: status.created_at,
            started_at: status.started_at,
            ended_at: status.ended_at,
            exit_status: status.exit_status,
            error: status.error.clone(),
            restarts: status.restarts,
            oom_killed: status.oom_killed,
            healthy: status.healthy,
            paused: status.paused,
        }
    }

    /// The addresses of jobs that are not over.
    pub(super) fn addresses(&self) -> Vec<(Ipv4Addr, String)> {
        let live = |entry: &&Entry| !entry.status.state.is_terminal();
        let address = |entry: &Entry| Some((entry.status.address?, entry.job.id.clone()));
        self.entries().values().filter(live).filter_map(address).collect()
    }
}

/// What a change of status is called; none for one that nobody needs to hear of.
fn event_of(old: &Status, new: &Status) -> Option<JobEventKind> {
    match (old.state, new.state) {
        (old, new) if old.is_terminal() && new.is_terminal() => None,
        (_, JobState::Failed) => Some(JobEventKind::Error),
        (_, new) if new.is_terminal() => Some(JobEventKind::Stop),
        (old, JobState::Running) if old != JobState::Running => Some(JobEventKind::Start),
        _ if old.restarts != new.restarts || old.healthy != new.healthy || old.paused != new.paused => {
            Some(JobEventKind::Update)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn each_change_has_its_name() {
        use JobState::{Crashed, Done, Failed, Running, Starting};
        let at = |state| Status {
            state,
            ..Status::new(Timestamp::UNIX_EPOCH, String::new())
        };
        assert_eq!(event_of(&at(Starting), &at(Running)), Some(JobEventKind::Start));
        assert_eq!(event_of(&at(Running), &at(Crashed)), Some(JobEventKind::Stop));
        assert_eq!(event_of(&at(Starting), &at(Failed)), Some(JobEventKind::Error));
        assert_eq!(event_of(&at(Done), &at(Crashed)), None);
        let healthy = Status {
            healthy: true,
            ..at(Running)
        };
        assert_eq!(event_of(&at(Running), &healthy), Some(JobEventKind::Update));
        assert_eq!(event_of(&healthy, &healthy), None);
    }

    #[test]
    fn events_show_no_secrets() {
        let table = Table::new("one");
        let mut job = Job {
            id: "one-1".into(),
            ..Job::default()
        };
        job.config.env.insert("AUTH_KEY".into(), "hush".into());
        let status = Status::new(Timestamp::UNIX_EPOCH, String::new());
        let entry = Entry {
            job: Arc::new(job),
            status,
            ports: Vec::new(),
            user_namespace: None,
            attended: false,
        };
        table.insert(entry.clone(), None).unwrap();
        assert!(table.insert(entry, None).is_err());
        let (current, _) = table.subscribe();
        let shown = serde_json::to_string(&current).unwrap();
        assert!(shown.contains("AUTH_KEY") && !shown.contains("hush"), "{shown}");
    }
}
