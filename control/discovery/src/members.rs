//! Who belongs to the cluster: joining, voting, removing.
//!
//! A newcomer joins as a learner, which gets the log but has no vote. Each second the leader has [`voters`] say who should
//! vote, and makes one change at a time towards that.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flynn_api::discovery::{HOST_SERVICE, MemberStatus, Voting};
use flynn_api::{Error, ErrorCode};
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use serde::{Deserialize, Serialize};

use crate::node::{Forwarded, Node};
use crate::raft::Member;
use crate::voters::{self, Standing};

/// How long a change of members may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Between two looks at whether another change is through.
const PAUSE: Duration = Duration::from_millis(20);

/// A change of the members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberChange {
    /// A learner comes, or a member has another address.
    Join {
        /// Its Raft id.
        id: u64,
        /// What to know of it.
        member: Member,
    },
    /// The operator says whether a member is to vote.
    Vote {
        /// Its address, host or id.
        peer: String,
        /// Whether.
        vote: Voting,
    },
    /// A member is to be the only voter.
    Sole {
        /// Its Raft id.
        id: u64,
    },
    /// A member goes.
    Remove {
        /// Its address, host or id.
        peer: String,
    },
}

/// Has the members changed, by the leader.
pub async fn change(node: &Node, change: &MemberChange) -> Result<(), Error> {
    if let MemberChange::Join { id, member } = change {
        // It may be needed to elect the leader that writes down where it is.
        node.dialer().moved(*id, &member.addr);
    }
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    let attempt = async {
        loop {
            if let Forwarded::Taken(()) = change_here(node, change).await? {
                return Ok(());
            }
            if let Some((id, member)) = node.leader().filter(|(id, _)| *id != node.id())
                && let Forwarded::Taken(()) = node.call(id, &member, "members", change).await?
            {
                return Ok(());
            }
            node.election(deadline).await?;
        }
    };
    let late =
        |_| Error::unavailable("the members could not be changed in time: a majority of them is needed");
    tokio::time::timeout_at(deadline, attempt).await.map_err(late)?
}

/// Changes the members if this one leads.
pub async fn change_here(node: &Node, change: &MemberChange) -> Result<Forwarded<()>, Error> {
    if node.leads().is_none() {
        return Ok(Forwarded::NotLeader);
    }
    match change {
        MemberChange::Join { id, member } => {
            let members = match known(node, *id) {
                Some(known) if known.addr == member.addr && known.host == member.host => {
                    return Ok(Forwarded::Taken(()));
                }
                Some(known) => {
                    let (addr, host) = (member.addr.clone(), member.host.clone());
                    ChangeMembers::SetNodes([(*id, Member { addr, host, ..known })].into())
                }
                None => ChangeMembers::AddNodes([(*id, member.clone())].into()),
            };
            carry_out(node, members).await
        }
        MemberChange::Vote { peer, vote } => set_vote(node, peer, *vote).await,
        MemberChange::Sole { id } => {
            carry_out(node, ChangeMembers::ReplaceAllVoters(BTreeSet::from([*id]))).await
        }
        MemberChange::Remove { peer } => remove(node, peer).await,
    }
}

/// Puts a change to Raft, once no other is under way.
async fn carry_out(node: &Node, members: ChangeMembers<u64, Member>) -> Result<Forwarded<()>, Error> {
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    loop {
        match submit(node, members.clone()).await? {
            Submitted::Taken => return Ok(Forwarded::Taken(())),
            Submitted::NotLeader => return Ok(Forwarded::NotLeader),
            // A learner that is being made a voter, say.
            Submitted::Busy if tokio::time::Instant::now() < deadline => tokio::time::sleep(PAUSE).await,
            Submitted::Busy => {
                return Err(Error::unavailable(
                    "another change of the members does not come to its end",
                ));
            }
        }
    }
}

