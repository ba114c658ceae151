//! Follows the cluster network's documents in discoverd, and applies what they say: woken by changes and by a timer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use flynn_api::Result;
use flynn_api::client::Retry;
use flynn_api::discovery::{HOST_SERVICE, NetworkLeases, ServiceMeta};
use flynn_api::network::{
    ENDPOINTS_PREFIX, HostEndpoints, IDENTITIES_SERVICE, NetworkIdentities, POLICY_SERVICE, VERSION,
    WireguardPeer, endpoints_service,
};
use flynn_overlay::{WIREGUARD_PORT, Wireguard};
use futures::StreamExt as _;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::Up;
use super::wanted::{Documented, Wanted, holds};
use crate::daemon::Daemon;
use crate::leases;

/// Between applications when nothing changes.
const TIMER: Duration = Duration::from_secs(30);

/// How long changes are gathered: they come in bursts.
const GATHER: Duration = Duration::from_millis(20);

/// Between looks at this host's own lease, which are written down once a day.
const LEASE: Duration = Duration::from_mins(1);

/// Documents that every host follows.
const ALWAYS: [&str; 3] = [HOST_SERVICE, IDENTITIES_SERVICE, POLICY_SERVICE];

/// Follows, applies, publishes and renews, for ever.
pub(crate) async fn run(daemon: Arc<Daemon>) {
    tokio::join!(
        watch_all(&daemon),
        apply(&daemon),
        publish(&daemon),
        renew(&daemon),
        follow_routes(&daemon),
        follow_handshakes(&daemon),
    );
}

/// One watch for each document: those that are always there, and the endpoints of each host with a lease.
async fn watch_all(daemon: &Arc<Daemon>) {
    let mut changes = daemon.documents.subscribe();
    let mut watches: BTreeMap<String, AbortOnDropHandle<()>> = BTreeMap::new();
    loop {
        changes.mark_unchanged();
        let leases: NetworkLeases = daemon.documents.get(HOST_SERVICE).unwrap_or_default();
        let others = leases.leases.iter().filter(|(id, _)| **id != daemon.host_id);
        let endpoints: BTreeSet<String> = others
            .map(|(_, lease)| endpoints_service(&lease.subnet))
            .collect();
        let wanted = endpoints
            .iter()
            .map(String::as_str)
            .chain(ALWAYS)
            .collect::<BTreeSet<_>>();
        watches.retain(|service, _| wanted.contains(service.as_str()));
        for service in wanted {
            watches.entry(service.to_owned()).or_insert_with(|| {
                AbortOnDropHandle::new(tokio::spawn(watch(Arc::clone(daemon), service.to_owned())))
            });
        }
        if !leases.leases.is_empty() {
            let known = daemon.documents.services().into_iter();
            for old in
                known.filter(|service| service.starts_with(ENDPOINTS_PREFIX) && !endpoints.contains(service))
            {
                daemon.documents.forget(&old);
            }
        }
        // The sender lives as long as the daemon.
        let _ = changes.changed().await;
        sleep(GATHER).await;
    }
}

async fn watch(daemon: Arc<Daemon>, service: String) {
    let mut retry = Retry::default();
    loop {
        if let Err(error) = watch_connected(&daemon, &service, &mut retry).await {
            tracing::debug!(service, %error, "a document of the cluster network cannot be followed");
        }
        retry.wait().await;
    }
}

async fn watch_connected(daemon: &Daemon, service: &str, retry: &mut Retry) -> Result<()> {
    let Some(discoverd) = daemon.discovery() else {
        // Looking for a certificate costs little, and one that joins shall not wait.
        retry.reset();
        return Ok(());
    };
    let mut events = discoverd.watch(service).await?;
    while let Some(event) = events.next().await {
        let (_, event) = event?;
        retry.reset();
        if let Some(meta) = event.service_meta {
            daemon.documents.put(service, &meta);
        }
    }
    Ok(())
}

/// Has the data plane know what the documents say.
async fn apply(daemon: &Daemon) {
    let mut changes = daemon.documents.subscribe();
    let mut floating = daemon.floating_settings.subscribe();
    loop {
        tokio::select! {
            _ = changes.changed() => sleep(GATHER).await,
            _ = floating.changed() => {}
            () = sleep(TIMER) => {}
        }
        changes.mark_unchanged();
        floating.mark_unchanged();
        if let Some(up) = daemon.network.peek()
            && let Err(error) = daemon.apply_documents(&up).await
        {
            tracing::error!(%error, "the data plane does not take what the cluster says; trying on");
        }
    }
}

/// Finds the ways to other hosts anew when the kernel's routes change.
async fn follow_routes(daemon: &Daemon) {
    let mut retry = Retry::default();
    loop {
        if let Some(up) = daemon.network.peek().filter(|_| daemon.has_leases()) {
            // What changes until the kernel is listened to is found by the timer.
            if let Err(error) = up.network.follow_routes().await {
                tracing::error!(%error, "changed routes cannot be followed");
            }
        }
        retry.wait().await;
    }
}

