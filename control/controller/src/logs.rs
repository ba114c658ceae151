//! The log of an app: the logs of its jobs, each on its host, as one.
//!
//! The past is fetched from every job and put in order by time. When following, each job is followed by a task of
//! its own; those tasks share one short queue, so a slow reader slows them down instead of filling memory.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::controller::{EventKind, Job, JobState};
use flynn_api::host::LogLine;
use flynn_api::{Error, ErrorCode, Result};
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::data::events::Filter;
use crate::data::{apps, jobs};
use crate::hosts::{Host, Hosts};
use crate::service::Shared;

/// Lines of the past that one call gives, at most.
pub(crate) const MAX_LINES: u32 = 10_000;
/// Jobs whose logs are looked at, at most: those that run, then the newest of the others.
const MAX_JOBS: usize = 100;
/// Lines on their way to a reader.
const QUEUE: usize = 256;
/// Lines of each job that are read twice, at least, when its log is followed.
const OVERLAP: u32 = 1000;
/// How long one host may take for its part of the past.
const PAST_TIMEOUT: Duration = Duration::from_secs(10);
/// Before a host that broke off is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// Attempts in a row to follow a job whose host does not answer.
const MAX_RETRIES: u32 = 30;

/// Which lines.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Of the job with this UUID only.
    pub(crate) job: Option<String>,
    /// Of this process type only.
    pub(crate) process_type: Option<String>,
    /// How many of the past.
    pub(crate) lines: u32,
    /// And what comes after.
    pub(crate) follow: bool,
}

impl Wanted {
    fn includes(&self, job: &Job) -> bool {
        self.job.as_ref().is_none_or(|uuid| *uuid == job.uuid)
            && self
                .process_type
                .as_ref()
                .is_none_or(|kind| *kind == job.process_type)
            && !job.host_id.is_empty()
    }
}

type Lines = Pin<Box<dyn Stream<Item = LogLine> + Send>>;

/// The lines, oldest first.
pub(crate) async fn stream(shared: &Arc<Shared>, app: &apps::Found, wanted: Wanted) -> Result<Lines> {
    // New jobs are listened for before the present ones are listed: none falls between.
    let filter = Filter {
        app_id: Some(app.id),
        kinds: vec![EventKind::Job],
        object_id: None,
    };
    let changes = shared
        .feed
        .subscribe(shared.feed.newest().await?, filter, Vec::new());
    let mut jobs = jobs::of_app(&shared.database.client().await?, app.id).await?;
    jobs.retain(|job| wanted.includes(job));
    if jobs.is_empty() && wanted.job.is_some() {
        return Err(Error::not_found(
            "job",
            format!("of that id with a log in the app {}", app.app.name),
        ));
    }
    jobs.sort_by_key(|job| job.state == JobState::Down);
    jobs.truncate(MAX_JOBS);
    let hosts = shared.hosts.list().await?;
    let mut tails = Vec::with_capacity(jobs.len());
    let mut past = Vec::new();
    // Where following begins is found by times: enough lines to tell those of the same time apart.
    let lines = if wanted.follow {
        wanted.lines.max(OVERLAP)
    } else {
        wanted.lines
    };
    let fetches: Vec<_> = jobs
        .into_iter()
        .map(|job| {
            let host = hosts.iter().find(|host| host.id == job.host_id).cloned();
            fetch(shared.hosts.clone(), host, job, lines)
        })
        .collect();
    let mut fetches = futures::stream::iter(fetches).buffer_unordered(8);
    while let Some((job, lines)) = fetches.next().await {
        tails.push((Tail::of(&lines), job));
        past.extend(lines);
        keep_newest(&mut past, wanted.lines);
    }
    keep_newest(&mut past, wanted.lines);
    let past = futures::stream::iter(past);
    if !wanted.follow {
        return Ok(past.boxed());
    }
    let (sender, receiver) = mpsc::channel(QUEUE);
    let follower = Follower {
        shared: Arc::clone(shared),
        wanted,
        sender,
    };
    tokio::spawn(follower.run(tails, changes));
    Ok(past
        .chain(tokio_stream::wrappers::ReceiverStream::new(receiver))
        .boxed())
}

/// Sorts by time, and drops the oldest beyond `count`.
fn keep_newest(lines: &mut Vec<LogLine>, count: u32) {
    // Stable: lines of one job keep their order where their times are equal.
    lines.sort_by_key(|line| line.timestamp);
    let surplus = lines
        .len()
        .saturating_sub(usize::try_from(count).unwrap_or(usize::MAX));
    lines.drain(..surplus);
}

/// A job's last lines; none when its host is gone or slow.
async fn fetch(hosts: Hosts, host: Option<Host>, job: Job, lines: u32) -> (Job, Vec<LogLine>) {
    let read = async {
        let Some(host) = host else { return Ok(Vec::new()) };
        let mut stream = hosts.client(&host)?.log(&job.id, Some(lines), false).await?;
        let mut past = Vec::new();
        while let Some(line) = stream.next().await {
            past.push(named(line?.1, &job));
        }
        Ok::<_, Error>(past)
    };
    let past = match tokio::time::timeout(PAST_TIMEOUT, read).await {
        Ok(Ok(past)) => past,
        Ok(Err(why)) => {
            tracing::debug!(%why, job = %job.id, "a job's log cannot be read");
            Vec::new()
        }
        Err(_) => {
            tracing::debug!(job = %job.id, "a job's log took too long");
            Vec::new()
        }
    };
    (job, past)
}

