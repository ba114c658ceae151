//! `cargo xtask test`: everything that CI runs. The last line on stdout counts the tests of all runners.

use crate::setup::{self, Need};
use crate::tally::{Runner, Tally};
use crate::{build, exec, image, lint, ui, vm, workspace};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// The crate whose tests boot clusters of built binaries and images.
const CLUSTER: &str = "flynn-cluster-tests";

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

/// Runs all there is, whatever fails on the way.
pub(crate) fn run(args: &Args) -> Result<()> {
    let outcome = all(args);
    let (tally, failed) = match &outcome {
        Ok(outcome) => (outcome.0, outcome.1.clone()),
        Err(error) => {
            ui::error(error);
            (
                Tally {
                    failed: 1,
                    ..Tally::default()
                },
                vec!["the run itself".to_owned()],
            )
        }
    };
    if !failed.is_empty() {
        ui::step(&format!("Failed: {}", failed.join(", ")));
    }
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    std::io::stdout().flush()?;
    if tally.failed > 0 || !failed.is_empty() {
        bail!("tests failed; what failed is said above");
    }
    Ok(())
}

/// The counts, and the names of what failed.
fn all(args: &Args) -> Result<(Tally, Vec<String>)> {
    setup::provide(
        &[Need::Build, Need::Images, Need::Lab, Need::Test, Need::Vm],
        args.yes,
    )?;
    let mut tally = Tally::default();
    let mut failed = Vec::new();
    let mut note = |name: &str, outcome: Result<Tally>| match outcome {
        Ok(counts) => {
            tally += counts;
            if counts.failed > 0 {
                failed.push(name.to_owned());
            }
        }
        Err(error) => {
            ui::error(&error);
            tally.failed += 1;
            failed.push(name.to_owned());
        }
    };

    for check in lint::failures() {
        note(
            check,
            Ok(Tally {
                failed: 1,
                ..Tally::default()
            }),
        );
    }
    let unit = ui::timed("Unit, simulation and kernel tests", || {
        let mut nextest = exec::cargo();
        nextest.args([
            "nextest",
            "run",
            "--locked",
            "--workspace",
            "--no-fail-fast",
            "--color=never",
        ]);
        nextest.args(["--no-tests=pass", "--exclude", CLUSTER]);
        counted(Runner::Nextest, &mut nextest, args.long)
    });
    note("unit, simulation and kernel tests", unit);

    let selection = vm::Selection {
        long: args.long,
        ..vm::Selection::default()
    };
    note("kernel tests under older kernels", vm::test(&selection));

    let built = build::run(build::Profile::default())
        .and_then(|()| image::make(&BTreeSet::from(image::Name::ALL), build::Profile::default()));
    if let Err(error) = built {
        note("building binaries and images", Err(error));
    } else {
        let cluster = ui::timed("Cluster tests", || {
            let mut cargo = exec::cargo();
            // One at a time: each has a cluster, and two cores are soon shared out.
            cargo.args(["test", "--locked", "--package", CLUSTER, "--", "--test-threads=1"]);
            counted(Runner::Libtest, &mut cargo, args.long)
        });
        note("cluster tests", cluster);
    }
    Ok((tally, failed))
}

/// Runs a test runner, shows what it says, and counts its summaries. A runner that fails without a failed test (its
/// tests do not compile, say) is an error.
fn counted(runner: Runner, command: &mut Command, long: bool) -> Result<Tally> {
    command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .env("FLYNN_TARGET", workspace::target())
        .env(
            "FLYNN_XTASK",
            std::env::current_exe().context("where is this program?")?,
        )
        .env("FLYNN_TEST_LONG", if long { "1" } else { "0" });
    let mut child = exec::tied(command)
        .spawn()
        .context("cannot start the test runner")?;
    let (stdout, stderr) = (
        child.stdout.take().context("no stdout")?,
        child.stderr.take().context("no stderr")?,
    );
    let mut tally = std::thread::scope(|scope| {
        let other = scope.spawn(|| tallied(runner, stdout));
        let mut tally = tallied(runner, stderr);
        tally += other.join().unwrap_or_default();
        tally
    });
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        ui::note(&format!("the test runner failed: {status}"));
        tally.failed = 1;
    }
    Ok(tally)
}

/// Passes a stream on to stderr, line by line, and counts.
fn tallied(runner: Runner, stream: impl std::io::Read) -> Tally {
    let mut tally = Tally::default();
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        // A closed stderr is no reason not to count.
        let _ = std::io::stderr().write_all(&line);
        if let Some(counts) = Tally::of_line(runner, &String::from_utf8_lossy(&line)) {
            tally += counts;
        }
        line.clear();
    }
    tally
}
