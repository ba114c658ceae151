//! openraft's state machine: applies the log to the [`View`], makes and installs snapshots.
//!
//! The state itself is in memory; a restart reads the snapshot and applies the log up to the saved commit, so that this
//! host's last good view is there before any other member is heard.

use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use serde::{Deserialize, Serialize};

use super::snapshot::{SnapshotFile, Snapshots};
use super::{LogId, Snapshot, SnapshotMeta, StoredMembership, Types};
use crate::state::{self, State};
use crate::view::View;

/// Entries that are applied before readers get their turn.
const APPLIED_AT_ONCE: usize = 256;

/// The state machine.
#[derive(Debug)]
pub struct Machine<S = SnapshotFile> {
    view: Arc<View>,
    file: S,
    applied: Option<LogId>,
    membership: StoredMembership,
}

/// The state as a snapshot holds it.
#[derive(Serialize, Deserialize)]
struct Versioned<S> {
    version: u32,
    state: S,
}

/// The state as it is stored in a snapshot.
pub fn encode_state(state: &State) -> io::Result<Vec<u8>> {
    let version = state::VERSION;
    Ok(serde_json::to_vec(&Versioned { version, state })?)
}

/// The state that [`encode_state`] stored, here or in an earlier release.
pub fn decode_state(data: &[u8]) -> io::Result<State> {
    let versioned: Versioned<State> = serde_json::from_slice(data)?;
    if versioned.version > state::VERSION {
        let message = format!(
            "a snapshot of version {} needs a newer release",
            versioned.version
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(versioned.state)
}

impl<S> Machine<S> {
    /// An empty machine that keeps `view` and stores snapshots in `file`.
    pub fn new(view: Arc<View>, file: S) -> Self {
        Self {
            view,
            file,
            applied: None,
            membership: StoredMembership::default(),
        }
    }
}

impl<C: Types, S: Snapshots> RaftStateMachine<C> for Machine<S> {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Builder<S>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<E>(&mut self, entries: E) -> Result<(), io::Error>
    where
        E: Stream<Item = Result<EntryResponder<C>, io::Error>> + Unpin + OptionalSend,
    {
        if self.applied.is_none() {
            // Before the first entry there is nothing, whatever was answered until it came.
            self.view.replace(0, State::default());
        }
        let mut chunks = entries.ready_chunks(APPLIED_AT_ONCE);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.into_iter().collect::<Result<Vec<_>, _>>()?;
            let commands = chunk.iter().map(|(entry, _)| match &entry.payload {
                EntryPayload::Normal(command) => (entry.log_id.index, Some(command)),
                EntryPayload::Membership(_) | EntryPayload::Blank => (entry.log_id.index, None),
            });
            let outcomes = self.view.apply_all(commands);
            for ((entry, responder), outcome) in chunk.into_iter().zip(outcomes) {
                self.applied = Some(entry.log_id);
                if let EntryPayload::Membership(membership) = entry.payload {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                }
                if let Some(responder) = responder {
                    responder.send(outcome);
                }
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder<S> {
        Builder {
            file: self.file.clone(),
            meta: SnapshotMeta {
                last_log_id: self.applied,
                last_membership: self.membership.clone(),
            },
            state: self.view.read(State::clone),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: Vec<u8>) -> Result<(), io::Error> {
        let state = decode_state(&data)?;
        self.file.save(meta, data).await?;
        (self.applied, self.membership) = (meta.last_log_id, meta.last_membership.clone());
        self.view
            .replace(meta.last_log_id.map_or(0, |last| last.index), state);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        self.file.load().await
    }
}

/// Writes one snapshot.
pub struct Builder<S> {
    file: S,
    meta: SnapshotMeta,
    state: State,
}

impl<C: Types, S: Snapshots> RaftSnapshotBuilder<C> for Builder<S> {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let data = encode_state(&self.state)?;
        self.file.save(&self.meta, data.clone()).await?;
        Ok(Snapshot {
            meta: self.meta.clone(),
            snapshot: data,
        })
    }
}