/// Has hosts be encrypted with as soon as they answer.
async fn follow_handshakes(daemon: &Daemon) {
    let mut retry = Retry::default();
    loop {
        if let Some(up) = daemon.network.peek() {
            up.network.follow_handshakes().await;
        }
        retry.wait().await;
    }
}

/// Tells the other hosts of this one's containers: one write for each burst of changes.
async fn publish(daemon: &Daemon) {
    let mut retry = Retry::default();
    loop {
        let _ = timeout(LEASE, daemon.network.endpoints_changed.notified()).await;
        sleep(GATHER).await;
        while let Err(error) = daemon.publish_endpoints().await {
            tracing::debug!(%error, "the cluster cannot be told of this host's containers yet");
            retry.wait().await;
        }
        retry.reset();
    }
}

/// Keeps the lease fresh.
async fn renew(daemon: &Daemon) {
    let mut retry = Retry::default();
    loop {
        match daemon.renew_lease().await {
            Ok(()) => {
                retry.reset();
                sleep(LEASE).await;
            }
            Err(error) => {
                tracing::debug!(%error, "this host's subnet lease cannot be renewed yet");
                retry.wait().await;
            }
        }
    }
}

impl Daemon {
    pub(super) fn documented(&self) -> Documented {
        let documents = &self.documents;
        let services = documents.services().into_iter();
        Documented {
            leases: documents.get(HOST_SERVICE).unwrap_or_default(),
            identities: documents.get(IDENTITIES_SERVICE).unwrap_or_default(),
            policy: documents.get(POLICY_SERVICE).unwrap_or_default(),
            endpoints: services
                .filter(|service| service.starts_with(ENDPOINTS_PREFIX))
                .filter_map(|service| documents.get::<HostEndpoints>(&service))
                .collect(),
        }
    }

    /// Has the data plane know what the documents say, as far as that has changed. Everything is set anew now and
    /// then, whoever may have changed it.
    pub(crate) async fn apply_documents(&self, up: &Up) -> Result<(), flynn_overlay::Error> {
        if !self.has_leases() {
            // A disk that was emptied says nothing about what the kernel still knows.
            return Ok(());
        }
        let mut wanted = Wanted::new(&self.documented(), &self.host_id, up.subnet());
        if matches!(self.wireguard(up), Wireguard::Off) {
            wanted.hosts.iter_mut().for_each(|host| host.wireguard = None);
        }
        // Policy first: nobody is reached by those whom it excludes.
        up.network.set_policy(&wanted.policy)?;
        up.network.set_remote(&wanted.remote)?;
        // Until they are known, the kernel has those of an earlier daemon.
        if let Some(settings) = self.floating_settings.borrow().as_ref() {
            let addresses = settings.addresses.iter().map(|address| address.ip);
            up.network.set_floating(addresses.collect());
        }
        up.network.set_hosts(&wanted.hosts).await
    }

    /// Whether it was ever heard which hosts there are.
    fn has_leases(&self) -> bool {
        self.documents.get::<NetworkLeases>(HOST_SERVICE).is_some()
    }

    /// Whether hosts reach each other's containers without a tunnel, as far as is known.
    pub(crate) fn is_direct(&self) -> bool {
        let leases = self.documents.get::<NetworkLeases>(HOST_SERVICE);
        leases.is_some_and(|leases| leases.direct)
    }

    /// What there is of encryption. That the cluster is a direct one is heard only after its network is up.
    fn wireguard(&self, up: &Up) -> Wireguard {
        if self.config().encryption.is_none() && self.is_direct() {
            Wireguard::Off
        } else {
            up.network.wireguard()
        }
    }

    /// What an operator has to know of traffic to other hosts that is not encrypted.
    pub(crate) fn plain_traffic(&self) -> Vec<String> {
        let leases = self.documents.get::<NetworkLeases>(HOST_SERVICE);
        let (Some(up), Some(leases)) = (self.network.peek(), leases) else {
            return Vec::new();
        };
        let others = leases.leases.iter().filter(|(id, _)| **id != self.host_id);
        let others = others.map(|(id, lease)| (id.as_str(), lease.address)).collect();
        up.plain_traffic(&self.wireguard(&up), &others)
    }

    /// Says it once, at the start. Who has not answered yet is given the time to.
    pub(crate) fn warn_of_plain_traffic(&self) {
        let encrypts = self
            .network
            .peek()
            .is_some_and(|up| matches!(self.wireguard(&up), Wireguard::On(_)));
        if !encrypts {
            for notice in self.plain_traffic() {
                tracing::warn!("{notice}");
            }
        }
    }