async fn set_vote(node: &Node, peer: &str, vote: Voting) -> Result<Forwarded<()>, Error> {
    let id = find(node, peer)?;
    let (Some(member), Some(mut standings)) = (known(node, id), node.standings()) else {
        return Ok(Forwarded::NotLeader);
    };
    let configs = configs(node);
    let present = configs.last().cloned().unwrap_or_default();
    for standing in standings.iter_mut().filter(|standing| standing.id == id) {
        standing.vote = vote;
    }
    // A change that is under way is not waited for: what comes of it is `present`.
    let next = voters::next(
        &standings,
        std::slice::from_ref(&present),
        node.id(),
        node.rules(),
    );
    let next = next.unwrap_or(present);
    let refused = |why: &str| Err(Error::conflict(format!("{peer} {why}")));
    match vote {
        Voting::Promoted if !next.contains(&id) => {
            return refused(
                "cannot vote now: it must be well and have the log, and all votes may be those of members that were \
                 promoted before; `flynn-host list` shows it",
            );
        }
        Voting::Demoted if next.contains(&id) => {
            return refused(
                "cannot lose its vote: too few of the others are well. Bring another host in first, and wait until \
                 `flynn-host list` shows that it has the log",
            );
        }
        _ => {}
    }
    let node_of = ChangeMembers::SetNodes([(id, Member { vote, ..member })].into());
    carry_out(
        node,
        ChangeMembers::Batch(vec![node_of, ChangeMembers::ReplaceAllVoters(next)]),
    )
    .await
}

async fn remove(node: &Node, peer: &str) -> Result<Forwarded<()>, Error> {
    let id = find(node, peer)?;
    let Some(standings) = node.standings() else {
        return Ok(Forwarded::NotLeader);
    };
    let configs = configs(node);
    let present = configs.last().cloned().unwrap_or_default();
    if configs.iter().any(|voters| voters.contains(&id)) {
        let next = voters::without(&standings, &present, node.id(), node.rules(), id);
        let next = next.ok_or_else(|| {
            let message = format!(
                "without {peer} no majority would be left: of the other voters too few are well, and no other member is. \
                 Bring another host in first, and wait until `flynn-host list` shows that it has the log"
            );
            Error::new(ErrorCode::Conflict, message)
        })?;
        if id == node.id() {
            // Whoever leads next takes it out.
            if next.iter().any(|other| present.contains(other)) {
                hand_over(node).await;
            } else {
                carry_out(node, ChangeMembers::ReplaceAllVoters(next)).await?;
            }
            return Ok(Forwarded::NotLeader);
        }
        if let Forwarded::NotLeader = carry_out(node, ChangeMembers::ReplaceAllVoters(next)).await? {
            return Ok(Forwarded::NotLeader);
        }
    }
    carry_out(node, ChangeMembers::RemoveNodes([id].into())).await
}

/// What came of a change that was put to Raft.
enum Submitted {
    Taken,
    NotLeader,
    /// Another change is under way: Raft makes one at a time.
    Busy,
}

async fn submit(node: &Node, members: ChangeMembers<u64, Member>) -> Result<Submitted, Error> {
    use ChangeMembershipError::{InProgress, UncommittedLeaderLog};
    use ClientWriteError::{ChangeMembershipError as Refused, ForwardToLeader, PreconditionFailed};
    match node.raft.change_membership(members, true).await {
        Ok(_) => Ok(Submitted::Taken),
        Err(RaftError::APIError(ForwardToLeader(_))) => Ok(Submitted::NotLeader),
        // Another change came in between, or the new leader has not begun yet.
        Err(RaftError::APIError(
            Refused(InProgress(_) | UncommittedLeaderLog(_)) | PreconditionFailed(_),
        )) => Ok(Submitted::Busy),
        Err(RaftError::APIError(error)) => Err(Error::conflict(format!(
            "the members cannot be changed now: {error}"
        ))),
        Err(RaftError::Fatal(error)) => {
            Err(Error::unavailable(format!("this discoverd is stopping: {error}")))
        }
    }
}

fn known(node: &Node, id: u64) -> Option<Member> {
    let metrics = node.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    metrics.membership_config.membership().get_node(&id).cloned()
}

/// The voters: two sets while they change.
pub(crate) fn configs(node: &Node) -> Vec<BTreeSet<u64>> {
    let metrics = node.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    metrics.membership_config.membership().get_joint_config().clone()
}

/// A member by its address, its host or its id.
fn find(node: &Node, peer: &str) -> Result<u64, Error> {
    let metrics = node.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let membership = metrics.membership_config.membership();
    let id = peer.parse().ok();
    let mut found = membership
        .nodes()
        .filter(|(known, member)| member.addr == peer || member.host == peer || Some(**known) == id);
    match (found.next(), found.next()) {
        (Some((id, _)), None) => Ok(*id),
        (None, _) => Err(Error::not_found("member", peer)),
        (Some(_), Some(_)) => Err(Error::conflict(format!(
            "{peer} has several members: name one by its address or id (`flynn-host list --json`)"
        ))),
    }
}

