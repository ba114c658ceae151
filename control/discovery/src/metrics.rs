//! What `GET /metrics` shows, in Prometheus' text format.

use std::fmt::{Display, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use flynn_api::discovery::Stage;
use openraft::async_runtime::WatchReceiver as _;

use crate::members;
use crate::node::Node;

/// What is counted while it happens; everything else is looked up when somebody asks.
#[derive(Debug, Default)]
pub struct Metrics {
    /// From a write's proposal by this member, when it leads, until it is committed and applied.
    pub commits: Times,
    /// Changes of the leader that this member has seen.
    pub leader_changes: AtomicU64,
    /// Instances that this member, when it led, took out because they lived no more.
    pub expired: AtomicU64,
    /// DNS answers.
    pub dns: Arc<Codes>,
}

/// Durations, counted by how long they were.
#[derive(Debug, Default)]
pub struct Times {
    counts: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

/// Upper bounds, in microseconds.
const BOUNDS: [u64; 14] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    10_000_000,
];

impl Times {
    /// Counts one.
    pub fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let at = BOUNDS.partition_point(|bound| *bound < micros);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }
}

/// DNS answers by their code.
#[derive(Debug, Default)]
pub struct Codes([AtomicU64; 16]);

impl Codes {
    const NAMES: [&str; 16] = [
        "NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "YXDOMAIN", "YXRRSET", "NXRRSET",
        "NOTAUTH", "NOTZONE", "11", "12", "13", "14", "15",
    ];

    /// Counts these answers.
    pub fn add<'a>(&self, answers: impl IntoIterator<Item = &'a [u8]>) {
        let mut counts = [0; 16];
        for answer in answers {
            // The code is in the lower half of the fourth byte; those that take EDNS count by their lower bits.
            counts[usize::from(answer.get(3).copied().unwrap_or(0) & 0xf)] += 1;
        }
        for (sum, count) in self.0.iter().zip(counts) {
            if count > 0 {
                sum.fetch_add(count, Ordering::Relaxed);
            }
        }
    }
}

/// Counts the leaders that this member hears of, for ever.
pub async fn count_leaders(node: Node) {
    let mut metrics = node.raft.server_metrics();
    let mut last = None;
    loop {
        let leader = {
            let metrics = metrics.borrow_watched();
            let leader = metrics.current_leader;
            leader.map(|leader| (leader, metrics.vote.leader_id.term))
        };
        if leader.is_some() && leader != last {
            last = leader;
            node.metrics.leader_changes.fetch_add(1, Ordering::Relaxed);
        }
        if metrics.changed().await.is_err() {
            return;
        }
    }
}

/// All of it.
pub fn text(node: &Node) -> String {
    let mut text = Text(String::with_capacity(8 << 10));
    let (own, counted) = (node.own_status(), &node.metrics);
    text.gauge("raft_term", "The Raft term", own.term);
    text.family("raft_role", "gauge", "1 for what this member is");
    for role in ["leader", "candidate", "follower", "learner"] {
        text.value("raft_role", &[("role", role)], u8::from(own.state == role));
    }
    text.gauge(
        "raft_has_leader",
        "Whether a leader is known",
        u8::from(own.leader.is_some()),
    );
    text.gauge("raft_last_log_index", "The last entry of the log", own.last_log);
    text.gauge(
        "raft_committed_index",
        "The last entry that a majority has, as known here",
        own.committed,
    );
    text.gauge(
        "raft_applied_index",
        "The last entry that the state reflects",
        own.applied,
    );
    text.gauge(
        "raft_snapshot_index",
        "The last entry in the snapshot",
        own.snapshot,
    );
    text.gauge("raft_journal_bytes", "Bytes of the journal", own.journal_bytes);
    text.gauge(
        "raft_disk_full",
        "Whether writes wait for room on the disk",
        u8::from(own.disk_full),
    );
    text.counter(
        "raft_leader_changes_total",
        "Changes of the leader seen",
        &counted.leader_changes,
    );
    text.times(
        "raft_commit_seconds",
        "From a write's proposal at the leader until it is committed and applied",
        &counted.commits,
    );
    text.times(
        "raft_fsync_seconds",
        "Writing and syncing a batch of the journal",
        node.syncs(),
    );

    let members = members::status_here(node);
    text.family("members", "gauge", "Members by whether they vote");
    for voter in [true, false] {
        let count = members.iter().filter(|member| member.peer.voter == voter).count();
        text.value(
            "members",
            &[("voter", if voter { "true" } else { "false" })],
            count,
        );
    }
    text.family(
        "member_lag_entries",
        "gauge",
        "Entries of the log that a member lacks (leader only)",
    );
    for member in &members {
        if let Some(lag) = member.lag {
            let id = member.peer.id.to_string();
            text.value(
                "member_lag_entries",
                &[("host", &member.host), ("member", &id)],
                lag,
            );
        }
    }
    text.family(
        "member_silence_seconds",
        "gauge",
        "Time since a member's last sign of life (leader only)",
    );
    for member in &members {
        if let Some(silent) = member.silent_ms {
            let id = member.peer.id.to_string();
            let silent = Duration::from_millis(silent).as_secs_f64();
            text.value(
                "member_silence_seconds",
                &[("host", &member.host), ("member", &id)],
                silent,
            );
        }
    }

    text.certificates(node);

    let (watches, waiting) = node.view.watches();
    text.gauge("watches", "Event streams and other watches", watches);
    text.gauge(
        "watch_lag_events",
        "Changes that wait for the slowest watcher",
        waiting,
    );
    text.counter(
        "watches_cut_off_total",
        "Watchers that were too slow",
        node.view.cut_off(),
    );
    text.counter(
        "expired_total",
        "Instances that were taken out because they lived no more",
        &counted.expired,
    );
    text.family("dns_answers_total", "counter", "DNS answers by code");
    for (name, count) in Codes::NAMES.iter().zip(&counted.dns.0) {
        text.value(
            "dns_answers_total",
            &[("code", name)],
            count.load(Ordering::Relaxed),
        );
    }
    text.0
}

