//! The service: options from the environment, the tasks, and the loop that plans and acts.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::server::Listener;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::act::Actor;
use crate::formations::{self, Controller};
use crate::hosts::{self, Reach};
use crate::lead::{self, Lead};
use crate::plan::plan;
use crate::policy;
use crate::shared::Shared;
use crate::status;

/// Between plans when nothing happens.
const TIMER: Duration = Duration::from_secs(10);
/// How long changes are gathered before a plan is made.
const GATHER: Duration = Duration::from_millis(10);

/// What the scheduler must be told.
#[derive(Clone)]
pub struct Options {
    /// This instance's address, as discoverd lists it.
    pub address: String,
    /// Where its status is served.
    pub listen: SocketAddr,
    /// discoverd's URL.
    pub discoverd: String,
    /// The URL at which discoverd speaks mutual TLS.
    pub cluster: String,
    /// A key of the controller.
    pub controller_key: String,
    /// The directory of its certificate.
    pub tls_dir: PathBuf,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Options {
    /// From the job's environment: `EXTERNAL_IP`, `HOST_IP`, `PORT`, `DISCOVERD`, `CONTROLLER_KEY`.
    pub fn from_env() -> anyhow::Result<Self> {
        let get = |name: &str| {
            let value = std::env::var(name).ok().filter(|value| !value.is_empty());
            value.with_context(|| {
                format!("{name} is not set: the scheduler runs as a job of a host, which sets it")
            })
        };
        let port: u16 = get("PORT")?.parse().context("PORT is not a port number")?;
        Ok(Self {
            address: format!("{}:{port}", get("EXTERNAL_IP")?),
            listen: (Ipv4Addr::UNSPECIFIED, port).into(),
            discoverd: get("DISCOVERD")?,
            cluster: format!("https://{}:{}", get("HOST_IP")?, flynn_api::discovery::PORT),
            controller_key: get("CONTROLLER_KEY")?,
            tls_dir: PathBuf::from("/etc/flynn/tls"),
        })
    }
}

/// Runs until `shutdown`.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let listener = Listener::tcp(options.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", options.listen))?;
    serve(options, listener, shutdown).await
}

/// Runs until `shutdown`, with its status on this listener.
pub async fn serve(
    options: Options,
    listener: Listener,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let shared = Arc::new(Shared::default());
    let local = Http::new(&options.discoverd)?.timeout(Duration::from_secs(5));
    let discovery = DiscoveryClient::new(local).learning(&options.tls_dir);
    let controller = Controller {
        discovery: discovery.clone(),
        key: options.controller_key,
    };
    let policy = policy::Cluster::new(options.cluster, options.tls_dir.clone());
    let reach = Reach {
        discovery: discovery.clone(),
        tls_dir: options.tls_dir,
    };
    let (lead, leads) = watch::channel(None);
    let router = status::router(Arc::clone(&shared), leads.clone());

    let mut tasks = JoinSet::new();
    tasks.spawn(lead::follow(discovery, options.address, lead));
    tasks.spawn(hosts::follow(Arc::clone(&shared), reach));
    tasks.spawn(formations::follow(Arc::clone(&shared), controller.clone()));
    tasks.spawn(formations::tell(Arc::clone(&shared), controller.clone()));
    tasks.spawn(formations::compare(Arc::clone(&shared), controller.clone()));
    tasks.spawn(policy::tell(controller, policy, leads.clone()));
    tasks.spawn(reconcile(Arc::clone(&shared), leads));
    tokio::select! {
        served = flynn_api::server::serve(listener, router, shutdown) => served.context("cannot serve the status"),
        // Tasks never end by themselves.
        ended = tasks.join_next() => Err(anyhow::anyhow!("a task of the scheduler ended: {ended:?}")),
    }
}

/// Plans and acts, woken by changes and by a timer.
async fn reconcile(shared: Arc<Shared>, mut leads: watch::Receiver<Option<Lead>>) {
    let actor = Actor::new(Arc::clone(&shared));
    let mut wake_at = None;
    loop {
        let wait = wake_at.map_or(TIMER, until).min(TIMER);
        tokio::select! {
            () = shared.changed.notified() => tokio::time::sleep(GATHER).await,
            () = tokio::time::sleep(wait) => {}
            _ = leads.changed() => {}
        }
        wake_at = None;
        if lead::current(&leads).is_none() {
            continue;
        }
        let now = Timestamp::now();
        let plan = shared.desired(|desired| shared.view(|view| plan(desired, view, now)));
        wake_at = plan.wake_at;
        actor.carry_out(&plan);
        shared.view(|view| shared.outbox(|outbox| outbox.update(view)));
        shared.reports.notify_one();
        shared.plan(|last| *last = plan);
    }
}

fn until(at: Timestamp) -> Duration {
    // What is past is now; a little more, so that it is past when it is looked at.
    Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default() + Duration::from_millis(1)
}
