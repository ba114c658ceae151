//! discoverd: who is there, who leads, and where.
//!
//! One runs on every host, on the host's network. Together they keep a registry by Raft: services with their instances,
//! leaders and metadata, hosts and their subnet leases, the cluster CA, join tokens ([`flynn_api::discovery`]). Each
//! answers for all: reads from its own copy, writes through the leader.
//!
//! ```text
//!            cluster listener (mutual TLS)      gateway listener (plain)      DNS
//!                        │                               │                     │
//!                      http ────────────────────────── http                   dns
//!                        │                               │                     │
//!   raft/rpc ──────────  node: write, read, register, watch ─────────────────  view
//!                        │                                                     │
//!            raft: journal, snapshot, network ── command ──▶ state (pure) ─────┘
//! ```
//!
//! In: API calls, heartbeats, other members' log entries. Out: answers, event streams, DNS, log entries on disk.
//!
//! Invariants:
//! - A write that was answered is on the disks of a majority, and survives any crash.
//! - The state is the log and nothing else: [`state`] has no clock, no I/O and no randomness.
//! - The Raft index orders everything and serves as the fencing token of leaders and metadata.
//! - Nothing expires by one signal alone ([`liveness`]): who lives is kept in memory by all voters, told by the member
//!   that each instance speaks to ([`claims`]), so that a new leader knows it at once.
//! - DNS and watches answer from memory and never wait for disk or network. After a restart they answer by the last
//!   state that this host had committed, whether or not other members are there.
//! - What consensus cannot do, an operator orders ([`recovery`]): it is done while Raft is not open, and the store that it
//!   replaces is kept.
//! - Secrets (the CA's key, tokens) are in files of mode 0600 and never in logs; tokens are kept as digests.

pub mod beats;
pub mod ca;
pub mod claims;
pub mod command;
pub mod dns;
pub mod gateway;
pub mod gather;
pub mod history;
pub mod http;
pub mod liveness;
pub mod members;
pub mod metrics;
pub mod node;
mod options;
pub mod raft;
pub mod reads;
pub mod recovery;
pub mod state;
pub mod view;
pub mod voters;
pub mod weight;
pub mod writes;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use flynn_api::server::{CancellationToken, Listener, serve};
use flynn_api::tls::{ClientAuth, Live};
use openraft::async_runtime::WatchReceiver as _;

use crate::gateway::Gateway;
use crate::http::auth::Door;
use crate::members::MemberChange;
use crate::node::Node;
pub use crate::options::Options;
use crate::raft::Member;
use crate::raft::network::Dialer;

/// Connections to the cluster listener from one address that has shown no certificate: a container holds up nobody else.
const EACH: usize = 64;

/// Between two rounds of the leader's chores.
const ROUND: Duration = Duration::from_secs(1);
/// Rounds that a leader whose disk is full waits for room before it hands over.
const FULL_ROUNDS: u32 = 3;

/// Runs discoverd until `shutdown`, or until its disk fails or its store is to be another one ([`recovery`]): whoever
/// runs it starts it again.
pub async fn run(mut options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    options = tokio::task::spawn_blocking(move || recovery::begin(options)).await??;
    let live = Live::open(&options.tls, ClientAuth::Optional).context("cannot use this job's certificate")?;
    let live = Arc::new(live);
    let dialer = Dialer::new(Arc::clone(&live));
    let node = Node::start(&options.data.join("raft"), dialer, options.timing).await?;
    let addr = SocketAddr::from((options.host_ip, options.api_port));
    let listener = Listener::tls_live(addr, Arc::clone(&live))
        .await
        .with_context(|| format!("cannot listen on {addr}: is another discoverd running?"))?;
    let listener = listener.each(EACH);
    tracing::info!(%addr, member = node.id(), "discoverd is there");

    let stop = shutdown.child_token();
    let member = Member {
        addr: addr.to_string(),
        host: options.host_id.clone(),
        ..Member::default()
    };
    tokio::spawn(belong(node.clone(), options.clone(), member));
    tokio::spawn({
        let (beats, stop) = (beats::run(node.clone(), options.timing.beat), stop.clone());
        async move { stop.run_until_cancelled(beats).await }
    });
    tokio::spawn({
        let (counting, stop) = (metrics::count_leaders(node.clone()), stop.clone());
        async move { stop.run_until_cancelled(counting).await }
    });
    let gateway = Gateway {
        host_id: options.host_id.clone(),
        host_ip: options.host_ip,
        api_port: options.api_port,
        dns_port: options.dns_port,
        upstreams: options.upstreams.clone(),
    };
    tokio::spawn(gateway::run(node.clone(), gateway, stop.clone()));
    let mut served = tokio::spawn({
        let (routes, stop) = (http::router(node.clone(), Door::Cluster), stop.clone());
        async move { serve(listener, routes, stop.cancelled()).await }
    });

    let result = tokio::select! {
        result = chores(&node, &options, &live) => result,
        result = &mut served => result.context("the cluster listener has failed")?.map_err(Into::into),
        () = node.orders.anew.cancelled() => Ok(()),
        () = shutdown.cancelled() => Ok(()),
    };
    members::hand_over(&node).await;
    node.view.disconnect();
    node.closing.cancel();
    stop.cancel();
    if !served.is_finished() {
        let _ = served.await;
    }
    node.raft.shutdown().await.context("Raft did not stop")?;
    result
}

