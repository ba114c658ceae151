//! The suite `spine`: what one host with the whole platform costs and takes.

mod containers;
mod memory;
mod router;
mod start;

use anyhow::{Context, Result};
use flynn_cluster_tests::{Artifacts, PROGRAM, Platform};

use crate::row::Row;
use crate::suites::Thoroughness;

const SUITE: &str = "spine";

/// The app that is deployed.
const APP: &str = "example";

/// Takes all rows.
pub(crate) fn run(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let artifacts = Artifacts::find().map_err(anyhow::Error::msg)?;
    let mut rows = Vec::new();
    let platform = match start::measure(&artifacts, thoroughness, &mut rows) {
        Ok(platform) => platform,
        Err(error) => {
            let why = format!("there is no cluster to measure: {error:#}");
            rows.extend(
                memory::SUBJECTS
                    .iter()
                    .chain(containers::SUBJECTS)
                    .chain(router::SUBJECTS)
                    .map(|it| it.missing(&why)),
            );
            return Ok(rows);
        }
    };
    rows.push(memory::measure(&platform));
    rows.extend(containers::measure(&platform, thoroughness));
    rows.extend(router::measure(&platform, thoroughness));
    platform.down()?;
    Ok(rows)
}

/// Runs this program on the platform's host, and gives what it says.
fn inside<T: serde::de::DeserializeOwned>(platform: &Platform, args: &[&str]) -> Result<T> {
    let mut command = platform.host().command(PROGRAM)?;
    command
        .arg("inside")
        .args(args)
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::inherit());
    let output = command.output().context("cannot run on the host")?;
    anyhow::ensure!(
        output.status.success(),
        "it failed on the host: {}; why is said above",
        output.status
    );
    serde_json::from_slice(&output.stdout).context("what it said cannot be read")
}
