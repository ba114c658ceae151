//! A container from its start to its exit, beside runc.

use flynn_cluster_tests::Platform;

use super::SUITE;
use crate::inside::containers::Times;
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

pub(super) const SUBJECTS: &[Subject] = &[Subject {
    suite: SUITE,
    name: "container start to exit",
    unit: "ms",
    peer: Some("runc"),
    goal: Goal::RatioAtMost(2.0),
}];

/// Takes the rows.
pub(super) fn measure(platform: &Platform, thoroughness: Thoroughness) -> Vec<Row> {
    let rounds = thoroughness.pick("15", "50");
    let times = super::inside::<Times>(platform, &["containers", "--rounds", rounds]);
    vec![SUBJECTS[0].taken(times.map(|times| (times.ours, times.runc)))]
}
