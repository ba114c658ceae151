//! Virtual addresses of services on this host: what discoverd says about all services, brought into the maps that jobs'
//! sockets are told by, and an end to connections that lead nowhere any more.
//!
//! One task reads discoverd's stream of events; one thread ([`keeper`]) writes what follows. Without discoverd the maps
//! stay as they are, without this daemon as well.

mod keeper;
mod model;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flynn_api::discovery::{Event, VirtualNetworks};
use flynn_api::host::ServiceStatus;
use flynn_api::{Error, Result};
use flynn_dataplane::service::Services;
use futures::StreamExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use self::keeper::Keeper;
use super::{Daemon, network};

/// Between attempts, at whatever it is.
const RETRY: Duration = Duration::from_secs(1);

/// Events that may wait to be written.
const QUEUE: usize = 4096;

/// What the keeper is told.
enum News {
    /// A stream of events begins, which tells of everything first.
    Begin(VirtualNetworks),
    /// The next event.
    Event(Box<Event>),
    /// Somebody wants to see what there is.
    Show(oneshot::Sender<Option<Vec<ServiceStatus>>>),
}

/// The way to the keeper, once there is one.
#[derive(Default)]
pub(super) struct Asking(Mutex<Option<mpsc::Sender<News>>>);

impl Asking {
    fn keeper(&self) -> MutexGuard<'_, Option<mpsc::Sender<News>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the keeper, whom nobody else tells of anything any more.
    pub(super) fn end(&self) {
        self.keeper().take();
    }

    /// What `GET /host/network/services` shows.
    pub(super) async fn show(&self) -> Result<Vec<ServiceStatus>> {
        let (answer, shown) = oneshot::channel();
        let keeper = self.keeper().clone();
        if let Some(keeper) = keeper {
            // Without a keeper nobody answers, which is seen at once.
            let _ = keeper.send(News::Show(answer)).await;
        } else {
            drop(answer);
        }
        shown.await.ok().flatten().ok_or_else(|| {
            Error::unavailable(
                "this host does not know of services yet: discoverd has not told of them, or flynn-host status says \
                 why there are no virtual addresses",
            )
        })
    }
}

/// Keeps the virtual addresses right, for ever.
pub(super) async fn run(daemon: Arc<Daemon>) {
    // The network's part of the daemon sees to the BPF file system.
    while daemon.network.peek().is_none() {
        sleep(RETRY).await;
    }
    let mut said = false;
    let news = loop {
        match start(&daemon) {
            Ok(news) => break news,
            Err(error) => {
                if !said {
                    tracing::error!(%error, "services have no virtual addresses on this host; trying on");
                    daemon.notice(format!(
                        "services have no virtual addresses on this host: {error}"
                    ));
                    said = true;
                }
                sleep(RETRY).await;
            }
        }
    };
    *daemon.services.keeper() = Some(news.clone());
    let mut said = false;
    loop {
        match follow(&daemon, &news).await {
            Ok(()) => said = false,
            Err(error) if news.is_closed() => {
                tracing::error!(%error, "virtual addresses are not kept right any more");
                return;
            }
            Err(error) => {
                if !said {
                    tracing::warn!(%error, "discoverd does not tell of services; virtual addresses stay as they are");
                    said = true;
                }
            }
        }
        sleep(RETRY).await;
    }
}

/// Attaches the programs and starts the keeper.
fn start(daemon: &Arc<Daemon>) -> anyhow::Result<mpsc::Sender<News>> {
    let cgroup = crate::cgroup::jobs_v2(&daemon.hierarchies)
        .ok_or_else(|| io::Error::other("no cgroup v2 hierarchy is mounted"))?;
    let mut services = Services::open(network::PINS.as_ref())?;
    services.attach(&cgroup)?;
    let (sender, news) = mpsc::channel(QUEUE);
    let keeper = Keeper::new(Arc::clone(daemon), services);
    let runtime = tokio::runtime::Handle::current();
    // A thread of its own, for it goes into the network namespaces of jobs.
    std::thread::Builder::new()
        .name("services".into())
        .spawn(move || keeper.run(&runtime, news))?;
    Ok(sender)
}

/// Passes one stream of events on, to its end.
async fn follow(daemon: &Daemon, news: &mpsc::Sender<News>) -> anyhow::Result<()> {
    let discoverd = daemon
        .discovery()
        .ok_or_else(|| io::Error::other("this host has no certificate yet"))?;
    let networks = discoverd.virtual_networks().await?;
    let mut events = discoverd.watch_all().await?;
    news.send(News::Begin(networks)).await?;
    while let Some(event) = events.next().await {
        let (_, event) = event?;
        news.send(News::Event(Box::new(event))).await?;
    }
    Ok(())
}
