//! From built images to the first answer of an app.

use std::time::Instant;

use anyhow::{Context, Result};
use flynn_cluster_tests::{Artifacts, Platform};

use super::{APP, SUITE};
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

const FIRST_ANSWER: Subject = Subject {
    suite: SUITE,
    name: "bootstrap to first answer",
    unit: "s",
    peer: None,
    goal: Goal::AtMost(15.0),
};

/// Brings platforms up, one after the other; the last one stays, for the rows that follow.
pub(super) fn measure(
    artifacts: &Artifacts,
    thoroughness: Thoroughness,
    rows: &mut Vec<Row>,
) -> Result<Platform> {
    let rounds = thoroughness.pick(1, 5);
    let mut samples = Vec::new();
    for round in 1..=rounds {
        let name = format!("bench-{}-{round}", std::process::id());
        let taken = first_answer(&name, artifacts);
        let (platform, seconds) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                rows.push(FIRST_ANSWER.missing(format!("{error:#}")));
                return Err(error);
            }
        };
        eprintln!("    first answer after {seconds:.1} s");
        samples.push(seconds);
        if round == rounds {
            rows.push(FIRST_ANSWER.row(&samples, &[]));
            return Ok(platform);
        }
        platform.down()?;
    }
    unreachable!("there is a round")
}

fn first_answer(name: &str, artifacts: &Artifacts) -> Result<(Platform, f64)> {
    let mut platform = Platform::boot(name, artifacts, 1).context("the host does not boot")?;
    let begun = Instant::now();
    let up = platform
        .bootstrap()
        .and_then(|_| platform.cluster_add())
        .and_then(|()| platform.push_example(APP));
    up.inspect_err(|_| platform.dump())?;
    Ok((platform, begun.elapsed().as_secs_f64()))
}
