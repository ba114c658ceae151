//! The controller as a process: brings the database up to date, then serves and works until it is told to stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use flynn_api::server::{CancellationToken, Listener, serve};

use crate::data;
use crate::database::Database;
use crate::deploy::worker;
use crate::feed::Feed;
use crate::hosts::Hosts;
use crate::http;
use crate::options::Options;

/// Between clean-ups of history.
const PRUNE: Duration = Duration::from_mins(5);
/// Jobs that are over and kept, per app.
const KEPT_JOBS: i64 = 200;

/// What handlers and workers share.
pub(crate) struct Shared {
    pub(crate) database: Database,
    pub(crate) feed: Feed,
    pub(crate) hosts: Hosts,
    pub(crate) keys: Vec<String>,
    pub(crate) default_route_domain: Option<String>,
}

/// A controller whose database is up to date and which listens, but does not answer yet.
pub struct Controller {
    shared: Arc<Shared>,
    listener: Listener,
}

/// Runs a controller until `shutdown`. Waits for its database first.
pub async fn run(options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    let controller = tokio::select! {
        started = Controller::start(options) => started?,
        () = shutdown.cancelled() => return Ok(()),
    };
    controller.run(shutdown).await
}

impl Controller {
    /// Waits for the database, migrates it, and listens.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let database = Database::new(options.database)?;
        let hosts = Hosts::new(&options.discoverd, options.tls).context("DISCOVERD")?;
        database
            .migrate()
            .await
            .context("the database cannot be brought up to date")?;
        let feed = Feed::new(database.clone())
            .await
            .context("where the events begin cannot be read")?;
        let listener = Listener::tcp(options.listen)
            .await
            .with_context(|| format!("cannot listen on {}: is the port in use?", options.listen))?;
        let shared = Shared {
            feed,
            database,
            hosts,
            keys: options.keys,
            default_route_domain: options.default_route_domain,
        };
        Ok(Self {
            shared: Arc::new(shared),
            listener,
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves and works until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let Self { shared, listener } = self;
        tracing::info!(address = ?listener.local_addr(), "the controller serves");
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(shared.feed.clone().run());
        tasks.spawn(worker::run(Arc::clone(&shared)));
        tasks.spawn(prune(Arc::clone(&shared)));
        let stopped = shutdown.clone();
        let served = serve(listener, http::router(&shared), async move {
            stopped.cancelled().await;
        })
        .await;
        // A worker's transaction that is cut off here is rolled back, and goes on in the next controller.
        tasks.shutdown().await;
        served.context("serving failed")
    }
}

/// Keeps history within its bounds.
async fn prune(shared: Arc<Shared>) {
    let mut timer = tokio::time::interval(PRUNE);
    loop {
        timer.tick().await;
        let result = async {
            let client = shared.database.client().await?;
            data::events::prune(&client, data::events::KEPT).await?;
            data::jobs::prune(&client, KEPT_JOBS).await?;
            data::certificates::prune(&client).await
        };
        if let Err(why) = result.await {
            tracing::warn!(%why, "history could not be cleaned up; trying again later");
        }
    }
}
