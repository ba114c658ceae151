//! `flynn-host exec`: another program in a job's container.

use std::process::ExitCode;

use anyhow::Context as _;
use flynn_api::client::host::HostClient;
use flynn_api::client::terminal;
use flynn_api::host::ExecRequest;

use super::attach;

/// What to start, and how.
#[derive(clap::Args, Debug)]
pub struct ExecArgs {
    /// A variable beside those of the job
    #[arg(long = "env", short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The directory to begin in
    #[arg(long)]
    workdir: Option<String>,
    /// Whose it is: a user id
    #[arg(long, short)]
    user: Option<u32>,
    /// Without a terminal, also where this is one
    #[arg(long, short = 'T')]
    no_tty: bool,
    /// The job's id, or the start of it
    pub(super) job: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

pub(super) async fn exec(host: &HostClient, job: &str, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let tty = !args.no_tty && terminal::is_interactive();
    let variable = |text: &String| {
        let pair = text
            .split_once('=')
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        pair.with_context(|| format!("--env {text}: NAME=VALUE is wanted"))
    };
    let request = ExecRequest {
        env: args.env.iter().map(variable).collect::<anyhow::Result<_>>()?,
        args: args.command,
        working_dir: args.workdir,
        uid: args.user,
        tty,
        tty_size: tty.then(terminal::size).flatten(),
        stdin: true,
    };
    attach::attach(host.exec(job, &request).await?, tty).await
}
