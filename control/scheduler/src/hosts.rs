//! Follows the hosts: which there are, and what happens to their jobs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::host::HostClient;
use flynn_api::client::{Http, Retry};
use flynn_api::discovery::HOST_SERVICE;
use flynn_api::host::JobEventKind;
use flynn_api::tls::Identity;
use futures::StreamExt as _;
use tokio::task::JoinHandle;

use crate::shared::Shared;
use crate::view::Facts;

/// Between looks at discoverd when nothing happens.
const HOSTS: Duration = Duration::from_secs(5);
/// Between probes of a host.
const PROBE: Duration = Duration::from_secs(5);
/// Every so many probes, the host's jobs are listed.
const PROBES_PER_LIST: u32 = 6;
/// How long a host's API may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a stop or a start may take to be answered: layers may have to be fetched first.
const SLOW: Duration = Duration::from_mins(2);
/// The instance's label that carries the host's id.
const HOST_ID: &str = "id";
/// The instance's label that says that the host is being shut down.
const SHUTDOWN: &str = "shutdown";

/// Where hosts are found and how they are spoken to.
#[derive(Clone, Debug)]
pub(crate) struct Reach {
    pub(crate) discovery: DiscoveryClient,
    /// The directory of the scheduler's certificate. It is read for each connection, as it is renewed.
    pub(crate) tls_dir: PathBuf,
}

impl Reach {
    fn identity(&self) -> anyhow::Result<Identity> {
        Identity::load(&self.tls_dir).context("no certificate")
    }
}

fn client(addr: &str, identity: &Identity, timeout: Duration) -> anyhow::Result<HostClient> {
    let http = Http::new(&format!("https://{addr}"))?.identity(identity)?;
    Ok(HostClient::new(http.timeout(timeout)))
}

/// Follows all hosts, for ever.
pub(crate) async fn follow(shared: Arc<Shared>, reach: Reach) {
    let mut followers = Followers::default();
    let mut retry = Retry::default();
    loop {
        if let Err(error) = follow_registered(&shared, &reach, &mut followers, &mut retry).await {
            tracing::warn!(%error, "discoverd cannot be asked for the hosts");
        }
        retry.wait().await;
    }
}

async fn follow_registered(
    shared: &Arc<Shared>,
    reach: &Reach,
    followers: &mut Followers,
    retry: &mut Retry,
) -> flynn_api::Result<()> {
    let mut events = reach.discovery.watch(HOST_SERVICE).await?;
    loop {
        followers.update(shared, reach).await?;
        retry.reset();
        match tokio::time::timeout(HOSTS, events.next()).await {
            Ok(Some(event)) => drop(event?),
            Ok(None) => return Ok(()),
            Err(_) => {}
        }
    }
}

/// One task per host, with the address that it is reached at.
#[derive(Default)]
struct Followers(BTreeMap<String, (String, JoinHandle<()>)>);

impl Followers {
    async fn update(&mut self, shared: &Arc<Shared>, reach: &Reach) -> flynn_api::Result<()> {
        let mut hosts = BTreeMap::new();
        for instance in reach.discovery.instances(HOST_SERVICE).await? {
            let Some(id) = self.id_of(&instance, reach).await else {
                continue;
            };
            hosts.insert(
                id.clone(),
                instance.meta.get(SHUTDOWN).is_some_and(|value| value == "true"),
            );
            let known = self.0.get(&id).is_some_and(|(addr, _)| *addr == instance.addr);
            if !known {
                let task = tokio::spawn(follow_one(
                    Arc::clone(shared),
                    reach.clone(),
                    id.clone(),
                    instance.addr.clone(),
                ));
                if let Some((_, old)) = self.0.insert(id, (instance.addr, task)) {
                    old.abort();
                }
            }
        }
        shared.change(|view, now| {
            view.registered(&hosts, now);
            view.prune(now);
        });
        let gone =
            |id: &String| shared.view(|view| view.hosts().get(id).is_none_or(crate::view::Host::is_gone));
        self.0.retain(|id, (_, task)| {
            let keep = hosts.contains_key(id) || !gone(id);
            if !keep {
                task.abort();
                shared.reach(id, None);
            }
            keep
        });
        Ok(())
    }

