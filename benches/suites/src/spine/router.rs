//! The router beside nginx and HAProxy, each before the same instance of an app.

use flynn_cluster_tests::{DOMAIN, Platform};

use super::{APP, SUITE};
use crate::inside::router::Throughput;
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

const fn rate(peer: &'static str) -> Subject {
    Subject {
        suite: SUITE,
        name: "router: requests",
        unit: "1/s",
        peer: Some(peer),
        goal: Goal::RatioAtLeast(0.5),
    }
}

const fn cost(peer: &'static str) -> Subject {
    Subject {
        suite: SUITE,
        name: "router: CPU per request",
        unit: "us",
        peer: Some(peer),
        goal: Goal::RatioAtMost(2.0),
    }
}

pub(super) const SUBJECTS: &[Subject] = &[rate("nginx"), rate("haproxy"), cost("nginx"), cost("haproxy")];

/// Takes the rows.
pub(super) fn measure(platform: &Platform, thoroughness: Thoroughness) -> Vec<Row> {
    let (rounds, seconds) = thoroughness.pick(("3", "3"), ("5", "8"));
    let host = format!("{APP}.{DOMAIN}");
    let service = format!("{APP}-web");
    let args = [
        "router",
        "--rounds",
        rounds,
        "--seconds",
        seconds,
        "--host-header",
        &host,
        "--service",
        &service,
    ];
    let all = match super::inside::<Throughput>(platform, &args) {
        Ok(all) => all,
        Err(error) => {
            let why = format!("{error:#}");
            return SUBJECTS.iter().map(|subject| subject.missing(&why)).collect();
        }
    };
    SUBJECTS
        .iter()
        .map(|subject| {
            let peer = if subject.peer == Some("nginx") {
                &all.nginx
            } else {
                &all.haproxy
            };
            match subject.unit {
                "us" => subject.row(&all.ours.micros, &peer.micros),
                _ => subject.row(&all.ours.rates, &peer.rates),
            }
        })
        .collect()
}
