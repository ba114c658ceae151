//! How sinks do, for those who ask.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use flynn_api::sink::{Sink, SinkStatus};

use super::window::Job;
use crate::logs::segment::{self, Position};

/// What a shipper has done so far.
#[derive(Debug, Default)]
pub(super) struct Progress {
    state: Mutex<State>,
    lines: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    connected: bool,
    error: Option<String>,
    connections: u64,
    /// How far each job's log was sent, and how far it is known to have been read.
    jobs: BTreeMap<Job, (Option<Position>, Option<Position>)>,
}

impl Progress {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connected(&self) {
        let mut state = self.state();
        state.connected = true;
        state.error = None;
        state.connections += 1;
    }

    pub(super) fn disconnected(&self, why: String) {
        let mut state = self.state();
        state.connected = false;
        state.error = Some(why);
    }

    pub(super) fn sent(&self, bytes: usize, records: u64) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.lines.fetch_add(records, Ordering::Relaxed);
    }

    pub(super) fn lost(&self, records: u64) {
        self.dropped.fetch_add(records, Ordering::Relaxed);
    }

    pub(super) fn moved(&self, job: &Job, sent: Option<Position>, read: Option<Position>) {
        self.state().jobs.insert(Job::clone(job), (sent, read));
    }

    pub(super) fn retain(&self, there: impl Fn(&Job) -> bool) {
        self.state().jobs.retain(|job, _| there(job));
    }

    /// Whether there is something in a job's log that is not known to have been read.
    pub(super) fn awaits(&self, jobs: &Path, job: &str) -> bool {
        let read = self.state().jobs.get(job).map(|(_, read)| *read);
        // One that it has not seen yet.
        read.is_none_or(|read| after(&jobs.join(job).join("log"), read) > 0)
    }

    pub(super) fn status(&self, sink: &Sink, jobs: &Path) -> SinkStatus {
        let sent: Vec<_> = {
            let state = self.state();
            let sent = state.jobs.iter().map(|(job, (sent, _))| (Job::clone(job), *sent));
            sent.collect()
        };
        let waiting = sent
            .into_iter()
            .map(|(job, sent)| after(&jobs.join(&*job).join("log"), sent));
        let waiting_bytes = waiting.sum();
        let state = self.state();
        SinkStatus {
            sink: sink.clone(),
            connected: state.connected,
            error: state.error.clone(),
            connections: state.connections,
            lines: self.lines.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dropped_lines: self.dropped.load(Ordering::Relaxed),
            waiting_bytes,
        }
    }
}

/// How many bytes a log has after a position.
fn after(log: &Path, position: Option<Position>) -> u64 {
    let segments = segment::list(log).unwrap_or_default().into_iter();
    let later = segments.filter(|segment| position.is_none_or(|position| *segment >= position.segment));
    later
        .map(|segment| {
            let size = std::fs::metadata(segment.path(log)).map_or(0, |metadata| metadata.len());
            let here = position.filter(|position| position.segment == segment);
            size.saturating_sub(here.map_or(0, |position| position.offset))
        })
        .sum()
}
