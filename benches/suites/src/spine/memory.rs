//! What the idle platform has in memory.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use flynn_cluster_tests::Platform;

use super::SUITE;
use crate::inside::memory::{Process, megabytes};
use crate::row::{Goal, Row, Subject};

pub(super) const SUBJECTS: &[Subject] = &[Subject {
    suite: SUITE,
    name: "idle memory (PSS) without PostgreSQL",
    unit: "MB",
    peer: None,
    goal: Goal::AtMost(150.0),
}];

/// How long the platform is left alone first.
const REST: Duration = Duration::from_secs(10);

/// Takes the row.
pub(super) fn measure(platform: &Platform) -> Row {
    SUBJECTS[0].taken(sum(platform).map(|megabytes| (vec![megabytes], Vec::new())))
}

fn sum(platform: &Platform) -> Result<f64> {
    std::thread::sleep(REST);
    let processes: Vec<Process> = super::inside(platform, &["memory"])?;
    let mut by_name: BTreeMap<&str, (u32, u64)> = BTreeMap::new();
    for process in processes.iter().filter(|process| process.platform) {
        let entry = by_name.entry(&process.name).or_default();
        *entry = (entry.0 + 1, entry.1 + process.pss);
    }
    for needed in [
        "flynn-host daemon",
        "flynn-host supervise",
        "flynn-system discoverd",
    ] {
        ensure!(by_name.contains_key(needed), "no process {needed} was found");
    }
    for (name, (count, bytes)) in &by_name {
        eprintln!("    {:>7.1} MB  {name} ({count})", megabytes(*bytes));
    }
    Ok(megabytes(by_name.values().map(|(_, bytes)| bytes).sum()))
}
