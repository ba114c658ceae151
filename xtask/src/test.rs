//! `cargo xtask test`: everything that CI runs. The last line on stdout counts the tests of all runners.

use crate::setup::{self, Need};
use crate::tail::{self, Tail};
use crate::tally::{Runner, Tally};
use crate::{build, exec, fetch, image, lint, ui, vm, workspace};
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::io::Write;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// The crate whose tests boot clusters of built binaries and images.
pub(crate) const CLUSTER: &str = "flynn-cluster-tests";

/// What to test.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run more seeds and rounds of whatever is random or repeated
    #[arg(long)]
    long: bool,
    /// Install what is missing without asking (also with CI=true in the environment)
    #[arg(long)]
    yes: bool,
}

/// Runs all there is, whatever fails on the way. What failed is said again at the end, where logs are read first.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut outcome = Outcome::default();
    if let Err(error) = all(args, &mut outcome) {
        outcome.note("the run itself", Err(error));
    }
    for (name, why) in &outcome.failed {
        ui::step(&format!("Failed: {name}"));
        why.lines().for_each(ui::note);
    }
    let tally = outcome.tally;
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    std::io::stdout().flush()?;
    if tally.failed > 0 {
        bail!("tests failed; what failed is said above");
    }
    Ok(())
}

/// What all that ran came to.
#[derive(Default)]
struct Outcome {
    tally: Tally,
    /// What failed, and the last that it said.
    failed: Vec<(String, Tail)>,
}

impl Outcome {
    fn note(&mut self, name: &str, outcome: Result<(Tally, Tail)>) {
        match outcome {
            Ok((counts, tail)) => {
                self.tally += counts;
                if counts.failed > 0 {
                    self.failed.push((name.to_owned(), tail));
                }
            }
            Err(error) => {
                ui::error(&error);
                self.tally.failed += 1;
                let why = match error.downcast::<tail::Failed>() {
                    Ok(failed) => failed.tail,
                    Err(error) => Tail::of(&format!("{error:#}")),
                };
                self.failed.push((name.to_owned(), why));
            }
        }
    }
}

fn all(args: &Args, outcome: &mut Outcome) -> Result<()> {
    setup::provide(
        &[Need::Build, Need::Images, Need::Lab, Need::Test, Need::Vm],
        args.yes,
    )?;
    fetch::all()?;
    for (check, error) in lint::failures() {
        outcome.note(check, Err(error));
    }
    // With binaries that check themselves, and that are built with the tests; at length, with what is shipped.
    let profile = if args.long {
        build::Profile::default()
    } else {
        build::Profile::debug()
    };
    build::everything()?;
    let unit = ui::timed("Unit, simulation and kernel tests", || {
        let mut nextest = exec::cargo();
        nextest.args([
            "nextest",
            "run",
            "--locked",
            "--workspace",
            "--filterset",
            &format!("not package({CLUSTER})"),
            "--no-fail-fast",
            "--color=never",
            "--failure-output=immediate-final",
        ]);
        counted(Runner::Nextest, &mut nextest, args, profile)
    });
    outcome.note("unit, simulation and kernel tests", unit);

    if args.long {
        build::run(profile)?;
    }
    image::make(&BTreeSet::from(image::Name::ALL), profile)?;
    let cluster = ui::timed("Cluster tests", || {
        let mut cargo = exec::cargo();
        // One at a time: each has a cluster, and two cores are soon shared out.
        cargo.args(["test", "--locked", "--workspace", "--test", "cluster"]);
        cargo.args(["--", "--test-threads=1"]);
        counted(Runner::Libtest, &mut cargo, args, profile)
    });
    // Everything is built: where all are skipped, something was not found.
    let cluster = cluster.and_then(|(tally, tail)| match tally.passed + tally.failed {
        0 => bail!("no cluster test has run"),
        _ => Ok((tally, tail)),
    });
    outcome.note("cluster tests", cluster);

    let selection = vm::Selection {
        long: args.long,
        ..vm::Selection::default()
    };
    outcome.note("kernel tests under older kernels", vm::test(&selection));
    Ok(())
}

/// Runs a test runner, shows what it says, and counts its summaries. A runner that fails without a failed test (its
/// tests do not compile, say) counts as one that failed.
fn counted(
    runner: Runner,
    command: &mut Command,
    args: &Args,
    profile: build::Profile,
) -> Result<(Tally, Tail)> {
    command
        .env("FLYNN_TARGET", workspace::target())
        .env("FLYNN_PROFILE", profile.name())
        .env("FLYNN_TEST_LONG", if args.long { "1" } else { "0" });
    let tally = Mutex::new(Tally::default());
    let (status, tail) = tail::relay(command, |line| {
        if let Some(counts) = Tally::of_line(runner, line) {
            *tally.lock().unwrap_or_else(PoisonError::into_inner) += counts;
        }
    })?;
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !status.success() && tally.failed == 0 {
        ui::note(&format!("the test runner failed: {status}"));
        tally.failed = 1;
    }
    Ok((tally, tail))
}