/// If this member leads, makes the next change that is called for. To be called each second.
pub async fn reconcile(node: &Node) -> Result<(), Error> {
    let Some(standings) = node.standings() else {
        return Ok(());
    };
    if node.orders.given.load(Ordering::Relaxed) {
        // It is about to end, and perhaps the only voter on purpose.
        return Ok(());
    }
    let configs = configs(node);
    if let [voters] = &configs[..]
        && !voters.contains(&node.id())
    {
        // openraft has a leader that lost its vote lead on, as long as it is a member.
        hand_over(node).await;
        return Ok(());
    }
    if let Some(next) = voters::next(&standings, &configs, node.id(), node.rules()) {
        let (from, to) = (configs.last(), &next);
        tracing::info!(?from, ?to, "the voters change");
        return submit(node, ChangeMembers::ReplaceAllVoters(next))
            .await
            .map(drop);
    }
    match moved_zone(node) {
        Some((id, member)) => submit(node, ChangeMembers::SetNodes([(id, member)].into()))
            .await
            .map(drop),
        None => Ok(()),
    }
}

/// A member whose host has another tag `zone` than is known, with that. A host that is away keeps its zone.
fn moved_zone(node: &Node) -> Option<(u64, Member)> {
    let metrics = node.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let members = metrics.membership_config.membership();
    node.view.read(|state| {
        let hosts = state.service(HOST_SERVICE)?;
        members.nodes().find_map(|(id, member)| {
            let host = |instance: &&flynn_api::discovery::Instance| {
                instance.meta.get("id").is_some_and(|id| *id == member.host)
            };
            let meta = &hosts.instances.values().find(host)?.meta;
            let zone = meta.get("zone").cloned().unwrap_or_default();
            let moved = Member {
                zone,
                ..member.clone()
            };
            (moved != *member).then_some((*id, moved))
        })
    })
}

/// The members and how they do: what the leader says, and what is known here if none answers.
pub async fn status(node: &Node) -> Vec<MemberStatus> {
    if node.leads().is_none()
        && let Some((id, member)) = node.leader()
        && let Ok(Ok(Forwarded::Taken(all))) = tokio::time::timeout(
            Duration::from_secs(2),
            node.call::<Forwarded<Vec<MemberStatus>>>(id, &member, "member-status", &()),
        )
        .await
    {
        return all;
    }
    status_here(node)
}

/// [`status`] as it is known here.
pub fn status_here(node: &Node) -> Vec<MemberStatus> {
    let standings = node.standings().unwrap_or_default();
    let last = node.raft.metrics().borrow_watched().last_log_index.unwrap_or(0);
    let all = node.peers().into_iter().map(|peer| {
        let member = known(node, peer.id).unwrap_or_default();
        let standing: Option<&Standing> = standings.iter().find(|standing| standing.id == peer.id);
        let lag = standing.and_then(|standing| standing.lag);
        MemberStatus {
            host: member.host,
            zone: member.zone,
            vote: member.vote,
            index: lag.map(|lag| last.saturating_sub(lag)),
            lag,
            silent_ms: standing.map(|standing| standing.silent),
            peer,
        }
    });
    all.collect()
}

/// Asks the members at `addrs` to take this one in, until one of them does.
pub async fn join(node: &Node, addrs: &[String], member: &Member) {
    let change = MemberChange::Join {
        id: node.id(),
        member: member.clone(),
    };
    let mut wait = Duration::from_millis(100);
    loop {
        for addr in addrs.iter().filter(|addr| **addr != member.addr) {
            let asked = async {
                let http = node.dialer().dial(addr)?.timeout(TIMEOUT);
                http.post::<()>("/raft/members", &change).await
            };
            match asked.await {
                Ok(()) => return,
                Err(error) => tracing::warn!(addr, %error, "cannot join the cluster there yet"),
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(5));
    }
}

/// Hands the lead to the voter that is furthest along of those that are there, if this member leads others.
pub async fn hand_over(node: &Node) {
    let standings = node.standings().unwrap_or_default();
    let voters: BTreeSet<u64> = node
        .peers()
        .into_iter()
        .filter(|peer| peer.voter)
        .map(|peer| peer.id)
        .collect();
    let there = standings
        .into_iter()
        .filter(|of| of.id != node.id() && voters.contains(&of.id) && of.silent <= node.rules().silence);
    let next = there.filter_map(|of| Some((of.lag?, of.id))).min();
    if let Some((_, next)) = next
        && node.raft.trigger().transfer_leader(next).await.is_ok()
    {
        let handed = node.raft.wait(Some(Duration::from_secs(1)));
        let _ = handed
            .metrics(
                |metrics| metrics.current_leader != Some(node.id()),
                "the lead is handed over",
            )
            .await;
    }
}
