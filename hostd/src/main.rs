//! `flynn-host`: the daemon of a host, the supervisors of its jobs, and the operator's commands.

use std::ffi::OsString;
use std::future::Future;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use flynn_api::Meta;
use flynn_hostd::bootstrap::{self, join, remove};
use flynn_hostd::commands::{self, Operator, ca, download, install, members, preflight, tags};
use flynn_hostd::config::{HostConfig, Overrides};
use flynn_hostd::encryption::Mode;
use flynn_hostd::{confine, container, daemon, floating, repository, supervisor};

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
    Daemon(DaemonArgs),
    /// Write this host's configuration, and nothing else
    Init {
        #[command(flatten)]
        host: HostArgs,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Keep one job (the daemon starts this)
    #[command(hide = true)]
    Supervise {
        /// The job's directory; without it, standard input says it
        job_dir: Option<PathBuf>,
    },
    /// See whether jobs can have user namespaces (the daemon starts this)
    #[command(hide = true)]
    ProbeUserNamespace {
        /// The first of the host's ids to try it with
        first: u32,
    },
    /// Run a program that can write in one directory only (the daemon starts this)
    #[command(hide = true)]
    Confine {
        /// The directory
        dir: PathBuf,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Make a cluster with this host as its first
    Bootstrap(bootstrap::Args),
    /// Make this host a member of a cluster
    Join(join::Args),
    /// Make a token with which one host can join
    Token(join::TokenArgs),
    /// Take another host out of the cluster for good
    Remove(remove::Args),
    /// Take a lost host out of the cluster for good, and let another take its place
    Replace(remove::ReplaceArgs),
    /// Renew this host's certificates now, and not when they are due
    Renew(join::RenewArgs),
    /// Look after the cluster's certificate authority: status, rotate
    #[command(subcommand)]
    Ca(ca::Command),
    /// Bring images into this host's store
    Download(download::Args),
    /// Make a repository that hosts download from, and publish releases in it
    #[command(subcommand)]
    Repository(repository::command::Command),
    /// Keep addresses at a host that is well: add, remove, list
    Floating(floating::command::Args),
    /// See whether this machine can be a host: kernel, disk, ports, firewall, clock, network
    Preflight(preflight::Args),
    /// Write the daemon's unit for systemd
    Install(install::Args),
    /// Print a script that completes commands for a shell
    Completion {
        /// Which
        shell: clap_complete::Shell,
    },
    /// Show the version
    Version {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Members(members::Command),
    #[command(flatten)]
    Operator(Operator),
}

#[derive(Args)]
struct DaemonArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Take over from the daemon at the other end of standard input (that daemon says this)
    #[arg(long, hide = true)]
    takeover: bool,
}

#[derive(Args)]
struct HostArgs {
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// The host's id: letters, digits and underscores; after the host's name unless given
    #[arg(long)]
    id: Option<String>,
    /// The address at which other hosts reach this one; that of the default route unless given
    #[arg(long, alias = "external-ip")]
    address: Option<Ipv4Addr>,
    /// Tags for placement
    #[arg(long, value_name = "NAME=VALUE,..", value_delimiter = ',', value_parser = tags::tag)]
    tags: Option<Vec<(String, String)>>,
    /// Whether what containers and hosts send to other hosts' containers is encrypted by WireGuard: on with every host
    /// that does the same (unless the cluster was bootstrapped with --direct, nothing said means this), off, or
    /// required, so that no other host is spoken to
    #[arg(long, value_name = "WHETHER")]
    encryption: Option<Mode>,
}

impl HostArgs {
    fn overrides(&self) -> Overrides {
        let tags = self.tags.clone().map(|tags| tags.into_iter().collect::<Meta>());
        Overrides {
            id: self.id.clone(),
            address: self.address,
            tags,
            encryption: self.encryption,
        }
    }
}

fn main() -> ExitCode {
    let result = run(Cli::parse().command);
    result.unwrap_or_else(|error| commands::end_with(&error))
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let for_all = matches!(
        command,
        Command::Version { .. } | Command::Completion { .. } | Command::Repository(_)
    );
    if !for_all && !rustix::process::geteuid().is_root() {
        anyhow::bail!(
            "flynn-host needs root: namespaces, mounts and the host's state belong to it. Run it with sudo"
        );
    }
    if !matches!(command, Command::Supervise { .. } | Command::Daemon(_)) {
        commands::end_with_reader();
    }
    match command {
        // One thread: no runtime is made here.
        Command::Supervise { job_dir } => {
            flynn_api::server::init_logging("supervisor");
            match job_dir {
                Some(job_dir) => supervisor::supervise(&job_dir)?,
                None => supervisor::wait_for_job()?,
            }
        }
        Command::ProbeUserNamespace { first } => container::probe(first)?,
        // One thread here as well.
        Command::Confine { dir, command } => match confine::run(&dir, &command)? {},
        Command::Daemon(args) => {
            daemon::share_heaps();
            flynn_api::server::init_logging("flynn-host");
            let overrides = args.host.overrides();
            runtime(daemon::run(daemon::Options {
                state: args.host.state,
                overrides,
                takeover: args.takeover,
            }))?;
        }
        Command::Init { host, json } => {
            flynn_hostd::files::private_dir(&host.state)?;
            let config = HostConfig::load(&host.state, &host.overrides())?;
            if json {
                println!("{}", serde_json::to_string_pretty(&config)?);
            } else {
                println!("host {} at {}", config.id, config.address);
            }
        }
        Command::Bootstrap(args) => runtime(bootstrap::run(&args))?,
        Command::Join(args) => runtime(join::run(&args))?,
        Command::Token(args) => runtime(join::token(&args))?,
        Command::Remove(args) => runtime(remove::run(&args))?,
        Command::Replace(args) => runtime(remove::replace(&args))?,
        Command::Renew(args) => runtime(join::renew(&args))?,
        Command::Ca(command) => runtime(ca::run(&command))?,
        Command::Download(args) => runtime(download::run(&args))?,
        Command::Repository(command) => runtime(repository::command::run(command))?,
        Command::Floating(args) => runtime(floating::command::run(&args))?,
        Command::Preflight(args) => return preflight::run(&args),
        Command::Install(args) => install::run(&args)?,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "flynn-host", &mut std::io::stdout());
        }
        Command::Version { json: false } => println!("{}", env!("CARGO_PKG_VERSION")),
        Command::Version { json: true } => {
            println!("{}", serde_json::json!({"version": env!("CARGO_PKG_VERSION")}));
        }
        Command::Members(command) => runtime(members::run(&command))?,
        Command::Operator(command) => return runtime(commands::operate(command)),
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    flynn_api::tls::install_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let result = runtime.block_on(work);
    // A read of standard input that nobody needs any more may be under way.
    runtime.shutdown_background();
    result
}
