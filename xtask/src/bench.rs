//! `cargo xtask bench`: measures us beside a peer. The table goes to people, `--json` to machines, on stdout alone.

use crate::setup::{self, Need};
use crate::{build, exec, image, workspace};
use anyhow::{Result, bail};
use std::collections::BTreeSet;

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The suite
    suite: String,
    /// Fewer samples, five minutes at the most
    #[arg(long)]
    quick: bool,
    /// Only the parts whose names contain this; of the suites discovery and host
    #[arg(long)]
    only: Option<String>,
    /// One JSON object per row
    #[arg(long)]
    json: bool,
}

/// The suites that measure the whole platform; the others bring all they need.
const OF_THE_PLATFORM: [&str; 1] = ["spine"];

/// Those that measure `flynn-host` as it is shipped, and no image.
const OF_THE_HOST: [&str; 1] = ["host"];

/// Runs a suite, where it needs them on built binaries and images.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::check(&[Need::Build, Need::Images, Need::Lab, Need::Bench])?;
    if OF_THE_PLATFORM.contains(&args.suite.as_str()) {
        let profile = build::Profile::default();
        build::run(profile)?;
        image::make(&BTreeSet::from(image::Name::ALL), profile)?;
    }
    if OF_THE_HOST.contains(&args.suite.as_str()) {
        build::host(build::Profile::default())?;
    }
    let mut cargo = exec::cargo();
    cargo.args([
        "run",
        "--locked",
        "--quiet",
        // Some suites measure what is built into the harness.
        "--release",
        "--package",
        "flynn-bench",
        "--",
        &args.suite,
    ]);
    if args.quick {
        cargo.arg("--quick");
    }
    if let Some(only) = &args.only {
        cargo.args(["--only", only]);
    }
    if args.json {
        cargo.arg("--json");
    }
    let status = cargo.env("FLYNN_TARGET", workspace::target()).status()?;
    if !status.success() {
        bail!("the suite {} failed: {status}", args.suite);
    }
    Ok(())
}
