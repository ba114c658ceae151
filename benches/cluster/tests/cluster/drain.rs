//! A host is emptied by its operator.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_cluster_tests::{DOMAIN, Load, until};

use crate::containers::{containers_on, example, spread};
use crate::fixture::{APP, Cluster, MEMBERS};
use crate::join::flynn_host;

const LIMIT: Duration = Duration::from_mins(2);

/// What can go is up elsewhere before it stops, and no request fails; what belongs to the host stays.
pub(crate) fn drained(cluster: &mut Cluster) -> Result<()> {
    let (platform, containers) = example(cluster)?;
    let [rest @ .., drained] = MEMBERS;
    let scale = |count: usize| platform.run(["-a", APP, "scale", &format!("web={count}")]);
    let load = Load::start(platform.router(), &format!("{APP}.{DOMAIN}"), 50);
    let said = flynn_host(platform, drained, &["drain", "--json", "--timeout", "120"])?;
    let said: serde_json::Value = serde_json::from_str(&said).context(said)?;
    let left = said["left"].as_array().context("which jobs are left?")?;
    let stays = said["stays"].as_object().context("which jobs stay?")?;
    ensure!(
        left.is_empty() && stays.values().any(|why| why == "every host has its own"),
        "{said}"
    );
    spread(platform, APP, containers.len(), &rest)?;
    let report = load.stop()?;
    eprintln!(
        "      {} requests, the slowest {} ms",
        report.sent,
        report.slowest.as_millis()
    );
    ensure!(report.failures.is_empty(), "{:?}", report.failures);

    // It is given nothing, however much there is to place.
    scale(containers.len() + 2)?;
    spread(platform, APP, containers.len() + 2, &rest)?;
    ensure!(
        containers_on(platform, APP, &[drained])?.is_empty(),
        "it was given a job"
    );

    flynn_host(platform, drained, &["drain", "--undo"])?;
    until(LIMIT, "the host takes jobs again", || {
        scale(1)?;
        until(LIMIT, "one job is left", || {
            Ok((containers_on(platform, APP, &MEMBERS)?.len() == 1).then_some(()))
        })?;
        scale(containers.len())?;
        let all = until(LIMIT, "all jobs are back", || {
            let all = containers_on(platform, APP, &MEMBERS)?;
            Ok((all.len() == containers.len()).then_some(all))
        })?;
        Ok(all
            .iter()
            .any(|container| container.host == drained)
            .then_some(()))
    })
}
