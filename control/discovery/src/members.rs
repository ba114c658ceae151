//! Who belongs to the cluster: joining, promoting, removing.
//!
//! A newcomer joins as a learner, which gets the log but has no vote. The leader makes learners voters two at a time, so
//! that the number of voters stays odd, until there are [`MAX_VOTERS`].

use std::collections::BTreeSet;
use std::time::Duration;

use flynn_api::{Error, ErrorCode};
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use serde::{Deserialize, Serialize};

use crate::node::{Forwarded, Node};
use crate::raft::Member;

/// More voters make writes slower and the cluster hardly safer.
pub const MAX_VOTERS: usize = 5;
/// A learner this many entries behind has caught up.
const CAUGHT_UP: u64 = 100;
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
    /// The learner at this address becomes a voter.
    Promote {
        /// `address:1111`.
        addr: String,
    },
    /// The member at this address goes.
    Remove {
        /// `address:1111`.
        addr: String,
    },
}

/// Has the members changed, by the leader.
pub async fn change(node: &Node, change: &MemberChange) -> Result<(), Error> {
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
    let (members, retain) = match change {
        MemberChange::Join { id, member } => match known(node, *id) {
            Some(known) if known == *member => return Ok(Forwarded::Taken(())),
            Some(_) => (ChangeMembers::SetNodes([(*id, member.clone())].into()), true),
            None => (ChangeMembers::AddNodes([(*id, member.clone())].into()), true),
        },
        MemberChange::Promote { addr } => (ChangeMembers::AddVoterIds([find(node, addr)?].into()), true),
        MemberChange::Remove { addr } => {
            let id = find(node, addr)?;
            let voters = voters(node);
            if voters.len() == 1 && voters.contains(&id) {
                let message = format!("{addr} is the only voter: promote another member first");
                return Err(Error::new(ErrorCode::Conflict, message));
            }
            if voters.contains(&id) {
                (ChangeMembers::RemoveVoters([id].into()), false)
            } else {
                (ChangeMembers::RemoveNodes([id].into()), false)
            }
        }
    };
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    loop {
        match submit(node, members.clone(), retain).await? {
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

/// What came of a change that was put to Raft.
enum Submitted {
    Taken,
    NotLeader,
    /// Another change is under way: Raft makes one at a time.
    Busy,
}

async fn submit(node: &Node, members: ChangeMembers<u64, Member>, retain: bool) -> Result<Submitted, Error> {
    use ClientWriteError::{ChangeMembershipError as Refused, ForwardToLeader};
    match node.raft.change_membership(members, retain).await {
        Ok(_) => Ok(Submitted::Taken),
        Err(RaftError::APIError(ForwardToLeader(_))) => Ok(Submitted::NotLeader),
        Err(RaftError::APIError(Refused(ChangeMembershipError::InProgress(_)))) => Ok(Submitted::Busy),
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

fn voters(node: &Node) -> BTreeSet<u64> {
    let metrics = node.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    metrics.membership_config.membership().voter_ids().collect()
}

fn find(node: &Node, addr: &str) -> Result<u64, Error> {
    let peers = node.peers();
    let peer = peers.iter().find(|peer| peer.addr == addr);
    peer.map(|peer| peer.id)
        .ok_or_else(|| Error::not_found("member", addr))
}

/// Which learners become voters, given how many voters there are and which learners have caught up.
pub fn promotions(voters: usize, caught_up: &[u64]) -> Vec<u64> {
    let target = (voters + caught_up.len()).min(MAX_VOTERS);
    let target = if target.is_multiple_of(2) {
        target - usize::from(target > 0)
    } else {
        target
    };
    caught_up
        .iter()
        .copied()
        .take(target.saturating_sub(voters))
        .collect()
}

/// If this member leads, makes voters of learners that have caught up, where that is called for.
pub async fn reconcile(node: &Node) -> Result<(), Error> {
    let learners = {
        let metrics = node.raft.metrics();
        let metrics = metrics.borrow_watched();
        let Some(replication) = &metrics.replication else {
            return Ok(());
        };
        let membership = metrics.membership_config.membership();
        let caught_up = |id: &u64| {
            let matched = replication
                .get(id)
                .and_then(|matched| matched.as_ref().map(|matched| matched.index));
            let last = metrics.last_log_index.unwrap_or(0);
            matched.is_some_and(|matched| matched + CAUGHT_UP >= last)
        };
        let learners: Vec<u64> = membership.learner_ids().filter(caught_up).collect();
        promotions(membership.voter_ids().count(), &learners)
    };
    if learners.is_empty() {
        return Ok(());
    }
    tracing::info!(?learners, "learners that have caught up become voters");
    submit(
        node,
        ChangeMembers::AddVoterIds(learners.into_iter().collect()),
        true,
    )
    .await
    .map(drop)
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

/// Hands the lead to the voter that is furthest along, if this member leads others.
pub async fn hand_over(node: &Node) {
    let next = {
        let metrics = node.raft.metrics();
        let metrics = metrics.borrow_watched();
        let voters: BTreeSet<u64> = metrics.membership_config.membership().voter_ids().collect();
        metrics.replication.as_ref().and_then(|replication| {
            let others = replication
                .iter()
                .filter(|(id, _)| **id != node.id() && voters.contains(id));
            others
                .max_by_key(|(_, matched)| matched.as_ref().map(|matched| matched.index))
                .map(|(id, _)| *id)
        })
    };
    if let Some(next) = next
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_voters_stays_odd() {
        assert!(promotions(1, &[2]).is_empty());
        assert_eq!(promotions(1, &[2, 3]), [2, 3]);
        assert_eq!(promotions(2, &[3]), [3]);
        assert!(promotions(3, &[4]).is_empty());
        assert_eq!(promotions(3, &[4, 5, 6, 7]), [4, 5]);
        assert!(promotions(5, &[6, 7]).is_empty());
        assert!(promotions(0, &[]).is_empty());
    }
}
