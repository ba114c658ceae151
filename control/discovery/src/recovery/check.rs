//! Whether a last resort may be used, and what it costs: what an operator is told before anything is done.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flynn_api::discovery::{
    CA_SERVICE, Consistency, HOST_SERVICE, NetworkLeases, OtherMember, OwnStatus, RecoveryPlan,
    RejoinRequest, RestorePlan,
};
use flynn_api::{Error, ErrorCode};
use openraft::async_runtime::WatchReceiver as _;
use openraft::vote::leader_id_adv::LeaderId;
use serde::Deserialize as _;

use super::make::decode_file;
use super::{Order, RESTORING, place, write};
use crate::members::{self, MemberChange};
use crate::node::Node;
use crate::raft::machine::encode_state;
use crate::raft::{LogId, SnapshotMeta, snapshot};
use crate::state::State;
use crate::voters::majority;

/// How long another member may take to say how it does.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at a cluster that was recovered beside this one.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Members that one can be told to join.
const MAX_MEMBERS: usize = 16;

/// What it would mean to let this member go on alone.
pub async fn recovery_plan(node: &Node) -> Result<RecoveryPlan, Error> {
    if !node.is_member().await {
        let message = "this host's discoverd belongs to no cluster: there is nothing to recover";
        return Err(Error::new(ErrorCode::NotFound, message));
    }
    let (others, works) = tokio::join!(others(node), works(node));
    let own = node.own_status();
    let last = (own.last_term, own.last_log);
    let own_vote = node.peers().iter().any(|peer| peer.id == node.id() && peer.voter);
    let voters = others.iter().filter(|other| other.peer.voter);
    let (count, there) = voters.fold((0, 0), |(count, there), voter| {
        (count + 1, there + usize::from(voter.answers))
    });
    let (count, there) = (count + usize::from(own_vote), there + usize::from(own_vote));
    let mut objections = Vec::new();
    if !works && there >= majority(count) {
        objections.push(format!(
            "{there} of {count} voters answer, which is a majority: it should mend itself within seconds"
        ));
    }
    for other in &others {
        if other.last.is_some_and(|others| others > last) {
            objections.push(format!(
                "{} has later entries (term and index {}, here {}): recover there, or they are lost",
                name(other),
                entry(other.last.unwrap_or_default()),
                entry(last),
            ));
        }
    }
    Ok(RecoveryPlan {
        id: node.id(),
        majority: works,
        last_log: own.last_log,
        last_term: own.last_term,
        committed: own.committed.max(own.applied),
        others,
        objections,
    })
}

/// Has this member go on alone after its next start, for which it ends.
pub async fn recover(node: &Node, force: bool) -> Result<RecoveryPlan, Error> {
    let plan = recovery_plan(node).await?;
    if plan.majority {
        return Err(Error::conflict(
            "a majority of the voters is there: nothing is to be recovered. A host that is lost is taken out by \
             `flynn-host remove`",
        ));
    }
    overruled(&plan.objections, force)?;
    let given = Given::new(node)?;
    given.carry_out(Order::Recover).await?;
    Ok(plan)
}

/// All of the registry as one file, and the index that it reflects.
pub async fn snapshot(node: &Node, consistency: Consistency) -> Result<(u64, Vec<u8>), Error> {
    node.ready_for(consistency).await?;
    let (index, state) = node.view.read_at(State::clone);
    let meta = {
        let metrics = node.raft.metrics();
        let metrics = metrics.borrow_watched();
        let (term, node_id) = (metrics.current_term, node.id());
        SnapshotMeta {
            // No entry up to the index is of a later term.
            last_log_id: Some(LogId::new(LeaderId { term, node_id }, index)),
            last_membership: (*metrics.membership_config).clone(),
        }
    };
    let encoded = tokio::task::spawn_blocking(move || snapshot::encode(&meta, &encode_state(&state)?));
    let encoded = encoded.await.map_err(fault)?.map_err(fault)?;
    Ok((index, encoded))
}

