//! A cluster of processes, some of them watched.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Consistency, OwnStatus, ServiceMeta};
use flynn_discovery::Options;
use rand::Rng as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::common::process::Apart;
use crate::common::{Cluster, eventually, timing};
use crate::ledger::Ledger;
use crate::watch::{Plan, Watch};

/// Processes, and what was seen of them.
pub(crate) struct Hosts {
    pub(crate) cluster: Cluster,
    pub(crate) rng: StdRng,
    /// Points that were seen, and how often.
    pub(crate) seen: BTreeMap<String, usize>,
    /// Points that were struck at, and how often.
    pub(crate) struck: BTreeMap<String, usize>,
    clients: Vec<DiscoveryClient>,
    watches: BTreeMap<usize, Watch>,
    last: BTreeMap<usize, OwnStatus>,
    leaders: BTreeMap<u64, u64>,
}

/// Entries between two snapshots.
pub(crate) const SNAPSHOT_AFTER: u64 = 20;

/// Snapshots are made, and logs cut short, after a few entries. Elections are not so quick that many processes on few
/// cores call them for want of time.
pub(crate) fn often(options: &mut Options) {
    options.timing = timing();
    options.timing.heartbeat = Duration::from_millis(100);
    options.timing.election = Duration::from_secs(1);
    options.timing.snapshot_after = SNAPSHOT_AFTER;
}

/// By `SEED=n` what was random comes again, as far as processes allow.
pub(crate) fn seeded() -> StdRng {
    let seed = std::env::var("SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    eprintln!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

impl Hosts {
    /// One member that was never started.
    pub(crate) fn one() -> Self {
        let mut hosts = Self::around(Cluster::apart(Apart::default()));
        hosts.cluster.prepare(often);
        hosts.clients.push(hosts.cluster.client(0));
        hosts
    }

    /// So many voters that run.
    pub(crate) async fn voters(count: usize) -> Self {
        Self::voters_with(count, |_| ()).await
    }

    /// [`Hosts::voters`] with other options.
    pub(crate) async fn voters_with(count: usize, change: impl Fn(&mut Options)) -> Self {
        let mut hosts = Self::around(Cluster::apart(Apart::default()));
        let change = |options: &mut Options| {
            often(options);
            change(options);
        };
        hosts.cluster.grow(count, change).await;
        hosts.clients = (0..count).map(|at| hosts.cluster.client(at)).collect();
        hosts
    }

    fn around(cluster: Cluster) -> Self {
        Self {
            cluster,
            rng: seeded(),
            seen: BTreeMap::new(),
            struck: BTreeMap::new(),
            clients: Vec::new(),
            watches: BTreeMap::new(),
            last: BTreeMap::new(),
            leaders: BTreeMap::new(),
        }
    }

    pub(crate) fn client(&self, at: usize) -> &DiscoveryClient {
        &self.clients[at]
    }

    pub(crate) fn clients(&self) -> &[DiscoveryClient] {
        &self.clients
    }

    pub(crate) fn watch(&self, at: usize) -> &Watch {
        &self.watches[&at]
    }

    /// Starts a member.
    pub(crate) fn start(&mut self, at: usize) {
        self.cluster.members[at].apart = Some(Apart::default());
        self.cluster.members[at].start();
    }

    /// Starts a member that is watched.
    pub(crate) fn start_watched(&mut self, at: usize, plan: Plan) {
        let member = &mut self.cluster.members[at];
        member.apart = Some(Apart {
            watched: true,
            ..Apart::default()
        });
        member.start();
        self.watches
            .insert(at, Watch::new(member.pid(), &member.options.data, plan));
    }

    /// Kills a member; if its power is to be cut, that has happened.
    pub(crate) fn kill(&mut self, at: usize) {
        self.cluster.members[at].kill();
        if let Some(watch) = self.watches.remove(&at) {
            for point in watch.struck() {
                *self.struck.entry(point).or_default() += 1;
            }
            for (point, count) in watch.end(self.rng.random()) {
                *self.seen.entry(point).or_default() += count;
            }
        }
    }

    /// Waits until a member was struck as planned, or the answer comes.
    pub(crate) async fn struck_or<T>(&mut self, at: usize, answer: impl AsyncFn() -> Option<T>) -> Option<T> {
        let (member, watch) = (&self.cluster.members[at], &self.watches[&at]);
        let answer = eventually(&format!("{:?}", watch.plan()), async || {
            if watch.plan().is_empty() && member.has_ended() {
                return Some(None);
            }
            answer().await.map(Some)
        })
        .await;
        if answer.is_none() {
            self.kill(at);
        }
        answer
    }

    /// Waits until a member was struck as planned.
    pub(crate) async fn struck(&mut self, at: usize) {
        self.struck_or::<()>(at, async || None).await;
    }

    /// Gives a member that does not run another address.
    pub(crate) fn move_to(&mut self, at: usize, ip: Ipv4Addr) {
        self.cluster.move_to(at, ip);
        self.clients[at] = self.cluster.client(at);
    }

    /// Waits until a member has a leader. It is who it was, and its term has not gone back.
    pub(crate) async fn ready(&mut self, at: usize) {
        self.cluster.ready(at).await;
        let client = &self.clients[at];
        let now = eventually("a status", async || client.own_status().await.ok()).await;
        if let Some(last) = self.last.get(&at) {
            assert_eq!(now.id, last.id, "it has another id");
            assert!(
                now.term >= last.term,
                "its vote was forgotten: {last:?}, then {now:?}"
            );
        }
        if now.state == "leader" {
            let leader = *self.leaders.entry(now.term).or_insert(now.id);
            assert_eq!(leader, now.id, "two lead in term {}", now.term);
        }
        self.last.insert(at, now);
    }

    /// All of them run: they hold what was acknowledged, and agree.
    pub(crate) async fn agree(&mut self, ledger: &Ledger) {
        for at in 0..self.clients.len() {
            self.ready(at).await;
            ledger.check(&self.clients[at]).await;
        }
        let local: Vec<DiscoveryClient> = self
            .clients
            .iter()
            .map(|client| client.clone().consistency(Consistency::Local))
            .collect();
        eventually("agreement", async || {
            let mut states: Vec<BTreeMap<String, Option<ServiceMeta>>> = Vec::new();
            for client in &local {
                let mut state = BTreeMap::new();
                for service in client.services().await.ok()? {
                    let meta = client.find_meta(&service).await.ok()?;
                    state.insert(service, meta);
                }
                states.push(state);
            }
            states.iter().all(|state| *state == states[0]).then_some(())
        })
        .await;
    }
}
