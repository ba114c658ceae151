//! `flynn exec`.

use std::process::ExitCode;

use clap::Args;
use flynn_api::client::terminal;
use flynn_api::host::ExecRequest;
use flynn_api::{Env, ErrorCode};

use super::pair;
use crate::attach;
use crate::context::Context;
use crate::failure::{Result, advise};

#[derive(Args)]
pub(super) struct Exec {
    /// More environment
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The directory to begin in
    #[arg(short, long)]
    workdir: Option<String>,
    /// Without a terminal, also where this is one
    #[arg(short = 'T', long)]
    no_tty: bool,
    /// A job's id, as `flynn ps` lists it, or a process type: then it is one of its jobs
    job: String,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode> {
        let target = context.target().await?;
        let env = self
            .env
            .iter()
            .map(|text| pair(text).map(|(name, value)| (name.to_owned(), value.to_owned())));
        let mut env = env.collect::<Result<Env>>()?;
        let tty = !self.no_tty && terminal::is_interactive();
        if let Some(term) = std::env::var("TERM").ok().filter(|_| tty) {
            env.entry("TERM".into()).or_insert(term);
        }
        let id = target.running_job(self.job).await?;
        let request = ExecRequest {
            args: self.command,
            env,
            working_dir: self.workdir,
            uid: None,
            tty,
            tty_size: if tty { terminal::size() } else { None },
            stdin: true,
        };
        let unknown = advise(ErrorCode::NotFound, "See them all: flynn ps");
        let stream = target.controller.exec(&target.app.id, &id, &request).await;
        attach::run(stream.map_err(unknown)?, tty).await
    }
}