/// What it would mean to go on with the registry in the snapshot file `bytes`.
pub async fn restore_plan(node: &Node, bytes: &[u8]) -> Result<RestorePlan, Error> {
    let (meta, state) = decode_file(bytes).map_err(|why| Error::validation(format!("{why:#}")))?;
    let works = node.is_member().await && works(node).await;
    let (mut lost, mut changed) = (Vec::new(), Vec::new());
    let here = node.view.read(State::clone);
    for (name, of) in here.services().filter(|(name, _)| *name != CA_SERVICE) {
        match state.service(name) {
            None => lost.push(name.clone()),
            Some(then) if (&then.meta, then.leader_type) != (&of.meta, of.leader_type) => {
                changed.push(name.clone());
            }
            Some(_) => {}
        }
    }
    let mut objections = Vec::new();
    if works && here.services().next().is_some() {
        objections.push("this cluster works, and what it holds is replaced".to_owned());
    } else if node.peers().iter().any(|peer| peer.voter && peer.id != node.id()) {
        objections.push(
            "this cluster has no majority: what its members hold is replaced; `flynn-host discoverd recover` keeps what \
             this one has"
                .to_owned(),
        );
    }
    objections.extend(without_lease(node, &here, &state));
    Ok(RestorePlan {
        id: node.id(),
        index: meta.last_log_id.map_or(0, |last| last.index),
        services: state.services().count(),
        lost,
        changed,
        objections,
    })
}

/// A host without a lease has no network.
fn without_lease(node: &Node, here: &State, then: &State) -> Option<String> {
    let leases = |state: &State| {
        let meta = state.service(HOST_SERVICE)?.meta.as_ref()?;
        NetworkLeases::deserialize(&meta.data).ok()
    };
    let own = node.peers().into_iter().find(|peer| peer.id == node.id())?;
    let own: SocketAddr = own.addr.parse().ok()?;
    let (here, then) = (leases(here)?, leases(then));
    let (host, lease) = here
        .leases
        .into_iter()
        .find(|(_, lease)| std::net::IpAddr::V4(lease.address) == own.ip())?;
    let kept = then
        .as_ref()
        .and_then(|then| then.leases.get(&host))
        .is_some_and(|then| then.subnet == lease.subnet && then.address == lease.address);
    (!kept).then(|| {
        format!(
            "the snapshot does not know {host} at {} with the subnet {}: the containers of this host are cut off until it \
             has joined anew",
            lease.address, lease.subnet
        )
    })
}

/// Has this member go on alone with the registry in the snapshot file `bytes` after its next start, for which it ends.
/// Other voters first agree that it may decide alone, if they are there.
pub async fn restore(node: &Node, bytes: Vec<u8>, force: bool) -> Result<RestorePlan, Error> {
    let plan = restore_plan(node, &bytes).await?;
    overruled(&plan.objections, force)?;
    let given = Given::new(node)?;
    let others = node.peers().iter().any(|peer| peer.voter && peer.id != node.id());
    if others && works(node).await {
        members::change(node, &MemberChange::Sole { id: node.id() }).await?;
    }
    let path = node.orders.data.join(RESTORING);
    let written = tokio::task::spawn_blocking(move || write(&path, &bytes));
    written.await.map_err(fault)?.map_err(fault)?;
    given.carry_out(Order::Restore).await?;
    Ok(plan)
}

/// Has this member leave its cluster and join another after its next start, for which it ends.
pub async fn rejoin(node: &Node, request: RejoinRequest) -> Result<(), Error> {
    let own = node.peers();
    if request.members.is_empty() || request.members.len() > MAX_MEMBERS {
        return Err(Error::invalid_field(
            "members",
            "name one to sixteen members of the cluster that is to be joined, as address:1111",
        ));
    }
    for member in &request.members {
        let parsed: Result<SocketAddr, _> = member.parse();
        if parsed.is_err() {
            let why = format!("{member:?} is not an address with a port, such as 192.0.2.11:1111");
            return Err(Error::invalid_field("members", why));
        }
    }
    let asked = request.members.iter().map(|addr| status_of(node, addr));
    let answers: Vec<OwnStatus> = futures::future::join_all(asked)
        .await
        .into_iter()
        .flatten()
        .collect();
    if answers
        .iter()
        .any(|status| own.iter().any(|peer| peer.id == status.id))
    {
        return Err(Error::conflict(
            "that is a member of the cluster that this host belongs to already",
        ));
    }
    let mut objections = Vec::new();
    if !answers.iter().any(|status| status.leader.is_some()) {
        objections.push("nobody there answers who knows a leader".to_owned());
    }
    if node.is_member().await && works(node).await {
        objections.push(
            "this host belongs to a cluster that works, which loses it, and with its only voter everything"
                .to_owned(),
        );
    }
    overruled(&objections, request.force)?;
    Given::new(node)?
        .carry_out(Order::Join {
            members: request.members,
        })
        .await
}

