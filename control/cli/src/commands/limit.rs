//! `flynn limit`.

use clap::{Args, Subcommand};
use flynn_api::resources::Resources;

use super::release::deploy;
use crate::context::Context;
use crate::failure::{Result, usage};
use crate::output;

#[derive(Args)]
pub(super) struct Limit {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// List the limits of all process types
    List,
    /// Set limits of a process type: memory=512MB swap=64MB cpu=1000 (thousandths of a core) temp_disk=1GB max_fd=10000
    /// max_pids=4096; in bytes a second, or unlimited, network_out=10MB network_in=10MB io_read=10MB io_write=10MB; by
    /// weight, 100 being usual, cpu_weight=200 io_weight=50
    Set {
        /// The process type
        process_type: String,
        #[arg(required = true, value_name = "NAME=VALUE")]
        limits: Vec<String>,
    },
}

impl Limit {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let mut release = target.release_or_current(None).await?;
        match self.command.unwrap_or(Command::List) {
            Command::List => {
                if context.globals.json {
                    let all: std::collections::BTreeMap<_, _> = release
                        .processes
                        .iter()
                        .map(|(kind, process)| (kind, &process.resources))
                        .collect();
                    return output::json(&all);
                }
                for (kind, process) in &release.processes {
                    let limits: Vec<_> = Resources::NAMES
                        .iter()
                        .map(|name| format!("{name}={}", process.resources.show(name)))
                        .collect();
                    output::line(format!("{kind}: {}", limits.join(" ")))?;
                }
                Ok(())
            }
            Command::Set { process_type, limits } => {
                let new = parse(limits.iter().map(String::as_str))?;
                let process = release.processes.get_mut(&process_type).ok_or_else(|| {
                    usage(format!(
                        "the release has no process type {process_type}; see flynn scale"
                    ))
                })?;
                process.resources.0.extend(new.0);
                let release = deploy(&target, release).await?;
                output::line(format!("Created release {}.", release.id))
            }
        }
    }
}

/// Reads limits: `memory=512MB`.
pub(super) fn parse<'a>(limits: impl Iterator<Item = &'a str>) -> Result<Resources> {
    Resources::parse(limits).map_err(usage)
}
