//! Every chore of the project, one file per command: `cargo xtask --help`.
//!
//! Flows in: this checkout, and the machine it stands on. Flows out: `target/` (binaries where
//! cargo puts them, images in `target/images`, running labs in `target/lab`) and, from `setup` alone and after
//! asking, installed packages and tools.
//!
//! Invariants: every command checks first that what it needs is installed; every command can be killed at any
//! moment and run again; nothing outside `target/` is written but by `setup`.

mod bench;
mod build;
mod cluster;
mod dist;
mod down;
mod exec;
mod fetch;
mod floors;
mod image;
mod lab;
mod lint;
mod setup;
mod status;
mod tail;
mod tally;
mod test;
mod ui;
mod up;
mod vm;
mod workspace;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Every chore of the project.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// One variant per command, each implemented in the module of its name.
#[derive(Subcommand)]
enum Command {
    /// Bring up a cluster of one host on this machine, with an example app
    Up(up::Args),
    /// End what `up` brought up, and see that nothing is left
    Down(down::Args),
    /// Say how what `up` brought up is doing
    Status(status::Args),
    /// Run every test, as CI does
    Test(test::Args),
    /// Run the kernel tests under older kernels, in virtual machines
    Vm(vm::Args),
    /// Check formatting, lints, dependencies and who may know whom
    Lint,
    /// Install what is missing on this machine: Debian packages, the eBPF toolchain, cargo tools
    Setup(setup::Args),
    /// Build the static binaries: flynn-host, flynn-system, flynn, flynn-lab
    Build(build::Profile),
    /// Make the images: squashfs layers and manifests, and the example's docker-archive
    Image(image::Args),
    /// Build a release and publish it in a repository that hosts download from
    Dist(dist::Args),
    /// Measure against a peer
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Up(args) => up::run(&args),
        Command::Down(args) => down::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Vm(args) => vm::run(&args),
        Command::Lint => lint::run(),
        Command::Setup(args) => setup::run(&args),
        Command::Build(profile) => build::run(profile),
        Command::Image(args) => image::run(&args),
        Command::Dist(args) => dist::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::error(&error);
            ExitCode::FAILURE
        }
    }
}