fn named(mut line: LogLine, job: &Job) -> LogLine {
    line.job_id.clone_from(&job.id);
    line.process_type.clone_from(&job.process_type);
    line
}

/// How far a job's log has been read: the time of its last line, and how many lines carry that time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tail {
    last: Option<jiff::Timestamp>,
    count: usize,
}

impl Tail {
    fn of(lines: &[LogLine]) -> Self {
        let mut tail = Self::default();
        for line in lines {
            tail.advance(line);
        }
        tail
    }

    fn advance(&mut self, line: &LogLine) {
        if self.last == Some(line.timestamp) {
            self.count += 1;
        } else {
            *self = Self {
                last: Some(line.timestamp),
                count: 1,
            };
        }
    }
}

/// Leaves out the lines that have been read before, when a log is read again from a little earlier.
struct Skip {
    tail: Tail,
    seen: usize,
}

impl Skip {
    fn new(tail: Tail) -> Self {
        Self { tail, seen: 0 }
    }

    fn is_new(&mut self, line: &LogLine) -> bool {
        match self.tail.last {
            Some(last) if line.timestamp < last => false,
            Some(last) if line.timestamp == last && self.seen < self.tail.count => {
                self.seen += 1;
                false
            }
            _ => true,
        }
    }
}

/// Follows the jobs of an app, those to come too.
struct Follower {
    shared: Arc<Shared>,
    wanted: Wanted,
    sender: mpsc::Sender<LogLine>,
}

impl Follower {
    async fn run(self, tails: Vec<(Tail, Job)>, mut changes: crate::feed::Subscription) {
        let mut followed = BTreeSet::new();
        let mut tasks = JoinSet::new();
        for (tail, job) in tails {
            followed.insert(job.uuid.clone());
            if job.state != JobState::Down {
                tasks.spawn(follow(self.shared.hosts.clone(), job, tail, self.sender.clone()));
            }
        }
        loop {
            tokio::select! {
                event = changes.next() => {
                    let Some(event) = event else { return };
                    let Ok(job) = serde_json::from_value::<Job>(event.data) else { continue };
                    if self.wanted.includes(&job) && followed.insert(job.uuid.clone()) {
                        tasks.spawn(follow(self.shared.hosts.clone(), job, Tail::default(), self.sender.clone()));
                    }
                }
                // Ended tasks are put away.
                Some(_) = tasks.join_next() => {}
                // The reader has gone; its tasks go with the set.
                () = self.sender.closed() => return,
            }
        }
    }
}

/// Follows one job until its log ends, its host forgets it, or nobody reads any more.
async fn follow(hosts: Hosts, job: Job, mut tail: Tail, sender: mpsc::Sender<LogLine>) {
    let mut failures = 0;
    while failures < MAX_RETRIES {
        let result = async {
            let host = hosts.find(&job.host_id).await?;
            let mut stream = hosts.client(&host)?.log(&job.id, Some(MAX_LINES), true).await?;
            let mut skip = Skip::new(tail);
            while let Some(line) = stream.next().await {
                let line = named(line?.1, &job);
                if skip.is_new(&line) {
                    tail.advance(&line);
                    failures = 0;
                    if sender.send(line).await.is_err() {
                        break;
                    }
                }
            }
            Ok::<_, Error>(())
        };
        match result.await {
            Ok(()) => return,
            // The host may not have made the job's log yet.
            Err(why) if why.code == ErrorCode::NotFound && failures > 5 => return,
            Err(why) => tracing::debug!(%why, job = %job.id, "a job's log broke off"),
        }
        failures += 1;
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::host::LogStream;
    use proptest::prelude::*;

    fn line(second: i64, msg: &str) -> LogLine {
        LogLine {
            timestamp: jiff::Timestamp::from_second(second).unwrap(),
            stream: LogStream::Stdout,
            msg: msg.into(),
            job_id: String::new(),
            process_type: String::new(),
        }
    }

    #[test]
    fn the_newest_lines_of_all_jobs_in_order() {
        let mut lines = vec![line(3, "c"), line(1, "a"), line(2, "b"), line(3, "d")];
        keep_newest(&mut lines, 3);
        let text: String = lines.iter().map(|line| line.msg.as_str()).collect();
        assert_eq!(text, "bcd");
    }

    proptest! {
        /// Read up to any point, then read again from any earlier point: every line once.
        #[test]
        fn reading_on_neither_loses_nor_repeats(
            steps in proptest::collection::vec(0i64..2, 1..40), read in 0usize..40, again in 0usize..40
        ) {
            let mut second = 0;
            let lines: Vec<_> = steps.iter().enumerate().map(|(at, step)| {
                second += step;
                line(second, &at.to_string())
            }).collect();
            let read = read.min(lines.len());
            // A host's last n lines begin anywhere before what was read last; here at the beginning of a second.
            let mut again = again.min(read);
            while again > 0 && lines[again - 1].timestamp == lines[again.min(lines.len() - 1)].timestamp {
                again -= 1;
            }
            let mut skip = Skip::new(Tail::of(&lines[..read]));
            let rest: Vec<_> = lines[again..].iter().filter(|line| skip.is_new(line)).collect();
            prop_assert_eq!(rest, lines[read..].iter().collect::<Vec<_>>());
        }
    }
}
