//! `flynn meta`.

use clap::{Args, Subcommand};

use super::pair;
use crate::context::Context;
use crate::failure::Result;
use crate::output::{self, note};

#[derive(Args)]
pub(super) struct Meta {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// List the labels
    List,
    /// Set labels
    Set {
        #[arg(required = true, value_name = "NAME=VALUE")]
        labels: Vec<String>,
    },
    /// Remove labels
    Unset {
        #[arg(required = true)]
        names: Vec<String>,
    },
}

impl Meta {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let mut target = context.target().await?;
        match self.command.unwrap_or(Command::List) {
            Command::List if context.globals.json => return output::json(&target.app.meta),
            Command::List => {
                return output::table(
                    ["KEY", "VALUE"],
                    target.app.meta.into_iter().map(|(key, value)| [key, value]),
                );
            }
            Command::Set { labels } => {
                for label in &labels {
                    let (name, value) = pair(label)?;
                    target.app.meta.insert(name.to_owned(), value.to_owned());
                }
            }
            Command::Unset { names } => {
                for name in names
                    .iter()
                    .filter(|name| target.app.meta.remove(*name).is_none())
                {
                    note(format!("{name} was not set."));
                }
            }
        }
        target.controller.relabel_app(&target.app.id, &target.app).await?;
        note("Labels are changed.");
        Ok(())
    }
}
