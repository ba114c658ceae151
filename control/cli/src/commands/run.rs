//! `flynn run`.

use std::process::ExitCode;

use clap::Args;
use flynn_api::Env;
use flynn_api::client::terminal;
use flynn_api::controller::NewJob;

use super::{limit, pair};
use crate::attach;
use crate::context::Context;
use crate::failure::Result;
use crate::output;

#[derive(Args)]
pub(super) struct Run {
    /// In the background: print the job's id and return
    #[arg(short, long)]
    detached: bool,
    /// Of this release, instead of the current one
    #[arg(short, long)]
    release: Option<String>,
    /// More environment
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Keep the output in the app's log as well
    #[arg(short = 'l', long)]
    enable_log: bool,
    /// Limits: memory=512MB,cpu=500
    #[arg(long, value_name = "NAME=VALUE,...")]
    limits: Option<String>,
    /// The program and its arguments; the image's when not given
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Run {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode> {
        let target = context.target().await?;
        let release = target.release_or_current(self.release.as_deref()).await?;
        let env = self
            .env
            .iter()
            .map(|text| pair(text).map(|(name, value)| (name.to_owned(), value.to_owned())));
        let mut env = env.collect::<Result<Env>>()?;
        let tty = !self.detached && terminal::is_interactive();
        if let Some(term) = std::env::var("TERM").ok().filter(|_| tty) {
            env.entry("TERM".into()).or_insert(term);
        }
        let limits = self.limits.as_deref().unwrap_or_default();
        let job = NewJob {
            release_id: release.id,
            args: self.command,
            release_env: true,
            env,
            tty,
            tty_size: if tty { terminal::size() } else { None },
            disable_log: !self.detached && !self.enable_log,
            resources: limit::parse(limits.split(',').filter(|limit| !limit.is_empty()))?,
            ..NewJob::default()
        };
        if self.detached {
            let job = target.controller.run_detached(&target.app.id, &job).await?;
            if context.globals.json {
                output::json(&job)?;
            } else {
                output::line(&job.id)?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        attach::run(target.controller.run_attached(&target.app.id, &job).await?, tty).await
    }
}
