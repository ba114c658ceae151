//! Beats: each member tells every voter, a few times a second, that it lives, and which instances with it.
//!
//! The leader looks into those whose beats are missing: it probes the API port of their hosts (a refusal is an answer:
//! somebody is there to refuse) and asks the other voters whether they hear them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flynn_api::ErrorCode;
use flynn_api::discovery::Peer;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::claims::{Beat, Heard, Told};
use crate::node::Node;
use crate::raft::Member;
use crate::recovery;

/// Between two rounds.
const ROUND: Duration = Duration::from_millis(100);
/// How long a beat may be on its way.
const PATIENCE: Duration = Duration::from_millis(800);
/// How long a host may take to answer a probe, and a voter to say whom it hears.
const PROBE: Duration = Duration::from_millis(300);

/// Sends beats and makes of those of the others what is to be made of them, for ever.
pub async fn run(node: Node, every: Duration) {
    let mut senders = Senders::default();
    let looked_at: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
    let mut round = interval(ROUND);
    round.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut expiring: Option<tokio::task::JoinHandle<()>> = None;
    loop {
        round.tick().await;
        node.tick();
        let peers = node.peers();
        senders.keep(&node, &peers, every);
        for suspect in node.suspects() {
            let new = looked_at
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(suspect);
            if new {
                let (node, peers, looked_at) = (node.clone(), peers.clone(), Arc::clone(&looked_at));
                tokio::spawn(async move {
                    look_into(&node, &peers, suspect).await;
                    looked_at
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(&suspect);
                });
            }
        }
        // Not awaited: a leader without a majority cannot write, and its clock must go on.
        if expiring.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) {
            let node = node.clone();
            expiring = Some(tokio::spawn(async move {
                if let Err(error) = node.expire().await {
                    tracing::warn!(%error, "those who live no more cannot be taken out");
                }
            }));
        }
    }
}

/// A task for each voter.
#[derive(Default)]
struct Senders(HashMap<u64, AbortHandle>);

impl Senders {
    fn keep(&mut self, node: &Node, peers: &[Peer], every: Duration) {
        let voters: BTreeSet<u64> = peers
            .iter()
            .filter(|peer| peer.voter)
            .map(|peer| peer.id)
            .collect();
        self.0.retain(|id, sender| {
            let stays = voters.contains(id);
            if !stays {
                sender.abort();
            }
            stays
        });
        for voter in voters {
            self.0
                .entry(voter)
                .or_insert_with(|| tokio::spawn(send(node.clone(), voter, every)).abort_handle());
        }
    }
}

impl Drop for Senders {
    fn drop(&mut self) {
        for sender in self.0.values() {
            sender.abort();
        }
    }
}

/// Tells one voter, for ever.
async fn send(node: Node, voter: u64, every: Duration) {
    let mut told = Told::default();
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (beat, next) = node.next_beat(&told);
        let heard = tell(&node, voter, beat).await;
        match (heard, next) {
            (Some(Heard { understood: true }), Some(next)) => told = next,
            (Some(Heard { understood: true }), None) => {}
            // It has started anew, or has taken a beat whose answer was lost: it is told everything, and at once if it
            // answers.
            (heard, _) => {
                told = Told::default();
                if heard.is_some() {
                    tick.reset_immediately();
                }
            }
        }
    }
}

async fn tell(node: &Node, voter: u64, beat: Beat) -> Option<Heard> {
    if voter == node.id() {
        return Some(node.beat(beat));
    }
    let peers = node.peers();
    let peer = peers.into_iter().find(|peer| peer.id == voter)?;
    call(node, voter, peer.addr, "beat", &beat, PATIENCE).await
}

/// Whether a suspect's host answers, and whether another voter hears it.
async fn look_into(node: &Node, peers: &[Peer], suspect: u64) {
    let began = node.now();
    let Some(found) = peers.iter().find(|peer| peer.id == suspect) else {
        return;
    };
    let suspects = [suspect];
    let asked = peers
        .iter()
        .filter(|peer| peer.voter && peer.id != node.id() && peer.id != suspect)
        .map(|peer| call::<BTreeMap<u64, u64>>(node, peer.id, peer.addr.clone(), "ages", &suspects, PROBE));
    let (answered, ages) = tokio::join!(answers(&found.addr), futures::future::join_all(asked));
    let age = ages
        .into_iter()
        .flatten()
        .filter_map(|ages| ages.get(&suspect).copied())
        .min();
    node.looked_into(suspect, began, answered, age);
}

/// Whether the host of the discoverd at `addr` answers.
async fn answers(addr: &str) -> bool {
    let Ok(addr) = addr.parse::<SocketAddr>() else {
        return false;
    };
    let api = SocketAddr::new(addr.ip(), flynn_api::host::PORT);
    match timeout(PROBE, TcpStream::connect(api)).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

async fn call<T: serde::de::DeserializeOwned>(
    node: &Node,
    id: u64,
    addr: String,
    what: &str,
    body: &(impl serde::Serialize + ?Sized),
    patience: Duration,
) -> Option<T> {
    let member = Member {
        addr,
        ..Member::default()
    };
    match timeout(patience, node.call(id, &member, what, &body)).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::debug!(member = id, %error, "{what}: no answer");
            if error.code == ErrorCode::Gone {
                recovery::follow(node, &member.addr);
            }
            None
        }
        Err(_) => None,
    }
}