/// Text that grows by families.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(
            self.0,
            "# HELP flynn_discoverd_{name} {help}.\n# TYPE flynn_discoverd_{name} {kind}"
        );
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.0, "flynn_discoverd_{name}");
        for (at, (label, of)) in labels.iter().enumerate() {
            let of = of.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
            let _ = write!(self.0, "{}{label}=\"{of}\"", if at == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// When what runs out.
    fn certificates(&mut self, node: &Node) {
        if let Some(own) = node.dialer().identity().identity.loaded() {
            self.gauge(
                "certificate_expiry_timestamp_seconds",
                "When this discoverd's certificate runs out",
                own.not_after.as_second(),
            );
        }
        let Ok(Some(ca)) = crate::ca::status(node) else {
            return;
        };
        self.family(
            "ca_expiry_timestamp_seconds",
            "gauge",
            "When a root of the cluster's CA runs out",
        );
        for root in ca.roots.iter().filter(|root| root.trusted) {
            let signs = if root.signs { "true" } else { "false" };
            self.value(
                "ca_expiry_timestamp_seconds",
                &[("fingerprint", &root.fingerprint.to_string()), ("signs", signs)],
                root.not_after.as_second(),
            );
        }
        self.family(
            "ca_rotation",
            "gauge",
            "1 for how far a change of the CA's roots is",
        );
        for stage in [None, Some(Stage::Spread), Some(Stage::Renew)] {
            let name = match stage {
                None => "none",
                Some(Stage::Spread) => "spread",
                Some(Stage::Renew) => "renew",
            };
            let is = ca.rotation.as_ref().map(|rotation| rotation.stage) == stage;
            self.value("ca_rotation", &[("stage", name)], u8::from(is));
        }
        let waits = ca.rotation.map_or(0, |rotation| rotation.waits.len());
        self.gauge(
            "ca_rotation_waits",
            "Hosts that a change of the CA's roots waits for",
            waits,
        );
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.value(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, count: &AtomicU64) {
        self.family(name, "counter", help);
        self.value(name, &[], count.load(Ordering::Relaxed));
    }

    fn times(&mut self, name: &str, help: &str, times: &Times) {
        self.family(name, "histogram", help);
        let seconds = |micros: u64| Duration::from_micros(micros).as_secs_f64();
        let bounds = BOUNDS.map(|bound| seconds(bound).to_string());
        let bounds = bounds.iter().map(String::as_str).chain(["+Inf"]);
        let mut sum = 0;
        for (bound, count) in bounds.zip(&times.counts) {
            sum += count.load(Ordering::Relaxed);
            self.value(&format!("{name}_bucket"), &[("le", bound)], sum);
        }
        let all = seconds(times.micros.load(Ordering::Relaxed));
        self.value(&format!("{name}_sum"), &[], all);
        self.value(&format!("{name}_count"), &[], sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_codes_are_counted_where_they_belong() {
        let (times, codes) = (Times::default(), Codes::default());
        for micros in [0, 100, 101, 3_000, 60_000_000] {
            times.add(Duration::from_micros(micros));
        }
        let mut text = Text(String::new());
        text.times("x", "y", &times);
        for line in [
            "# TYPE flynn_discoverd_x histogram",
            "flynn_discoverd_x_bucket{le=\"0.0001\"} 2",
            "flynn_discoverd_x_bucket{le=\"0.00025\"} 3",
            "flynn_discoverd_x_bucket{le=\"0.005\"} 4",
            "flynn_discoverd_x_bucket{le=\"10\"} 4",
            "flynn_discoverd_x_bucket{le=\"+Inf\"} 5",
            "flynn_discoverd_x_count 5",
            "flynn_discoverd_x_sum 60.003201",
        ] {
            assert!(text.0.lines().any(|is| is == line), "{line} in {}", text.0);
        }
        let answers: [&[u8]; 4] = [&[0, 1, 0x80, 0x83], &[0; 12], &[9, 9, 0, 3], &[]];
        codes.add(answers);
        assert_eq!(
            codes.0.each_ref().map(|count| count.load(Ordering::Relaxed))[..4],
            [2, 0, 0, 2]
        );
    }

    #[test]
    fn labels_are_escaped() {
        let mut text = Text(String::new());
        text.value("x", &[("a", "b\"\\\n"), ("c", "d")], 1);
        assert_eq!(text.0, "flynn_discoverd_x{a=\"b\\\"\\\\\\n\",c=\"d\"} 1\n");
    }
}
