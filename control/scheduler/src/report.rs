//! What the controller is told of jobs. Pure: the outbox holds, for each job, the latest report that the controller
//! has not taken yet.

use std::collections::{BTreeMap, VecDeque};

use flynn_api::controller::{Job as Report, JobState};
use jiff::{SignedDuration, Timestamp};

use crate::view::{Job, State, View};

/// Reports that may wait. Beyond, the oldest are let go; the comparison with `/active-jobs` finds them again.
pub const MAX_WAITING: usize = 10_000;

/// How long the controller may believe in a job that no host knows.
const UNKNOWN_FOR: SignedDuration = SignedDuration::from_secs(30);

/// A job as the controller shall know it.
pub fn report(host_id: &str, id: &str, job: &Job) -> Report {
    let state = match (job.state, job.asked_to_stop) {
        (State::Down, _) => JobState::Down,
        (_, Some(_)) => JobState::Stopping,
        (State::Pending, None) => JobState::Pending,
        (State::Starting, None) => JobState::Starting,
        (State::Up, None) => JobState::Up,
    };
    // One that was given up together with its host, and that is back with it, begins anew for the controller.
    let back = u32::from(job.lost && job.state != State::Down);
    let restarts = job
        .restarts
        .saturating_add(job.supervisor_restarts)
        .saturating_add(back);
    Report {
        id: id.to_owned(),
        uuid: uuid_of(id).to_owned(),
        host_id: host_id.to_owned(),
        app_id: job.key.app.clone(),
        release_id: job.key.release.clone(),
        process_type: job.key.process_type.clone(),
        state,
        args: job.args.clone(),
        exit_status: job.exit_status,
        host_error: job.error.clone(),
        restarts: Some(i32::try_from(restarts).unwrap_or(i32::MAX)),
        created_at: Some(job.created_at),
        ..Report::default()
    }
}

/// The UUID in `<host id>-<uuid>`; host ids have no dash.
fn uuid_of(id: &str) -> &str {
    id.split_once('-').map_or(id, |(_, uuid)| uuid)
}

/// Jobs that the controller believes in and no host knows: they are over. Only hosts whose jobs are known count.
pub fn unknown(active: Vec<Report>, view: &View, now: Timestamp) -> Vec<Report> {
    let gone = |report: &Report| {
        let seen = view.job(&report.id).is_some();
        let host_known = match view.hosts().get(&report.host_id) {
            Some(host) => host.listed || host.is_gone(),
            None => view.hosts_known,
        };
        let old = report
            .updated_at
            .or(report.created_at)
            .is_none_or(|at| at + UNKNOWN_FOR < now);
        !seen && host_known && old && !report.host_id.is_empty()
    };
    let down = |report: Report| Report {
        state: JobState::Down,
        host_error: Some("no host knows it any more".into()),
        ..report
    };
    active.into_iter().filter(gone).map(down).collect()
}

/// Reports on their way to the controller.
#[derive(Debug, Default)]
pub struct Outbox {
    taken: BTreeMap<String, Report>,
    waiting: BTreeMap<String, Report>,
    order: VecDeque<String>,
    /// Reports let go, because too many waited or the controller would not take them.
    pub dropped: u64,
}

impl Outbox {
    /// Compares with what the controller has been told, and queues what it has not.
    pub fn update(&mut self, view: &View) {
        self.taken.retain(|id, _| view.job(id).is_some());
        for (host_id, id, job) in view.jobs() {
            self.queue(report(host_id, id, job));
        }
    }

    /// Queues one report, unless the controller has it. States only go forward there: a job that has been up and that
    /// its supervisor restarts is still reported as up. But one that was over, and that its host has brought back after
    /// all, is there again: `restarts` has grown.
    pub fn queue(&mut self, mut report: Report) {
        let told = self
            .taken
            .get(&report.id)
            .into_iter()
            .chain(self.waiting.get(&report.id))
            .filter(|told| told.state != JobState::Down || told.restarts >= report.restarts);
        report.state = told.map(|told| told.state).fold(report.state, JobState::max);
        if self.taken.get(&report.id) == Some(&report) {
            return;
        }
        let id = report.id.clone();
        if self.waiting.insert(id.clone(), report).is_none() {
            self.order.push_back(id);
        }
        while self.waiting.len() > MAX_WAITING {
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            self.waiting.remove(&oldest);
            self.dropped += 1;
        }
    }