    /// A host's id by its labels, or, where they do not say, by asking it.
    async fn id_of(&self, instance: &flynn_api::discovery::Instance, reach: &Reach) -> Option<String> {
        if let Some(id) = instance.meta.get(HOST_ID) {
            return Some(id.clone());
        }
        if let Some((id, _)) = self.0.iter().find(|(_, (addr, _))| *addr == instance.addr) {
            return Some(id.clone());
        }
        let client = client(&instance.addr, &reach.identity().ok()?, TIMEOUT).ok()?;
        let status = client.status().await;
        status.map(|status| status.id).ok()
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        for (_, task) in self.0.values() {
            task.abort();
        }
    }
}

async fn follow_one(shared: Arc<Shared>, reach: Reach, id: String, addr: String) {
    let mut retry = Retry::default();
    loop {
        let result = follow_connected(&shared, &reach, &id, &addr, &mut retry).await;
        let why = result
            .err()
            .map_or("the connection ended".to_owned(), |error| format!("{error:#}"));
        let answered = shared.view(|view| view.hosts().get(&id).is_some_and(|host| host.answering));
        if answered {
            tracing::warn!(host = id, why, "a host does not answer");
        }
        shared.change(|view, now| view.answering(&id, false, now));
        retry.wait().await;
    }
}

async fn follow_connected(
    shared: &Shared,
    reach: &Reach,
    id: &str,
    addr: &str,
    retry: &mut Retry,
) -> anyhow::Result<()> {
    let mut shown = reach.identity()?;
    let mut asked = client(addr, &shown, TIMEOUT)?;
    probe(shared, &asked, id).await?;
    let mut events = asked.job_events().await?;
    list(shared, &asked, id).await?;
    shared.reach(id, Some(client(addr, &shown, SLOW)?));
    shared.change(|view, now| view.answering(id, true, now));
    tracing::info!(host = id, addr, "following a host");
    retry.reset();
    let mut probes = tokio::time::interval_at(tokio::time::Instant::now() + PROBE, PROBE);
    let mut until_list = PROBES_PER_LIST;
    loop {
        tokio::select! {
            event = events.next() => {
                let Some(event) = event else { return Ok(()) };
                let (_, event) = event?;
                shared.change(|view, now| match event.event {
                    JobEventKind::Cleanup => view.forgotten(id, &event.job_id, now),
                    _ => view.observe(id, &event.job, now),
                });
            }
            _ = probes.tick() => {
                let own = reach.identity()?;
                if own != shown {
                    // The one before may be of a root that hosts trust no more.
                    asked = client(addr, &own, TIMEOUT)?;
                    shared.reach(id, Some(client(addr, &own, SLOW)?));
                    shown = own;
                }
                probe(shared, &asked, id).await?;
                until_list -= 1;
                if until_list == 0 {
                    list(shared, &asked, id).await?;
                    until_list = PROBES_PER_LIST;
                }
            }
        }
    }
}

async fn probe(shared: &Shared, client: &HostClient, id: &str) -> anyhow::Result<()> {
    let status = client.status().await?;
    anyhow::ensure!(status.id == id, "it is {}, not {id}", status.id);
    let facts = Facts::from(&status);
    let known = shared.view(|view| view.hosts().get(id).is_some_and(|host| host.facts == facts));
    if !known {
        shared.change(|view, now| view.host(id, now).facts = facts);
    }
    Ok(())
}

async fn list(shared: &Shared, client: &HostClient, id: &str) -> anyhow::Result<()> {
    let asked = shared.change(|view, _| view.ask());
    let jobs = client.jobs().await?;
    let volumes = client.volumes().await?;
    shared.change(|view, now| {
        view.list(id, asked, &jobs, now);
        view.host(id, now).volumes = volumes.into_iter().map(|volume| volume.id).collect();
    });
    Ok(())
}
