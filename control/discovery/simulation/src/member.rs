//! A member: openraft with our log, our state machine and our configuration, and the leader's chores.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flynn_api::discovery::Consistency;
use flynn_discovery::command::Command;
use flynn_discovery::node::Forwarded;
use flynn_discovery::raft::log::LogStore;
use flynn_discovery::raft::machine::{Builder, Machine};
use flynn_discovery::raft::snapshot::Snapshots as _;
use flynn_discovery::raft::{LogId, Member, Snapshot, SnapshotMeta, StoredMembership, Timing};
use flynn_discovery::reads::read_index;
use flynn_discovery::state::State;
use flynn_discovery::view::View;
use flynn_discovery::voters::{self, Rules, Standing};
use flynn_discovery::writes::{Written, refused};
use futures::{Stream, StreamExt as _};
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::RaftError;
use openraft::storage::{EntryResponder, RaftLogStorage, RaftStateMachine};
use openraft::{ChangeMembers, Instant as _, OptionalSend, ServerState};

use crate::chronicle::Shared;
use crate::disk::{Disk, SimulatedJournal, SimulatedSnapshots};
use crate::executor::{Process, sleep};
use crate::network::Net;
use crate::runtime::{Simulated, timeout};

/// openraft's handle.
pub(crate) type SimulatedRaft = openraft::Raft<Simulated, Witness>;

/// Between two rounds of the leader's chores, as in the product.
pub(crate) const ROUND: Duration = Duration::from_secs(1);

/// As in the product, but snapshots come soon, and a silent voter is replaced soon.
fn timing() -> Timing {
    Timing {
        snapshot_after: 40,
        replace: Duration::from_secs(4),
        ..Timing::default()
    }
}

/// As in the product.
pub(crate) const RULES: Rules = Rules {
    silence: 1400,
    replace: 4000,
    settle: 2000,
    lag: 100,
};

/// The state machine, and what it applied is told to the chronicle.
pub(crate) struct Witness {
    id: u64,
    machine: Machine<SimulatedSnapshots>,
    view: Arc<View>,
    chronicle: Shared,
}

impl Witness {
    fn tell(&self) {
        let (index, state) = self.view.read_at(State::clone);
        self.chronicle.write().state(self.id, index, &state);
    }
}

type Core = Machine<SimulatedSnapshots>;

impl RaftStateMachine<Simulated> for Witness {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Builder<SimulatedSnapshots>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        RaftStateMachine::<Simulated>::applied_state(&mut self.machine).await
    }

    async fn apply<E>(&mut self, entries: E) -> Result<(), io::Error>
    where
        E: Stream<Item = Result<EntryResponder<Simulated>, io::Error>> + Unpin + OptionalSend,
    {
        let (id, chronicle) = (self.id, self.chronicle.clone());
        let witnessed = entries.inspect(move |entry| {
            if let Ok((entry, _)) = entry {
                chronicle.write().applied(id, entry);
            }
        });
        RaftStateMachine::<Simulated>::apply(&mut self.machine, witnessed).await?;
        self.tell();
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        RaftStateMachine::<Simulated>::get_snapshot_builder(&mut self.machine).await
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: Vec<u8>) -> Result<(), io::Error> {
        RaftStateMachine::<Simulated>::install_snapshot(&mut self.machine, meta, data).await?;
        self.tell();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        RaftStateMachine::<Simulated>::get_current_snapshot(&mut self.machine).await
    }
}

/// A member that runs.
#[derive(Clone)]
pub(crate) struct Running {
    pub(crate) process: Process,
    pub(crate) raft: SimulatedRaft,
    pub(crate) view: Arc<View>,
    pub(crate) log: LogStore<SimulatedJournal>,
    id: u64,
    net: Net,
    watch: Arc<Mutex<Watch>>,
}

/// What the members are called.
pub(crate) fn named(id: u64) -> Member {
    Member {
        addr: format!("192.0.2.{id}:1111"),
        host: format!("h{id}"),
        ..Member::default()
    }
}

/// Starts the member in its process, from what its disk holds.
pub(crate) async fn start(id: u64, process: Process, disk: Disk, net: Net, chronicle: Shared) -> Running {
    let log = LogStore::recover(|each| disk.open(process, each)).expect("the journal is read");
    let view = Arc::new(View::default());
    let witness = Witness {
        id,
        machine: Core::new(Arc::clone(&view), disk.snapshots()),
        view: Arc::clone(&view),
        chronicle,
    };
    let ids = {
        let mut log = log.clone();
        let state = RaftLogStorage::<Simulated>::get_log_state(&mut log).await;
        let state = state.expect("the log is in memory");
        let snapshot = disk.snapshots().load().await.expect("the snapshot is read");
        let snapshot = snapshot.and_then(|snapshot| snapshot.meta.last_log_id);
        format!(
            "{id}: purged {:?}, last {:?}, snapshot {:?}",
            state.last_purged_log_id, state.last_log_id, snapshot
        )
    };
    disk.seen().note_of("a log was read", ids);
    let config = timing().config().expect("the configuration is good");
    let raft = SimulatedRaft::new(id, config, net.of(id), log.clone(), witness).await;
    let running = Running {
        process,
        raft: raft.expect("Raft starts"),
        view,
        log,
        id,
        net: net.clone(),
        watch: Arc::default(),
    };
    net.enter(id, running.clone());
    running
}

