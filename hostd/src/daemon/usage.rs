//! What jobs use: for Prometheus, and as events when they have not enough.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::host::{JobEventKind, JobState, label};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use super::Daemon;
use super::table::Entry;
use crate::cgroup::{Group, Usage};

/// Between looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// A family's name, kind, help, and its value for a job.
type Family = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Usage) -> Option<f64>,
);

#[expect(clippy::cast_precision_loss, reason = "Prometheus has no other numbers")]
const FAMILIES: [Family; 9] = [
    ("cpu_seconds_total", "counter", "Time on cores", |usage| {
        seconds(usage.cpu)
    }),
    (
        "cpu_throttled_seconds_total",
        "counter",
        "Time that the job was kept from cores by its quota",
        |usage| seconds(usage.throttled),
    ),
    ("memory_bytes", "gauge", "Memory in use", |usage| {
        Some(usage.memory? as f64)
    }),
    (
        "memory_peak_bytes",
        "gauge",
        "The most memory that was in use",
        |usage| Some(usage.memory_peak? as f64),
    ),
    (
        "memory_wait_seconds_total",
        "counter",
        "Time that processes of the job waited for memory",
        |usage| seconds(usage.memory_waits),
    ),
    (
        "oom_kills_total",
        "counter",
        "Processes of the job that were killed for want of memory",
        |usage| Some(usage.oom_kills? as f64),
    ),
    ("pids", "gauge", "Processes and threads", |usage| {
        Some(usage.pids? as f64)
    }),
    (
        "io_read_bytes_total",
        "counter",
        "Bytes read from disks",
        |usage| Some(usage.io_read? as f64),
    ),
    (
        "io_written_bytes_total",
        "counter",
        "Bytes written to disks",
        |usage| Some(usage.io_written? as f64),
    ),
];

fn seconds(time: Option<Duration>) -> Option<f64> {
    Some(time?.as_secs_f64())
}

impl Daemon {
    fn group(&self, entry: &Entry) -> Group {
        Group::of(&self.hierarchies, entry.job.partition, &entry.job.id)
    }

    fn running(&self) -> Vec<Entry> {
        let mut entries = self.table.all();
        entries.retain(|entry| entry.status.state == JobState::Running);
        entries
    }

    /// What each running job uses, for Prometheus. Reads files.
    pub(super) fn usage_metrics(&self) -> String {
        let running = self.running();
        let used: Vec<_> = running
            .iter()
            .map(|entry| {
                let name = |label| entry.job.metadata.get(label).map_or("", String::as_str);
                let labels = format!(
                    "job={:?},app={:?},process_type={:?}",
                    entry.job.id,
                    name(label::APP_NAME),
                    name(label::PROCESS_TYPE)
                );
                (labels, self.group(entry).usage())
            })
            .collect();
        let mut text = String::new();
        for (name, kind, help, value) in FAMILIES {
            let _ = writeln!(
                text,
                "# HELP flynn_job_{name} {help}.\n# TYPE flynn_job_{name} {kind}"
            );
            for (labels, usage) in &used {
                if let Some(value) = value(usage) {
                    let _ = writeln!(text, "flynn_job_{name}{{{labels}}} {value}");
                }
            }
        }
        text
    }

    fn look(&self) -> BTreeMap<String, Usage> {
        let running = self.running().into_iter();
        running
            .map(|entry| (entry.job.id.clone(), self.group(&entry).usage()))
            .collect()
    }
}

/// Tells, for ever, when jobs have not enough.
pub(super) async fn watch(daemon: Arc<Daemon>) {
    let look = async || {
        let looking = Arc::clone(&daemon);
        spawn_blocking(move || looking.look()).await
    };
    // What was before this daemon, others have told.
    let there = look().await.unwrap_or_default().into_iter();
    let mut before: BTreeMap<String, (Usage, Want)> =
        there.map(|(id, usage)| (id, (usage, Want::default()))).collect();
    let mut looked = Instant::now();
    loop {
        sleep(INTERVAL).await;
        let Ok(now) = look().await else { continue };
        let passed = std::mem::replace(&mut looked, Instant::now()).elapsed();
        let mut after = BTreeMap::new();
        for (id, usage) in now {
            let (old, want) = before.remove(&id).unwrap_or_default();
            let (events, want) = want.next(&old, &usage, passed);
            for event in events {
                daemon.table.tell(&id, event);
            }
            after.insert(id, (usage, want));
        }
        before = after;
    }
}

/// What a job has not enough of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Want {
    cores: bool,
    memory: bool,
}

impl Want {
    /// What is to be told, by what was used before and is now, some time later.
    fn next(self, before: &Usage, now: &Usage, passed: Duration) -> (Vec<JobEventKind>, Self) {
        let share = |before: Option<Duration>, now: Option<Duration>| {
            let grown = now.unwrap_or_default().saturating_sub(before.unwrap_or_default());
            grown.as_secs_f64() / passed.as_secs_f64().max(f64::EPSILON)
        };
        let want = Self {
            cores: share(before.throttled, now.throttled) > 0.25,
            memory: share(before.memory_waits, now.memory_waits) > 0.1,
        };
        let mut events = Vec::new();
        if now.oom_kills.unwrap_or(0) > before.oom_kills.unwrap_or(0) {
            events.push(JobEventKind::Oom);
        }
        if want.cores && !self.cores {
            events.push(JobEventKind::Throttled);
        }
        if want.memory && !self.memory {
            events.push(JobEventKind::Pressure);
        }
        (events, want)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_want_is_told_once() {
        let used = |throttled, waits, kills| Usage {
            throttled: Some(Duration::from_secs(throttled)),
            memory_waits: Some(Duration::from_secs(waits)),
            oom_kills: Some(kills),
            ..Usage::default()
        };
        let second = |count| Duration::from_secs(count);
        let (events, want) = Want::default().next(&used(0, 0, 0), &used(2, 0, 1), second(5));
        assert_eq!(events, [JobEventKind::Oom, JobEventKind::Throttled]);
        let (events, want) = want.next(&used(2, 0, 1), &used(4, 1, 1), second(5));
        assert_eq!(events, [JobEventKind::Pressure]);
        let (events, want) = want.next(&used(4, 1, 1), &used(5, 1, 1), second(5));
        assert_eq!((events, want), (Vec::new(), Want::default()));
        // A job that is counted anew.
        assert!(want.next(&used(5, 1, 1), &used(0, 0, 0), second(5)).0.is_empty());
    }
}
