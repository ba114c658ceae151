//! `flynn deployment`.

use clap::{Args, Subcommand};

use crate::context::Context;
use crate::failure::{Result, usage};
use crate::output::{self, ago, note};
use crate::wait::short;

/// The label that holds the size of a batch.
const BATCH_SIZE: &str = "flynn-deploy-batch-size";

#[derive(Args)]
pub(super) struct Deployment {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// List the deployments, the newest first
    List,
    /// Show or set how many seconds each step may take
    Timeout { seconds: Option<i32> },
    /// Show or set how many jobs are replaced at a time by the strategy in-batches
    BatchSize { jobs: Option<u32> },
}

impl Deployment {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let mut target = context.target().await?;
        match self.command.unwrap_or(Command::List) {
            Command::List => {
                let deployments = target.controller.deployments(&target.app.id).await?;
                if context.globals.json {
                    return output::json(&deployments);
                }
                let rows = deployments.into_iter().map(|deployment| {
                    let old = deployment.old_release_id.as_deref().map_or("-", short).to_owned();
                    [
                        short(&deployment.id).into(),
                        deployment.status,
                        ago(deployment.created_at),
                        old,
                        short(&deployment.new_release_id).into(),
                        deployment.error.unwrap_or_default(),
                    ]
                });
                return output::table(["ID", "STATUS", "CREATED", "FROM", "TO", ""], rows);
            }
            Command::Timeout { seconds: None } => return output::line(target.app.deploy_timeout.to_string()),
            Command::Timeout {
                seconds: Some(seconds),
            } if seconds < 1 => return Err(usage("a timeout is at least 1 second")),
            Command::Timeout {
                seconds: Some(seconds),
            } => target.app.deploy_timeout = seconds,
            Command::BatchSize { jobs: None } => {
                let size = target.app.meta.get(BATCH_SIZE);
                return output::line(size.map_or("as many as there are hosts", String::as_str));
            }
            Command::BatchSize { jobs: Some(0) } => return Err(usage("a batch has at least 1 job")),
            Command::BatchSize { jobs: Some(jobs) } => {
                target.app.meta.insert(BATCH_SIZE.into(), jobs.to_string());
            }
        }
        target.controller.update_app(&target.app).await?;
        note("The app is changed.");
        Ok(())
    }
}
