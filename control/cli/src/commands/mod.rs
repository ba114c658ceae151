//! The commands: what they take, and where they are done.

mod apps;
mod cluster;
mod deployment;
mod docker;
mod env;
mod exec;
mod limit;
mod log;
mod meta;
mod names;
mod network;
mod port_forward;
mod ps;
mod release;
mod remote;
mod route;
mod run;
mod scale;

use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::context::Context;
use crate::failure::Result;
use crate::output;

/// Deploys and runs apps on a Flynn cluster.
///
/// -a and -c stand before the command: flynn -a web ps.
#[derive(Parser)]
#[command(name = "flynn", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Globals {
    /// The app, or a git remote that leads to it [env: FLYNN_APP]
    #[arg(short, long, env = "FLYNN_APP", hide_env = true)]
    pub(crate) app: Option<String>,
    /// The cluster, as `flynn cluster` lists it [env: FLYNN_CLUSTER]
    #[arg(short, long, env = "FLYNN_CLUSTER", hide_env = true)]
    pub(crate) cluster: Option<String>,
    /// Print JSON where something is listed or made
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Clusters that this machine knows
    Cluster(cluster::Cluster),
    /// Make an app
    Create(apps::Create),
    /// List the apps
    Apps,
    /// Show an app
    Info,
    /// Delete an app with all that belongs to it
    Delete(apps::Delete),
    /// Deploy docker images
    Docker(docker::Docker),
    /// List jobs
    Ps(ps::Ps),
    /// Stop jobs; the platform starts others in their place
    Kill(ps::Kill),
    /// Show an app's log
    Log(log::Log),
    /// Show or set how many jobs of each process type run
    Scale(scale::Scale),
    /// Run a program in a new job of the app
    Run(run::Run),
    /// Run a program in the container of a job that is up
    Exec(exec::Exec),
    /// Have ports of this machine lead to those of a job that is up
    PortForward(port_forward::PortForward),
    /// Show or change the environment, by a new release
    Env(env::Env),
    /// Show or change limits of process types, by a new release
    Limit(limit::Limit),
    /// Show or change an app's labels
    Meta(meta::Meta),
    /// Show or change whom an app's jobs speak to
    Network(network::Network),
    /// Show or change routes
    Route(route::Route),
    /// Show, make, delete and roll back releases
    Release(release::Release),
    /// Show deployments and how they are made
    Deployment(deployment::Deployment),
    /// Point a git remote to an app
    Remote(remote::Remote),
    /// Show the version
    Version,
    /// Print a script that completes commands in a shell
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Does what was asked for.
pub(crate) async fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Version => {
            output::line(format!("flynn {}", env!("CARGO_PKG_VERSION")))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "flynn", &mut script);
            output::bytes(&script)?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let mut context = Context::new(cli.globals)?;
    match cli.command {
        Command::Cluster(command) => command.run(&mut context)?,
        Command::Create(command) => command.run(&context).await?,
        Command::Apps => apps::list(&context).await?,
        Command::Info => apps::info(&context).await?,
        Command::Delete(command) => command.run(&context).await?,
        Command::Docker(command) => command.run(&context).await?,
        Command::Ps(command) => command.run(&context).await?,
        Command::Kill(command) => command.run(&context).await?,
        Command::Log(command) => command.run(&context).await?,
        Command::Scale(command) => command.run(&context).await?,
        Command::Run(command) => return command.run(&context).await,
        Command::Exec(command) => return command.run(&context).await,
        Command::PortForward(command) => command.run(&context).await?,
        Command::Env(command) => command.run(&context).await?,
        Command::Limit(command) => command.run(&context).await?,
        Command::Meta(command) => command.run(&context).await?,
        Command::Network(command) => command.run(&context).await?,
        Command::Route(command) => command.run(&context).await?,
        Command::Release(command) => command.run(&context).await?,
        Command::Deployment(command) => command.run(&context).await?,
        Command::Remote(command) => command.run(&context).await?,
        Command::Version | Command::Completion { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Splits `NAME=value`.
fn pair(text: &str) -> Result<(&str, &str)> {
    text.split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(|| crate::failure::usage(format!("{text:?} is not of the form NAME=value")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_fit_together() {
        Cli::command().debug_assert();
    }
}
