//! Who may speak to whom: from the apps' labels in the controller to the document that all hosts follow.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use flynn_api::client::controller::ControllerClient;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::{Http, Retry};
use flynn_api::network::{NetworkPolicy, POLICY_SERVICE};
use flynn_api::tls::Identity;
use flynn_api::{Error, Result};
use futures::StreamExt as _;
use tokio::sync::watch;

use crate::formations::Controller;
use crate::lead::{self, Lead};

/// Between looks when nothing happens.
const LOOK: Duration = Duration::from_secs(30);
/// How long changes are gathered.
const GATHER: Duration = Duration::from_millis(30);
/// How long discoverd may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Where discoverd takes documents from the platform's own jobs.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    url: String,
    /// The directory of the scheduler's certificate.
    tls_dir: PathBuf,
    client: OnceLock<DiscoveryClient>,
}

impl Cluster {
    pub(crate) fn new(url: String, tls_dir: PathBuf) -> Self {
        Self {
            url,
            tls_dir,
            client: OnceLock::new(),
        }
    }

    fn client(&self) -> Result<&DiscoveryClient> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let identity =
            Identity::load(&self.tls_dir).map_err(|why| Error::internal(format!("no certificate: {why}")))?;
        let http = Http::new(&self.url)?
            .identity(&identity)
            .map_err(|why| Error::internal(format!("the certificate cannot be used: {why}")))?;
        let client = DiscoveryClient::new(http.timeout(TIMEOUT)).learning(&self.tls_dir);
        Ok(self.client.get_or_init(|| client))
    }
}

/// Keeps the document up to date as long as this scheduler leads, for ever.
pub(crate) async fn tell(controller: Controller, cluster: Cluster, mut leads: watch::Receiver<Option<Lead>>) {
    let (mut attempt, mut retry) = (0, Retry::default());
    loop {
        if lead::current(&leads).is_none() {
            let _ = tokio::time::timeout(LOOK, leads.changed()).await;
            continue;
        }
        if let Err(error) = follow(&controller, &cluster, &leads, &mut attempt, &mut retry).await {
            tracing::warn!(%error, "hosts cannot be told who may speak to whom; what they know holds on");
        }
        retry.wait().await;
    }
}

async fn follow(
    controller: &Controller,
    cluster: &Cluster,
    leads: &watch::Receiver<Option<Lead>>,
    attempt: &mut usize,
    retry: &mut Retry,
) -> Result<()> {
    let client = controller.client(attempt).await?;
    let filter = flynn_api::client::controller::EventFilter::default();
    let mut events = client.event_stream(&filter, None).await?;
    while lead::current(leads).is_some() {
        let wanted = policy(&client).await?;
        let put = |document: &mut NetworkPolicy| {
            document.clone_from(&wanted);
            Ok(())
        };
        cluster.client()?.change_meta(POLICY_SERVICE, put).await?;
        retry.reset();
        match tokio::time::timeout(LOOK, events.next()).await {
            Ok(Some(event)) => drop(event?),
            Ok(None) => return Ok(()),
            Err(_) => continue,
        }
        tokio::time::sleep(GATHER).await;
    }
    Ok(())
}

async fn policy(client: &ControllerClient) -> Result<NetworkPolicy> {
    let (apps, routes) = (client.apps().await?, client.all_routes().await?);
    let ports = routes.iter().map(|route| route.port).filter(|port| *port != 0);
    Ok(NetworkPolicy::of(&apps, ports))
}
