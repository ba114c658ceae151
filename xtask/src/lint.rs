//! `cargo xtask lint`: formatting, clippy, dependencies, floors.

use crate::setup::{self, Need};
use crate::{exec, floors, tail, ui, workspace};
use anyhow::{Error, Result, bail};
use std::io::IsTerminal as _;
use std::process::Command;

type Check = fn() -> Result<()>;

/// Runs all checks and fails if any does.
pub(crate) fn run() -> Result<()> {
    setup::check(&[Need::Build, Need::Test])?;
    let failed = failures();
    if !failed.is_empty() {
        let names: Vec<&str> = failed.iter().map(|(name, _)| *name).collect();
        bail!("not clean: {}", names.join(", "));
    }
    Ok(())
}

/// Runs all checks and names those that fail, and why.
pub(crate) fn failures() -> Vec<(&'static str, Error)> {
    let checks: [(&str, Check); 5] = [
        ("formatting", formatting),
        ("formatting of the eBPF programs", ebpf_formatting),
        ("floors", floors::check),
        ("dependencies", dependencies),
        ("clippy", clippy),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        if let Err(error) = ui::timed(&format!("Lint: {name}"), check) {
            ui::error(&error);
            failed.push((name, error));
        }
    }
    failed
}

fn formatting() -> Result<()> {
    exec::run(exec::cargo().args(["fmt", "--all", "--check"]))
}

/// The programs are a workspace of their own.
fn ebpf_formatting() -> Result<()> {
    exec::run(
        exec::cargo()
            .args(["fmt", "--check"])
            .current_dir(workspace::root().join("ebpf/programs")),
    )
}

/// Licences, bans and sources need no network. Known vulnerabilities do: where their database is not to be had, that
/// is said and is no failure.
fn dependencies() -> Result<()> {
    deny(&["bans", "licenses", "sources"])?;
    let fetched = deny_command()
        .args(["fetch", "db"])
        .output()
        .is_ok_and(|output| output.status.success());
    if fetched {
        return deny(&["advisories"]);
    }
    ui::note("advisories: skipped, for their database cannot be fetched here");
    Ok(())
}

fn deny(what: &[&str]) -> Result<()> {
    exec::run(
        deny_command()
            .args(["--log-level=error", "check", "--hide-inclusion-graph"])
            .args(what),
    )
}

fn deny_command() -> Command {
    let mut command = exec::cargo();
    command.args(["deny", "--all-features"]);
    command
}

fn clippy() -> Result<()> {
    let colour = if std::io::stderr().is_terminal() {
        "--color=always"
    } else {
        "--color=auto"
    };
    tail::run(
        exec::cargo()
            .args([
                "clippy",
                "--locked",
                "--workspace",
                "--all-targets",
                "--quiet",
                colour,
            ])
            .args(["--", "-D", "warnings"]),
    )
}
