//! The one binary of the system image: each component of the platform is a subcommand.
//!
//! Flows in: the environment of the job, which each component reads itself. Flows out: the component's exit status; its
//! log on standard error. A component runs until SIGTERM, lets what is under way finish, and ends with status 0.
//!
//! Invariant: nothing here knows what a component does. Each crate has an `Options::from_env()` and a
//! `run(options, shutdown)`, and this is all that they have in common.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use flynn_api::server::CancellationToken;

/// glibc's keeps what a burst has taken, and in hundreds of megabytes when all hosts of a large cluster register at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Threads that run tasks: components wait more than they work, and each thread has stack and caches of its own.
const THREADS: usize = 2;
/// Overrides [`THREADS`].
const THREADS_VARIABLE: &str = "FLYNN_THREADS";

/// Runs one component of the platform, configured by its environment.
#[derive(Parser)]
#[command(name = "flynn-system", version)]
struct Cli {
    /// Which component
    component: Component,
}

/// The components.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Component {
    /// Registry of services, leaders and metadata, and DNS
    Discoverd,
    /// Apps, releases, formations, deployments
    Controller,
    /// Makes jobs of formations
    Scheduler,
    /// Routes requests to apps
    Router,
    /// Stores blobs in a directory
    Blobstore,
    /// Receives images
    Tarreceive,
    /// Keeps a PostgreSQL server and its place in the cluster
    Postgres,
}

impl Component {
    const fn name(self) -> &'static str {
        match self {
            Self::Discoverd => "discoverd",
            Self::Controller => "controller",
            Self::Scheduler => "scheduler",
            Self::Router => "router",
            Self::Blobstore => "blobstore",
            Self::Tarreceive => "tarreceive",
            Self::Postgres => "postgres",
        }
    }

    async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let stop = shutdown.clone().cancelled_owned();
        match self {
            Self::Discoverd => flynn_discovery::run(flynn_discovery::Options::from_env()?, shutdown).await,
            Self::Controller => flynn_controller::run(flynn_controller::Options::from_env()?, shutdown).await,
            Self::Scheduler => flynn_scheduler::run(flynn_scheduler::Options::from_env()?, stop).await,
            Self::Router => flynn_lb::run(flynn_lb::Options::from_env()?, stop).await,
            Self::Blobstore => Ok(flynn_blobs::run(flynn_blobs::Options::from_env()?, stop).await?),
            Self::Tarreceive => Ok(flynn_builds::run(flynn_builds::Options::from_env()?, stop).await?),
            Self::Postgres => Ok(flynn_postgres::run(flynn_postgres::Options::from_env()?, stop).await?),
        }
    }
}

fn main() -> ExitCode {
    let component = Cli::parse().component;
    flynn_api::tls::install_provider();
    flynn_api::server::init_logging(component.name());
    match start(component) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{} cannot go on: {error:#}", component.name());
            ExitCode::FAILURE
        }
    }
}

fn start(component: Component) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads(std::env::var(THREADS_VARIABLE).ok().as_deref())?)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    runtime.block_on(async { component.run(flynn_api::server::shutdown()).await })
}

/// How many threads shall run tasks.
fn threads(variable: Option<&str>) -> anyhow::Result<usize> {
    let Some(value) = variable else { return Ok(THREADS) };
    let number = value.parse().ok().filter(|number| (1..=256).contains(number));
    number.with_context(|| format!("{THREADS_VARIABLE} is {value:?}; it takes a number from 1 to 256"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_bounded() {
        assert_eq!(threads(None).unwrap(), THREADS);
        assert_eq!(threads(Some("4")).unwrap(), 4);
        assert!(threads(Some("0")).is_err() && threads(Some("many")).is_err());
    }

    #[test]
    fn a_component_is_called_what_its_subcommand_is_called() {
        for component in Component::value_variants() {
            assert_eq!(
                component.to_possible_value().unwrap().get_name(),
                component.name()
            );
        }
    }
}