    /// The report to send next. It stays until [`Outbox::taken`] or [`Outbox::refused`].
    pub fn first(&self) -> Option<&Report> {
        self.order.front().and_then(|id| self.waiting.get(id))
    }

    /// The controller has taken this report.
    pub fn taken(&mut self, report: Report) {
        self.settle(&report);
        self.taken.insert(report.id.clone(), report);
    }

    /// The controller will never take this report.
    pub fn refused(&mut self, report: Report) {
        self.dropped += 1;
        self.taken(report);
    }

    /// Others first: this one could not be sent now.
    pub fn postpone(&mut self) {
        self.order.rotate_left(usize::from(!self.order.is_empty()));
    }

    /// Reports that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn settle(&mut self, report: &Report) {
        // A newer report may have come while this one was on its way.
        if self.waiting.get(&report.id) == Some(report) {
            self.waiting.remove(&report.id);
            self.order.retain(|id| *id != report.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str, state: JobState) -> Report {
        Report {
            id: id.into(),
            host_id: "h".into(),
            state,
            ..Report::default()
        }
    }

    #[test]
    fn the_latest_wins_and_nothing_is_sent_twice() {
        let mut outbox = Outbox::default();
        outbox.queue(job("h-1", JobState::Starting));
        let sent = outbox.first().unwrap().clone();
        outbox.queue(job("h-1", JobState::Up));
        outbox.taken(sent);
        assert_eq!(
            outbox.first().unwrap().state,
            JobState::Up,
            "what came meanwhile is not lost"
        );
        outbox.taken(job("h-1", JobState::Up));
        outbox.queue(job("h-1", JobState::Up));
        assert!(outbox.is_empty());
    }

    #[test]
    fn states_go_forward() {
        let mut outbox = Outbox::default();
        outbox.queue(job("h-1", JobState::Up));
        outbox.taken(job("h-1", JobState::Up));
        outbox.queue(Report {
            restarts: Some(1),
            ..job("h-1", JobState::Starting)
        });
        assert_eq!(
            outbox.first().map(|report| (report.state, report.restarts)),
            Some((JobState::Up, Some(1)))
        );
    }

    #[test]
    fn a_job_that_its_host_brings_back_is_there_again() {
        let mut outbox = Outbox::default();
        let with = |state, restarts| Report {
            restarts: Some(restarts),
            ..job("h-1", state)
        };
        outbox.taken(with(JobState::Down, 1));
        outbox.queue(with(JobState::Starting, 1));
        assert!(outbox.is_empty(), "that is an old word");
        outbox.queue(with(JobState::Starting, 2));
        assert_eq!(
            outbox.first().map(|report| report.state),
            Some(JobState::Starting)
        );
    }

    #[test]
    fn it_is_bounded() {
        let mut outbox = Outbox::default();
        for n in 0..MAX_WAITING + 5 {
            outbox.queue(job(&format!("h-{n}"), JobState::Up));
        }
        assert_eq!((outbox.len(), outbox.dropped), (MAX_WAITING, 5));
        assert_eq!(outbox.first().unwrap().id, "h-5");
    }

    #[test]
    fn jobs_of_unlisted_hosts_are_believed_in() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let mut view = View::default();
        let active = vec![job("h-1", JobState::Up)];
        assert!(
            unknown(active.clone(), &view, now).is_empty(),
            "discoverd has not been asked"
        );
        view.registered(&[("h".to_owned(), false)].into(), now);
        assert!(
            unknown(active.clone(), &view, now).is_empty(),
            "the host has not been asked"
        );
        let asked = view.ask();
        view.list("h", asked, &BTreeMap::new(), now);
        assert_eq!(unknown(active, &view, now)[0].state, JobState::Down);
    }
}
