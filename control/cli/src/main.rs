//! `flynn`: the command line of developers and operators, a client of the controller and of image receiving.
//!
//! Data goes to standard output, all else (progress, questions, errors) to standard error. Every listing has a form for
//! people and, with `--json`, one for programs. Errors carry a stable code; the process's exit status follows it:
//! 1 failed, 2 wrong usage or input, 3 not found, 4 not allowed, 5 conflict, 75 try again later. `flynn run` ends with
//! the status of what it ran.
//!
//! - [`config`]: the clusters in `~/.flynnrc`; [`pin`]: trust in one of them by its certificate's digest.
//! - [`context`]: which cluster and app a command is about, and clients for them.
//! - [`archive`]: images on disk, in the forms that docker and OCI tools write.
//! - [`attach`]: a job at this process's terminal.
//! - [`commands`]: one module per command.

mod archive;
mod attach;
mod commands;
mod config;
mod context;
mod failure;
mod git;
mod output;
mod pin;
mod prompt;
mod wait;

use std::process::ExitCode;

use clap::Parser as _;

use crate::commands::Cli;
use crate::failure::Failure;

fn main() -> ExitCode {
    flynn_api::tls::install_provider();
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
    {
        Ok(runtime) => runtime,
        Err(why) => {
            eprintln!("flynn: error[internal]: no threads can be made: {why}");
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(commands::run(cli));
    // A thread that waits for a key press must not keep the process alive.
    runtime.shutdown_background();
    match done {
        Ok(code) => code,
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    match failure {
        // Whoever read the output has had enough.
        Failure::Pipe => ExitCode::SUCCESS,
        Failure::Error(error) => {
            eprintln!("flynn: error[{}]: {}", error.code, error.message);
            failure::exit_code(error.code)
        }
    }
}
