//! How a read becomes as fresh as it is asked to be.
//!
//! This member answers from its own [`crate::view::View`], once that has come to an index below which nothing can be
//! missing: the leader's commit index, taken after the read began, and after the leader has made sure that it still
//! leads. For `linearizable` it asks a majority; for `lease` it relies on the lease that a majority has given it, and
//! asks only when that has run out.
//!
//! Reads that come while others' index is being asked for share the next question, here and at the leader
//! ([`crate::gather`]).

use std::time::Duration;

use flynn_api::Error;
use flynn_api::discovery::{Consistency, Position};
use openraft::LinearizerOption;
use openraft::errors::{LinearizableReadError, RaftError};
use openraft::storage::RaftStateMachine;
use tokio::time::Instant;

use crate::gather::Gather;
use crate::node::{Forwarded, Node};
use crate::raft::Types;
use crate::view::gone;

/// How long a read waits for the leader.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// What came of a question for an index.
pub type Asked = Result<Forwarded<u64>, Error>;

/// The questions that are under way.
#[derive(Clone, Debug)]
pub struct Questions {
    /// Of the leader to a majority.
    majority: Gather<(), Asked>,
    /// To the leader, of each kind.
    linearizable: Gather<(), Asked>,
    lease: Gather<(), Asked>,
}

impl Default for Questions {
    fn default() -> Self {
        let gather = || Gather::new(usize::MAX, |()| 0);
        Self {
            majority: gather(),
            linearizable: gather(),
            lease: gather(),
        }
    }
}

impl Node {
    /// Returns once a read here is as fresh as that.
    pub async fn ready_for(&self, consistency: Consistency) -> Result<(), Error> {
        if consistency == Consistency::Local {
            return Ok(());
        }
        let deadline = Instant::now() + READ_TIMEOUT;
        let wait = async {
            let index = self.fresh_index(consistency, deadline).await?;
            self.view.reached(index).await;
            Ok(())
        };
        let late = |_| Error::unavailable("no majority of discoverd answers: what is read might be old");
        tokio::time::timeout_at(deadline, wait).await.map_err(late)?
    }

    /// Returns once a watch that has come to `since` can go on here.
    pub async fn ready_since(&self, since: Position) -> Result<(), Error> {
        if self.view.applied() < since.index {
            // This member is late, or that index is of another cluster, or of one that was restored since.
            self.ready_for(Consistency::Lease).await?;
            if self.view.applied() < since.index {
                return Err(gone(since));
            }
        }
        Ok(())
    }

    async fn fresh_index(&self, consistency: Consistency, deadline: Instant) -> Result<u64, Error> {
        loop {
            match self.leader() {
                Some((id, _)) if id == self.id() => {
                    if let Forwarded::Taken(index) = self.read_index(consistency).await? {
                        return Ok(index);
                    }
                }
                Some(_) => {
                    // An error: it may be dead, and another be elected soon.
                    if let Ok(Forwarded::Taken(index)) = self.ask_leader(consistency).await {
                        return Ok(index);
                    }
                }
                None => {}
            }
            self.election(deadline).await?;
        }
    }

    async fn ask_leader(&self, consistency: Consistency) -> Asked {
        let questions = match consistency {
            Consistency::Lease => &self.questions.lease,
            _ => &self.questions.linearizable,
        };
        let node = self.clone();
        let call = move |askers: Vec<()>| {
            let node = node.clone();
            async move {
                let answer = node.call_leader("read-index", &consistency, READ_TIMEOUT).await;
                vec![answer.unwrap_or(Ok(Forwarded::NotLeader)); askers.len()]
            }
        };
        questions.ask((), call).await.unwrap_or(Ok(Forwarded::NotLeader))
    }

    /// The index that a reader must have reached, if this member leads.
    pub async fn read_index(&self, consistency: Consistency) -> Asked {
        if consistency == Consistency::Lease {
            return read_index(&self.raft, None).await;
        }
        let raft = self.raft.clone();
        let call = move |askers: Vec<()>| {
            let raft = raft.clone();
            async move {
                let answer = read_index(&raft, Some(Duration::ZERO)).await;
                vec![answer; askers.len()]
            }
        };
        let asked = self.questions.majority.ask((), call).await;
        asked.unwrap_or(Ok(Forwarded::NotLeader))
    }
}

/// The index that a reader must have reached, if that member leads. Waits for a majority to answer, unless its last
/// answer is younger than `age`, or than its lease.
pub async fn read_index<C: Types, M: RaftStateMachine<C>>(
    raft: &openraft::Raft<C, M>,
    age: Option<Duration>,
) -> Asked {
    let option = LinearizerOption::new(age, true).with_wait_timeout(READ_TIMEOUT);
    match raft.get_read_linearizer(option).await {
        Ok(linearizer) => Ok(Forwarded::Taken(linearizer.read_log_id().index())),
        Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => Ok(Forwarded::NotLeader),
        Err(error) => Err(Error::unavailable(format!(
            "the leader cannot reach a majority: {error}"
        ))),
    }
}
