//! How a write finds its way to the leader, and what is said when nobody knows what became of it.
//!
//! One call at a time is under way from a member to the leader: writes that come meanwhile go with the next
//! ([`crate::gather`]), and the leader appends all of a call at once.

use std::time::Duration;

use flynn_api::{Error, ErrorCode};
use futures::StreamExt as _;
use openraft::errors::{ClientWriteError, RaftError};
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout_at};

use crate::command::{Command, Outcome};
use crate::gather::Gather;
use crate::node::{Forwarded, Node};
use crate::raft::Types;

/// How long a write may take until its outcome is given up on.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of the commands that go with one call, unless it is one alone.
const MAX_CALL: usize = 4 << 20;

/// What came of a command that was put to the leader.
pub type Written = Result<Forwarded<Outcome>, Error>;

/// Commands that wait for the next call to the leader, as JSON.
#[derive(Clone, Debug)]
pub struct Writes(Gather<Box<RawValue>, Written>);

impl Default for Writes {
    fn default() -> Self {
        Self(Gather::new(MAX_CALL, |command| command.get().len()))
    }
}

fn unknown() -> Error {
    let message = "the write was not confirmed, and may or may not have happened: read, then repeat it";
    Error::new(ErrorCode::Timeout, message)
}

impl Node {
    /// Has `command` committed and applied, here too, and gives its index.
    pub async fn write(&self, command: Command) -> Result<u64, Error> {
        let deadline = Instant::now() + WRITE_TIMEOUT;
        let outcome = timeout_at(deadline, self.repeat(&command, deadline)).await;
        match outcome.map_err(|_| unknown())?? {
            Outcome::Refused(error) => Err(error),
            Outcome::Done { index } => {
                // So that whoever wrote here can read it here.
                let reached = timeout_at(deadline, self.view.reached(index)).await;
                reached.map_err(|_| unknown())?;
                Ok(index)
            }
        }
    }

    /// Tries until the leader has taken the command.
    async fn repeat(&self, command: &Command, deadline: Instant) -> Result<Outcome, Error> {
        let mut may_be_done = false;
        loop {
            let written = if self.leads().is_some() {
                self.write_here(command).await
            } else {
                self.forward(command).await
            };
            match written {
                // The attempt whose outcome is unknown may be what stands in its way.
                Ok(Forwarded::Taken(Outcome::Refused(error))) if may_be_done && !error.surely_undone() => {
                    return Ok(Outcome::Refused(error.or_done()));
                }
                Ok(Forwarded::Taken(outcome)) => return Ok(outcome),
                Ok(Forwarded::NotLeader) => {}
                // The leader may be dead, and another be elected soon.
                Err(error) if error.may_be_done() && command.may_repeat() => may_be_done = true,
                Err(error) if error.may_be_done() => return Err(unknown()),
                Err(error) if error.code == ErrorCode::Unavailable => {}
                Err(error) => return Err(error),
            }
            let awaited = self.election(deadline).await;
            awaited.map_err(|none| if may_be_done { unknown() } else { none })?;
        }
    }

    /// Writes if this member leads.
    pub async fn write_here(&self, command: &Command) -> Written {
        if self.leads().is_none() {
            return Ok(Forwarded::NotLeader);
        }
        self.has_room()?;
        let began = Instant::now();
        match self.raft.client_write(command.clone()).await {
            Ok(response) => {
                self.metrics.commits.add(began.elapsed());
                Ok(Forwarded::Taken(response.data))
            }
            Err(RaftError::APIError(error)) => refused(&error),
            Err(RaftError::Fatal(error)) => Err(stopping(&error)),
        }
    }

    /// Writes them all in this order if this member leads; each has its own answer.
    pub async fn write_all_here(&self, commands: Vec<Command>) -> Vec<Written> {
        let count = commands.len();
        if self.leads().is_none() {
            return vec![Ok(Forwarded::NotLeader); count];
        }
        if let Err(full) = self.has_room() {
            return vec![Err(full); count];
        }
        let began = Instant::now();
        let written = match self.raft.client_write_many(commands).await {
            Ok(written) => written,
            Err(error) => return vec![Err(stopping(&error)); count],
        };
        let written = written.map(|written| match written {
            Ok(Ok(written)) => {
                self.metrics.commits.add(began.elapsed());
                Ok(Forwarded::Taken(written.response))
            }
            Ok(Err(error)) => refused(&error),
            Err(error) => Err(stopping(&error)),
        });
        let mut written: Vec<Written> = written.collect().await;
        // When Raft stops, the first that it leaves without an answer is the last that it speaks of.
        written.resize(count, Err(unknown()));
        written
    }

    fn has_room(&self) -> Result<(), Error> {
        if self.disk_is_full() {
            let message =
                "the disk of the leading discoverd is full: make room on the volume of its job, then repeat";
            return Err(Error::new(ErrorCode::LimitExceeded, message));
        }
        Ok(())
    }

    /// Puts a command to the leader, together with others.
    async fn forward(&self, command: &Command) -> Written {
        let command = serde_json::value::to_raw_value(command)
            .map_err(|why| Error::internal(format!("the command cannot be written: {why}")))?;
        let node = self.clone();
        let call = move |commands: Vec<Box<RawValue>>| {
            let node = node.clone();
            async move { node.forward_all(&commands).await }
        };
        self.writes
            .0
            .ask(command, call)
            .await
            .unwrap_or_else(|| Err(unknown()))
    }

    async fn forward_all(&self, commands: &[Box<RawValue>]) -> Vec<Written> {
        match self.call_leader("writes", &commands, WRITE_TIMEOUT).await {
            // It is of an earlier release.
            Some(Err(error)) if error.code == ErrorCode::NotFound => {
                let one_by_one = futures::stream::iter(commands).then(|command| async move {
                    let written = self.call_leader("write", command, WRITE_TIMEOUT).await;
                    written.unwrap_or(Ok(Forwarded::NotLeader))
                });
                one_by_one.collect().await
            }
            Some(Err(error)) => vec![Err(error); commands.len()],
            Some(Ok(written)) => written,
            None => vec![Ok(Forwarded::NotLeader); commands.len()],
        }
    }
}

/// What to say when Raft did not write.
pub fn refused<C: Types>(error: &ClientWriteError<C>) -> Written {
    match error {
        ClientWriteError::ForwardToLeader(_) => Ok(Forwarded::NotLeader),
        // It was appended here, and another leader may have it or not.
        _ => Err(unknown()),
    }
}

/// The command may have been appended before Raft stopped.
fn stopping(error: &dyn std::fmt::Display) -> Error {
    let message = format!(
        "this discoverd is stopping ({error}), and the write may or may not have happened: read, then repeat it"
    );
    Error::new(ErrorCode::Timeout, message)
}
