//! `flynn-bench`: measures the platform, beside peers where there are any (`cargo xtask bench` builds and runs it).
//!
//! Flows in: what was built and the images ([`flynn_cluster_tests::Artifacts`]), peers from the machine's packages. Flows
//! out: a table on standard error, and with `--json` one object per row on standard output; nothing else is there.
//!
//! - [`row`]: what a measurement comes to; [`samples`]: taking turns and medians
//! - [`suites`]: which suites there are; [`spine`]: one host with the platform; [`overlay`]: the cluster
//!   network; [`dns`]: names; [`discovery`]: the registry
//! - [`l4`]: TCP and UDP routes in the kernel; [`host`]: the daemon, its supervisors and containers
//! - [`inside`]: the parts that run on a host of the lab, or in a container's network
//!
//! Invariants: we and the peer are measured in one run, in turns, several times, and medians are compared. A row that
//! cannot be taken is there all the same and says why. No row asserts: goals are told, not enforced.

mod discovery;
mod dns;
mod host;
mod inside;
mod l4;
mod overlay;
mod row;
mod samples;
mod services;
mod spine;
mod stolen;
mod suites;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::inside::Inside;
use crate::suites::{Only, Suite, Thoroughness};

/// As in the binaries that are measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures the platform beside its peers.
#[derive(Parser)]
#[command(
    name = "flynn-bench",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
struct Cli {
    /// The suite
    #[arg(required = true)]
    suite: Option<Suite>,
    /// Fewer samples: within five minutes
    #[arg(long)]
    quick: bool,
    /// Only the parts whose names contain this (of discovery: etcd, watchers, kills, hosts; of host: as it says)
    #[arg(long)]
    only: Option<String>,
    /// One JSON object per row on standard output
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What the benchmark runs on hosts.
#[derive(Subcommand)]
enum Command {
    /// Measures on the host that it runs on; for the benchmark itself
    #[command(hide = true, subcommand)]
    Inside(Inside),
}

fn main() -> ExitCode {
    flynn_lab::reexec();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Some(Command::Inside(inside)) = cli.command {
        return inside::run(&inside);
    }
    let Some(suite) = cli.suite else { return Ok(()) };
    let thoroughness = if cli.quick {
        Thoroughness::Quick
    } else {
        Thoroughness::Full
    };
    let before = stolen::CpuTime::now()?;
    let rows = suite.run(thoroughness, Only(cli.only.as_deref()))?;
    let stolen = stolen::CpuTime::now()?.stolen_since(before);
    eprintln!("\nwhile this ran, {stolen:.0} % of the CPUs' time was given to other virtual machines");
    eprintln!("\n{}", row::table(&rows));
    if cli.json {
        let mut stdout = std::io::stdout();
        for row in &rows {
            serde_json::to_writer(&mut stdout, row)?;
            stdout.write_all(b"\n")?;
        }
    }
    Ok(())
}
