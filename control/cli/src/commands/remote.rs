//! `flynn remote`.

use clap::{Args, Subcommand};

use crate::context::Context;
use crate::failure::{Result, usage};
use crate::git;
use crate::output::note;
use crate::prompt::confirm;

#[derive(Args)]
pub(super) struct Remote {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a git remote that leads to the app named with -a
    Add {
        /// Overwrite one of that name without a question
        #[arg(short, long)]
        yes: bool,
        /// What to call it
        #[arg(default_value = git::REMOTE)]
        name: String,
    },
}

impl Remote {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let Command::Add { yes, name } = self.command;
        let target = context.target().await?;
        let cluster = context.cluster()?;
        if !git::in_repository() {
            return Err(usage(
                "there is no git repository here; go into one, or make one with git init",
            ));
        }
        if cluster.git_url.is_empty() {
            return Err(usage(format!(
                "the cluster {} was added without a git URL; add it again with -f",
                cluster.name
            )));
        }
        if git::has_remote(&name) {
            confirm(
                &format!(
                    "The git remote {name} is there already. Point it to {}?",
                    target.app.name
                ),
                yes,
            )?;
        }
        if !git::set_remote(&name, cluster, &target.app.name) {
            return Err(usage(format!(
                "git does not make a remote called {name:?}; choose another name"
            )));
        }
        note(format!("The git remote {name} leads to {}.", target.app.name));
        Ok(())
    }
}