impl Running {
    /// The ids in its log.
    pub(crate) async fn log_ids(&self) -> Vec<LogId> {
        let mut log = self.log.clone();
        let read = openraft::RaftLogReader::<Simulated>::try_get_log_entries(&mut log, ..).await;
        read.expect("the log is in memory")
            .iter()
            .map(|entry| entry.log_id)
            .collect()
    }

    /// Writes if this member leads.
    pub(crate) async fn write(self, command: Command) -> Written {
        if !self.leads() {
            return Ok(Forwarded::NotLeader);
        }
        match self.raft.client_write(command).await {
            Ok(response) => Ok(Forwarded::Taken(response.data)),
            Err(RaftError::APIError(error)) => refused(&error),
            Err(RaftError::Fatal(error)) => panic!("Raft stopped: {error}"),
        }
    }

    /// Reads here what is as fresh as that, as [`flynn_discovery::reads`] does; nothing when no leader confirms it.
    pub(crate) async fn read(self, consistency: Consistency) -> Option<(u64, State)> {
        let age = (consistency != Consistency::Lease).then_some(Duration::ZERO);
        let leader = self.raft.server_metrics().borrow_watched().current_leader?;
        let asked = if leader == self.id {
            read_index(&self.raft, age).await
        } else {
            let patience = Duration::from_secs(2);
            let ask = move |leader: Self| async move { read_index(&leader.raft, age).await };
            self.net.call(self.id, leader, patience, ask).await.ok()?
        };
        let Ok(Forwarded::Taken(index)) = asked else {
            return None;
        };
        self.view.reached(index).await;
        Some(self.view.read_at(State::clone))
    }

    pub(crate) fn leads(&self) -> bool {
        self.raft.server_metrics().borrow_watched().state == ServerState::Leader
    }

    /// Who learns.
    pub(crate) fn learners(&self) -> BTreeSet<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().learner_ids().collect()
    }

    /// If it leads, how the others do: by their answers to what is replicated, for beats are not simulated here.
    pub(crate) fn standings(&self) -> Option<Vec<Standing>> {
        let mut watch = self.watch.lock().unwrap();
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let (replication, acks) = (metrics.replication.as_ref()?, metrics.heartbeat.as_ref()?);
        let now = millis(crate::runtime::Instant::now() - crate::runtime::Instant::default());
        if watch.term != metrics.current_term {
            *watch = Watch {
                term: metrics.current_term,
                began: now,
                well: BTreeMap::new(),
            };
        }
        let last = metrics.last_log_index.unwrap_or(0);
        let members = metrics.membership_config.membership();
        let standing = |(id, member): (&u64, &Member)| {
            let own = *id == self.id;
            let ack = acks
                .get(id)
                .and_then(|ack| ack.as_ref())
                .map(|ack| millis(ack.elapsed()));
            if own || ack.is_some_and(|age| age <= RULES.silence) {
                watch.well.entry(*id).or_insert(now);
            } else {
                watch.well.remove(id);
            }
            let silent = ack.unwrap_or(u64::MAX).min(now.saturating_sub(watch.began));
            let matched = replication.get(id).and_then(|matched| matched.as_ref());
            Standing {
                id: *id,
                zone: member.host.clone(),
                vote: member.vote,
                silent: if own { 0 } else { silent },
                well: watch.well.get(id).map(|since| now.saturating_sub(*since)),
                lag: if own {
                    Some(0)
                } else {
                    matched.map(|matched| last.saturating_sub(matched.index))
                },
            }
        };
        Some(members.nodes().map(standing).collect())
    }

    /// Makes a change of the members, as [`flynn_discovery::members`] does. Whatever comes of it.
    pub(crate) async fn change(&self, change: ChangeMembers<u64, Member>) {
        let _ = timeout(ROUND * 15, self.raft.change_membership(change, true)).await;
    }

    /// Each second, if it leads: the voters that should be.
    pub(crate) async fn chores(self) {
        loop {
            sleep(ROUND).await;
            let Some(standings) = self.standings() else {
                continue;
            };
            if let Some(next) = voters::next(&standings, &self.configs(), self.id, RULES) {
                let change = self
                    .raft
                    .change_membership(ChangeMembers::ReplaceAllVoters(next), true);
                let _ = timeout(ROUND, change).await;
            }
        }
    }

    /// The voters: two sets while they change.
    pub(crate) fn configs(&self) -> Vec<BTreeSet<u64>> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_joint_config().clone()
    }
}

/// Since when a leader has seen what it sees.
#[derive(Debug, Default)]
struct Watch {
    term: u64,
    began: u64,
    well: BTreeMap<u64, u64>,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
