//! `flynn ps` and `flynn kill`.

use clap::Args;
use flynn_api::ErrorCode;
use flynn_api::controller::{Job, JobState};

use crate::context::Context;
use crate::failure::{Result, advise};
use crate::output::{self, ago, note};
use crate::wait::{short, state};

#[derive(Args)]
pub(super) struct Ps {
    /// Those that are over as well
    #[arg(short, long)]
    all: bool,
    /// Ids alone
    #[arg(short, long)]
    quiet: bool,
    /// Of this process type alone
    #[arg(short = 't', long = "type")]
    process_type: Option<String>,
}

#[derive(Args)]
pub(super) struct Kill {
    /// Ids, as `flynn ps` lists them
    #[arg(required = true)]
    jobs: Vec<String>,
}

fn id(job: &Job) -> &str {
    if job.id.is_empty() { &job.uuid } else { &job.id }
}

impl Ps {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let mut jobs = target.controller.jobs(&target.app.id).await?;
        jobs.retain(|job| self.all || job.state != JobState::Down);
        jobs.retain(|job| {
            self.process_type
                .as_ref()
                .is_none_or(|kind| job.process_type == *kind)
        });
        if context.globals.json {
            return output::json(&jobs);
        }
        if self.quiet {
            return jobs.iter().try_for_each(|job| output::line(id(job)));
        }
        let rows = jobs.iter().map(|job| {
            let kind = if job.process_type.is_empty() {
                "run"
            } else {
                &job.process_type
            };
            let why = match (&job.host_error, job.exit_status) {
                (Some(why), _) => why.clone(),
                (None, Some(status)) => format!("exit status {status}"),
                (None, None) => job.args.join(" "),
            };
            [
                id(job).into(),
                kind.into(),
                state(job.state).into(),
                ago(job.created_at),
                short(&job.release_id).into(),
                why,
            ]
        });
        output::table(["ID", "TYPE", "STATE", "CREATED", "RELEASE", ""], rows)
    }
}

impl Kill {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        for job in &self.jobs {
            let unknown = advise(ErrorCode::NotFound, "See them all: flynn ps");
            target
                .controller
                .kill_job(&target.app.id, job)
                .await
                .map_err(unknown)?;
            note(format!("Job {job} is stopping."));
        }
        Ok(())
    }
}
