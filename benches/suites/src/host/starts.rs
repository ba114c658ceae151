//! From the call of the API until the process runs: one container after the other in turns with runc, and a hundred at
//! once.

use std::time::Instant;

use anyhow::{Result, ensure};
use futures::future::try_join_all;

use super::census::Census;
use super::ours::Host;
use super::runc::Runc;
use super::subject;
use crate::row::{Goal, Row, Subject, median};
use crate::samples::{in_turns, percentile};
use crate::suites::Thoroughness;

/// At once.
const MANY: usize = 100;

/// The rows of [`one_by_one`].
pub(super) const SUBJECTS: [Subject; 4] = [
    subject("call to process running", "ms", None, Goal::AtMost(15.0)),
    subject("  beside", "ms", Some("runc"), Goal::RatioAtMost(0.5)),
    subject(
        "  99 of 100 within",
        "ms",
        Some("the median"),
        Goal::RatioAtMost(3.0),
    ),
    subject(
        "  in the host's network",
        "ms",
        Some("runc"),
        Goal::RatioAtMost(0.5),
    ),
];

/// The row of [`at_once`].
pub(super) const AT_ONCE: [Subject; 1] = [subject(
    "100 starts at once from cold: all run after",
    "ms",
    None,
    Goal::AtMost(2_000.0),
)];

enum Contender {
    Ours { host_network: bool },
    Runc(Runc),
}

/// Takes the rows of starts, one after the other.
pub(super) fn one_by_one(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let mut contenders = [
        Contender::Ours { host_network: false },
        Contender::Runc(Runc::prepare(host)?),
        Contender::Ours { host_network: true },
    ];
    let once = |contender: &mut Contender| {
        let took = match contender {
            Contender::Ours { host_network } => ours(host, *host_network),
            Contender::Runc(runc) => Ok(runc.start(host)?.as_secs_f64() * 1e3),
        };
        // What is done after an end is nobody else's burden.
        std::thread::sleep(std::time::Duration::from_millis(20));
        took
    };
    for contender in &mut contenders {
        once(contender)?;
    }
    let samples = in_turns(&mut contenders, thoroughness.pick(100, 1_000), once)?;
    let [networked, runc, in_hosts] = samples.as_slice() else {
        return Ok(Vec::new());
    };
    let (half, most) = (median(networked).unwrap_or_default(), percentile(networked, 99));
    for (who, samples) in [
        ("ours", networked),
        ("runc", runc),
        ("ours, host's network", in_hosts),
    ] {
        eprintln!(
            "    {who}: half within {:.1} ms, 99 of 100 within {:.1} ms, all within {:.1} ms",
            median(samples).unwrap_or_default(),
            percentile(samples, 99),
            percentile(samples, 100)
        );
    }
    Ok(vec![
        SUBJECTS[0].row(networked, &[]),
        SUBJECTS[1].row(networked, runc),
        SUBJECTS[2].beside(most, half, networked.len()),
        SUBJECTS[3].row(in_hosts, runc),
    ])
}

/// Milliseconds of one start; the process ends by itself.
fn ours(host: &Host, host_network: bool) -> Result<f64> {
    let mut job = host.speaking(&host.image, "exit 0");
    job.config.host_network = host_network;
    host.runtime.block_on(async {
        let started = host.start(&job).await?;
        let took = started.took.as_secs_f64() * 1e3;
        host.end(started).await?;
        Ok(took)
    })
}

/// Takes the row of many starts at once, each time of an image that was never mounted.
pub(super) fn at_once(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let rounds = thoroughness.pick(3, 11);
    let mut samples = Vec::new();
    for round in 0..rounds {
        let image = host.cold_image(&format!("cold-{round}"))?;
        // The kernel is done with what was there before.
        Census::of(host)?;
        let jobs: Vec<_> = (0..MANY)
            .map(|_| host.speaking(&image, "sleep 1000 & wait"))
            .collect();
        let took = host.runtime.block_on(async {
            let begun = Instant::now();
            let all = try_join_all(jobs.iter().map(|job| host.start(job))).await?;
            let took = begun.elapsed();
            ensure!(all.len() == MANY, "some were not started");
            try_join_all(all.into_iter().map(|started| host.stop(started))).await?;
            Ok(took.as_secs_f64() * 1e3)
        })?;
        eprintln!("    {MANY} at once after {took:.0} ms");
        samples.push(took);
    }
    Ok(vec![AT_ONCE[0].row(&samples, &[])])
}
