//! The suite `host`: what the daemon, its supervisors and containers cost: starts beside runc on the same root file
//! system, many starts at once, cycles that may leave nothing, idle containers, logs, attached terminals, snapshots of
//! volumes.
//!
//! Each part has a host of its own ([`ours`]): namespaces, cgroups and a state directory made here, `flynn-host` as it
//! is shipped, and containers as apps' jobs have them, with an address of their own. A process counts as running when it
//! has said so itself ([`expected`]): a shell's first deed is to write its word into a FIFO that is watched here.

mod attached;
mod census;
mod cycles;
mod expected;
mod idle;
mod logs;
mod ours;
mod receiver;
mod runc;
mod snapshots;
mod starts;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use self::ours::{Host, on_a_host};
use crate::row::{Goal, Row, Subject};
use crate::suites::{Only, Thoroughness};

const fn subject(name: &'static str, unit: &'static str, peer: Option<&'static str>, goal: Goal) -> Subject {
    Subject {
        suite: "host",
        name,
        unit,
        peer,
        goal,
    }
}

/// Takes the rows of one part.
type Measure = fn(&Host, Thoroughness) -> Result<Vec<Row>>;

/// The parts: what a person is told of each, the rows of one that cannot be taken, and how they are taken.
const PARTS: [(&str, &[Subject], Measure); 8] = [
    ("starts, beside runc", &starts::SUBJECTS, starts::one_by_one),
    ("starts at once", &starts::AT_ONCE, starts::at_once),
    ("start/stop cycles", &cycles::SUBJECTS, cycles::measure),
    ("idle containers", &idle::SUBJECTS, idle::measure),
    ("logs", &logs::SUBJECTS, logs::measure),
    ("attached terminals", &attached::SUBJECTS, attached::measure),
    ("snapshots on btrfs", &snapshots::BTRFS, snapshots::on_btrfs),
    ("snapshots on ZFS", &snapshots::ZFS, snapshots::on_zfs),
];

/// Takes all rows.
pub(crate) fn run(thoroughness: Thoroughness, only: Only<'_>) -> Result<Vec<Row>> {
    let binary = binary()?;
    let mut rows = Vec::new();
    for (what, subjects, measure) in PARTS.into_iter().filter(|(part, _, _)| only.takes(part)) {
        eprintln!("  {what}, load before it: {}", load());
        match on_a_host(&binary, |host| measure(host, thoroughness)) {
            Ok(taken) => rows.extend(taken),
            Err(error) => {
                let why = format!("{error:#}");
                rows.extend(subjects.iter().map(|subject| subject.missing(&why)));
            }
        }
    }
    Ok(rows)
}

/// `flynn-host` as it is shipped.
fn binary() -> Result<PathBuf> {
    let target = std::env::var_os("FLYNN_TARGET").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let path = target.join("x86_64-unknown-linux-gnu/release/flynn-host");
    ensure!(
        path.exists(),
        "there is no {}: cargo xtask bench makes it",
        path.display()
    );
    Ok(std::path::absolute(path)?)
}

/// What else the machine has to do: processes that want a CPU, on average over the last minute.
fn load() -> String {
    let text = std::fs::read_to_string(Path::new("/proc/loadavg")).unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}