    /// Why no container may use this host's subnet, if so.
    pub(crate) fn lost_lease(&self) -> Option<String> {
        let up = self.network.peek()?;
        let leases: NetworkLeases = self.documents.get(HOST_SERVICE)?;
        (!holds(&leases, &self.host_id, up.subnet())).then(|| {
            format!(
                "this host's lease of {} is gone: it was removed from the cluster, and its containers are cut off from \
                 the other hosts. Stop its jobs, empty its state directory and bring it in again with `flynn-host join`",
                up.subnet()
            )
        })
    }

    async fn publish_endpoints(&self) -> Result<()> {
        let (Some(up), Some(discoverd)) = (self.network.peek(), self.discovery()) else {
            return Ok(());
        };
        if self.lost_lease().is_some() {
            return Ok(());
        }
        let own = HostEndpoints {
            version: VERSION,
            host: self.host_id.clone(),
            identities: up
                .attachments()
                .into_iter()
                .map(|(address, attachment)| (address, attachment.identity))
                .collect(),
            wireguard: match self.wireguard(&up) {
                Wireguard::On(key) => Some(WireguardPeer {
                    key: key.to_string(),
                    port: WIREGUARD_PORT,
                }),
                Wireguard::Off | Wireguard::Unavailable(_) => None,
            },
        };
        let put = |document: &mut HostEndpoints| {
            document.clone_from(&own);
            Ok(())
        };
        discoverd
            .change_meta(&endpoints_service(up.subnet()), put)
            .await?;
        Ok(())
    }

    async fn renew_lease(&self) -> Result<()> {
        let (Some(up), Some(discoverd)) = (self.network.peek(), self.discovery()) else {
            return Err(flynn_api::Error::unavailable("this host has no network yet"));
        };
        let (address, now) = (self.config().address, jiff::Timestamp::now());
        let renew = |leases: &mut NetworkLeases| {
            // One that was taken away is not taken anew: others may have it.
            if holds(leases, &self.host_id, up.subnet()) && !leases.leases.is_empty() {
                leases::take(leases, &self.host_id, address, now)?;
            }
            Ok(())
        };
        let meta = match discoverd.change_meta(HOST_SERVICE, renew).await {
            Ok(((), meta)) => meta,
            Err(error) => {
                // This host's discoverd may have lost its place among the others: they know whether this host has.
                self.leases_of_others().await.ok_or(error)?
            }
        };
        self.documents.put(HOST_SERVICE, &meta);
        Ok(())
    }

    /// The leases as another host's discoverd knows them.
    async fn leases_of_others(&self) -> Option<ServiceMeta> {
        /// More need not be asked: any of them answers for all.
        const MOST: usize = 3;
        let known: NetworkLeases = self.documents.get(HOST_SERVICE)?;
        let others = known.leases.iter().filter(|(id, _)| **id != self.host_id);
        for (_, lease) in others.take(MOST) {
            let discoverd = self.discovery_at(lease.address)?;
            if let Ok(meta) = discoverd.meta(HOST_SERVICE).await {
                return Some(meta);
            }
        }
        None
    }

    fn identities(&self) -> Option<NetworkIdentities> {
        self.documents.get(IDENTITIES_SERVICE)
    }

    /// The number by which the data plane knows an app, if this host has heard of it.
    pub(crate) fn known_identity(&self, app: &str) -> Option<u32> {
        self.identities()?.find(app, false)
    }

    /// The number by which the data plane knows an app, asked for in discoverd at the app's first start.
    pub(crate) async fn app_identity(&self, app: &str, system: bool) -> Result<u32> {
        /// A leader may have to be elected first.
        const PATIENCE: Duration = Duration::from_secs(10);
        let known = || self.identities()?.find(app, system);
        if let Some(identity) = known() {
            return Ok(identity);
        }
        // Before there is a cluster there is nobody to tell apart.
        let Some(discoverd) = self.discovery() else {
            return Ok(flynn_api::network::OPERATOR);
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let assign = |identities: &mut NetworkIdentities| identities.assign(app, system);
            match discoverd.change_meta(IDENTITIES_SERVICE, assign).await {
                Ok((identity, meta)) => {
                    self.documents.put(IDENTITIES_SERVICE, &meta);
                    // Before its first packet.
                    if let Some(up) = self.network.peek()
                        && let Err(error) = self.apply_documents(&up).await
                    {
                        tracing::error!(app, %error, "the data plane does not take what the cluster says");
                    }
                    return Ok(identity);
                }
                Err(error) if error.retry && tokio::time::Instant::now() < deadline => {
                    sleep(Duration::from_millis(200)).await;
                    if let Some(identity) = known() {
                        return Ok(identity);
                    }
                }
                Err(mut error) => {
                    error.message = format!(
                        "this app has no identity in the cluster's network yet, and discoverd cannot give it one: {}",
                        error.message
                    );
                    return Err(error);
                }
            }
        }
    }
}
