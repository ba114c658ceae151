//! `flynn-host`: the daemon of a host, the supervisors of its jobs, and the operator's commands.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use flynn_hostd::{config::Overrides, daemon, supervisor};

#[derive(Parser)]
#[command(
    name = "flynn-host",
    version,
    about = "Runs the jobs of one host of a Flynn cluster"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    Daemon {
        /// The state directory
        #[arg(long, default_value = "/var/lib/flynn")]
        state: PathBuf,
        /// The host's id: letters, digits and underscores
        #[arg(long)]
        id: Option<String>,
        /// The address at which other hosts reach this one
        #[arg(long)]
        address: Option<Ipv4Addr>,
    },
    /// Keep one job (the daemon starts this)
    #[command(hide = true)]
    Supervise {
        /// The job's directory
        job_dir: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Supervise { job_dir } => {
            flynn_api::server::init_logging("supervisor");
            Ok(supervisor::supervise(&job_dir)?)
        }
        Command::Daemon { state, id, address } => {
            flynn_api::server::init_logging("flynn-host");
            flynn_api::tls::install_provider();
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            let overrides = Overrides {
                id,
                address,
                tags: None,
            };
            runtime.block_on(daemon::run(daemon::Options { state, overrides }))
        }
    }
}