/// The member at `addr` was recovered or restored without this one. Has this one follow it, unless its own cluster works:
/// then an operator was wrong to recover, or brought back what was lost for good, and has to say which of the two
/// clusters is to stay.
pub fn follow(node: &Node, addr: &str) {
    if node.orders.following.swap(true, Ordering::Relaxed) {
        return;
    }
    let (node, addr) = (node.clone(), addr.to_owned());
    tokio::spawn(async move {
        let led = node.has_heard_leader() || node.leads().is_some();
        if led && works(&node).await {
            tracing::error!(
                addr,
                "there are two clusters: a member of this one was recovered without its majority. Say on the hosts of the \
                 one that is to go: flynn-host discoverd rejoin --force ADDRESS"
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        } else {
            tracing::warn!(
                addr,
                "this cluster was recovered there without this member, which follows"
            );
            let order = Order::Join { members: vec![addr] };
            let followed = match Given::new(&node) {
                Ok(given) => given.carry_out(order).await,
                Err(error) => Err(error),
            };
            if let Err(error) = followed {
                tracing::error!(%error, "it cannot follow");
            }
        }
        node.orders.following.store(false, Ordering::Relaxed);
    });
}

/// An order that is being given; taken back when it is dropped before it was.
struct Given<'a> {
    node: &'a Node,
    done: bool,
}

impl<'a> Given<'a> {
    fn new(node: &'a Node) -> Result<Self, Error> {
        if node.orders.given.swap(true, Ordering::Relaxed) {
            return Err(Error::conflict(
                "another order of this kind was given: discoverd is about to start anew for it",
            ));
        }
        Ok(Self { node, done: false })
    }

    async fn carry_out(mut self, order: Order) -> Result<(), Error> {
        let data = self.node.orders.data.clone();
        let placed = tokio::task::spawn_blocking(move || place(&data, order)).await;
        let failed = |why: anyhow::Error| Error::unavailable(format!("nothing was changed: {why:#}"));
        placed.map_err(fault)?.map_err(failed)?;
        self.done = true;
        self.node.orders.anew.cancel();
        Ok(())
    }
}

impl Drop for Given<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.node.orders.given.store(false, Ordering::Relaxed);
        }
    }
}

/// Whether a majority is there.
async fn works(node: &Node) -> bool {
    node.ready_for(Consistency::Linearizable).await.is_ok()
}

async fn others(node: &Node) -> Vec<OtherMember> {
    let hosts = members::status_here(node);
    let others = hosts.into_iter().filter(|member| member.peer.id != node.id());
    let asked = others.map(|member| async move {
        let status = status_of(node, &member.peer.addr).await;
        // At its address there may be another by now.
        let status = status.filter(|status| status.id == member.peer.id);
        OtherMember {
            answers: status.is_some(),
            last: status.map(|status| (status.last_term, status.last_log)),
            host: member.host,
            peer: member.peer,
        }
    });
    futures::future::join_all(asked).await
}

async fn status_of(node: &Node, addr: &str) -> Option<OwnStatus> {
    let http = node.dialer().dial(addr).ok()?.timeout(PATIENCE);
    http.get("/cluster/status").await.ok()
}

fn overruled(objections: &[String], force: bool) -> Result<(), Error> {
    if objections.is_empty() || force {
        return Ok(());
    }
    let why = objections.join("; ");
    Err(Error::conflict(format!(
        "{why}. Nothing was changed; `--force` overrules that"
    )))
}

fn name(other: &OtherMember) -> String {
    if other.host.is_empty() {
        return other.peer.addr.clone();
    }
    format!("{} ({})", other.host, other.peer.addr)
}

fn entry((term, index): (u64, u64)) -> String {
    format!("{term}.{index}")
}

fn fault(why: impl std::fmt::Display) -> Error {
    Error::internal(why.to_string())
}
