//! The way to the hosts: discoverd says where they are, mutual TLS opens their APIs.

use std::path::PathBuf;
use std::time::Duration;

use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::host::HostClient;
use flynn_api::discovery::{HOST_SERVICE, Instance};
use flynn_api::tls::Identity;
use flynn_api::{Error, Meta, Result};

/// How long discoverd may take to answer.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a host may take to answer. Starting a job includes fetching its layers.
const HOST_TIMEOUT: Duration = Duration::from_mins(5);
/// Labels of a host's instance that hold its id.
const ID: [&str; 2] = ["id", "FLYNN_HOST_ID"];
/// The label of a host that is about to go.
const SHUTDOWN: &str = "shutdown";

/// All hosts. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Hosts {
    discovery: DiscoveryClient,
    tls: PathBuf,
}

/// One host.
#[derive(Clone)]
pub(crate) struct Host {
    /// Its id.
    pub(crate) id: String,
    /// `address:port` of its API.
    pub(crate) addr: String,
    /// Its tags.
    pub(crate) tags: Meta,
    /// It is about to go: its jobs can be reached, but it gets no new ones.
    pub(crate) leaving: bool,
}

impl Hosts {
    /// Found through this discoverd, spoken to with the identity in this directory.
    pub(crate) fn new(discoverd: &str, tls: PathBuf) -> Result<Self> {
        let http = Http::new(discoverd)?.timeout(DISCOVERY_TIMEOUT);
        Ok(Self {
            discovery: DiscoveryClient::new(http).learning(&tls),
            tls,
        })
    }

    /// Those that are there.
    pub(crate) async fn list(&self) -> Result<Vec<Host>> {
        let instances = self.discovery.instances(HOST_SERVICE).await.map_err(|why| {
            let message = format!(
                "the hosts cannot be found, since discoverd does not answer: {}",
                why.message
            );
            Error::unavailable(message)
        })?;
        Ok(instances.into_iter().filter_map(host).collect())
    }

    /// The host with this id.
    pub(crate) async fn find(&self, id: &str) -> Result<Host> {
        let hosts = self.list().await?;
        hosts.into_iter().find(|host| host.id == id).ok_or_else(|| {
            Error::unavailable(format!(
                "the host {id} is not there now: it may be down or gone for good"
            ))
        })
    }

    /// A client of a host. The certificate is read anew each time, since it is renewed under way.
    pub(crate) fn client(&self, host: &Host) -> Result<HostClient> {
        let identity = Identity::load(&self.tls).and_then(|identity| identity.client_config());
        let config = identity.map_err(|why| {
            Error::internal(format!(
                "the controller's certificate for hosts cannot be used: {why}"
            ))
        })?;
        let http = Http::new(&format!("https://{}", host.addr))?
            .tls(config)
            .timeout(HOST_TIMEOUT);
        Ok(HostClient::new(http))
    }

    /// The cluster CA's certificate, PEM.
    pub(crate) async fn ca(&self) -> Result<String> {
        tokio::fs::read_to_string(self.tls.join("ca.pem"))
            .await
            .map_err(|why| {
                tracing::warn!(%why, "the cluster CA cannot be read");
                Error::not_found("cluster CA", "here: this controller runs without certificates")
            })
    }
}

/// A host of its instance, whose labels are its tags and its id.
fn host(instance: Instance) -> Option<Host> {
    let mut tags = instance.meta;
    let id = ID.iter().find_map(|name| tags.remove(*name))?;
    let leaving = tags.remove(SHUTDOWN).is_some_and(|value| value == "true");
    Some(Host {
        id,
        addr: instance.addr,
        tags,
        leaving,
    })
}