/// Makes the cluster, or joins it, or tells it of a new address.
async fn belong(node: Node, options: Options, member: Member) {
    if !node.is_member().await {
        if options.init {
            if let Err(error) = node.initialize(member).await {
                tracing::error!(%error, "the cluster cannot be made");
            }
        } else if !options.join.is_empty() {
            members::join(&node, &options.join, &member).await;
        } else {
            tracing::warn!("no cluster to belong to: set DISCOVERD_INIT or DISCOVERD_JOIN");
        }
        return;
    }
    let peers = node.peers();
    if peers.iter().all(|peer| peer.id == node.id() || !peer.voter) {
        // Nobody else votes: there is no need to wait whether a leader is heard of.
        let _ = node.raft.trigger().elect(false).await;
    }
    if peers
        .iter()
        .any(|peer| peer.id == node.id() && peer.addr != member.addr)
    {
        let change = MemberChange::Join {
            id: node.id(),
            member: member.clone(),
        };
        let here = async {
            while let Err(error) = members::change(&node, &change).await {
                tracing::warn!(%error, "the cluster cannot be told of the new address yet");
                tokio::time::sleep(ROUND).await;
            }
        };
        // A learner hears of no leader as long as that one looks for it at the old address.
        let others = peers.iter().filter(|peer| peer.id != node.id());
        let others: Vec<String> = others.map(|peer| peer.addr.clone()).collect();
        tokio::select! {
            () = here => {}
            () = members::join(&node, &others, &member) => {}
        }
    }
}

/// What has to be done each second. Ends when Raft has stopped.
async fn chores(node: &Node, options: &Options, live: &Live) -> anyhow::Result<()> {
    let (mut said, mut full) = (false, 0);
    let mut round = tokio::time::interval(ROUND);
    round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        round.tick().await;
        let running = node.raft.metrics().borrow_watched().running_state.clone();
        running.context("Raft has stopped: its disk has failed, most likely")?;
        let peers = node.peers();
        for peer in &peers {
            node.dialer().learn(peer.id, &peer.addr);
        }
        let learners = peers.iter().filter(|peer| !peer.voter);
        node.dialer().set_learners(learners.map(|peer| peer.id).collect());
        match follow_certificate(node, live, options.host_ip) {
            Ok(()) => said = false,
            Err(error) if !std::mem::replace(&mut said, true) => {
                tracing::error!(%error, "the certificate cannot be renewed; the one before stays in use");
            }
            Err(_) => {}
        }
        // It would keep all from writing, though others have room.
        full = if node.leads().is_some() && node.disk_is_full() {
            full + 1
        } else {
            0
        };
        if full >= FULL_ROUNDS {
            tracing::warn!("the disk is full: another member is to lead");
            members::hand_over(node).await;
            full = 0;
        }
        // Not awaited for long: a leader without a majority cannot write, and would miss its rounds.
        let work = async {
            node.number().await?;
            node.shorten().await?;
            let (members, ca) = tokio::join!(members::reconcile(node), ca::reconcile(node));
            members.and(ca)
        };
        if let Ok(Err(error)) = tokio::time::timeout(ROUND, work).await {
            tracing::warn!(%error, "a chore could not be done");
        }
    }
}

/// Takes a renewed certificate into use; one that has run out is replaced by the means of this host alone.
fn follow_certificate(node: &Node, live: &Live, address: Ipv4Addr) -> anyhow::Result<()> {
    if live.look()? {
        tracing::info!("the certificate was renewed, and is in use");
    }
    if let Some(own) = ca::sign_own(node, &[address.to_string()])? {
        live.replace(own)?;
        tracing::warn!(
            "this discoverd's certificate has run out: it uses one of its own making until it is renewed"
        );
    }
    Ok(())
}
