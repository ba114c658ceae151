//! The network: calls between members, and from clients to members, that are late, lost, or come to nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use flynn_discovery::raft::network::LeftOut;
use flynn_discovery::raft::pace::{Pace, Turn};
use flynn_discovery::raft::{Member, Snapshot, Vote};
use openraft::async_runtime::Select2;
use openraft::errors::{NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{AsyncRuntime as _, Instant as _, OptionalSend};
use rand::RngExt as _;
use tokio::sync::oneshot;

use crate::executor::{WORLD, draw, sleep, spawn_on};
use crate::member::{ROUND, Running, SimulatedRaft};
use crate::runtime::{Instant, Runtime, Simulated, timeout};
use crate::seen::Seen;

/// A lost call is forgotten after this long.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// Who is where: members by their ids; clients are at 0 and nothing comes between them and a member.
pub(crate) const CLIENTS: u64 = 0;

#[derive(Default)]
struct State {
    running: BTreeMap<u64, Running>,
    /// Nothing gets from the one to the other.
    cut: BTreeSet<(u64, u64)>,
    /// Of a thousand messages so many are lost.
    loss: u32,
    /// The longest way, in microseconds.
    delay: u64,
    seen: Seen,
}

/// The network. Clones share it.
#[derive(Clone)]
pub(crate) struct Net(Arc<Mutex<State>>);

/// Why a call has no answer.
#[derive(Debug)]
pub(crate) enum Failed {
    /// Nobody is there, or the connection broke off.
    Refused,
    /// Nothing came back in time.
    Late,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Refused => "refused",
            Self::Late => "no answer in time",
        })
    }
}

impl std::error::Error for Failed {}

/// Microseconds.
const USUAL_DELAY: u64 = 800;

impl Net {
    pub(crate) fn new(seen: Seen) -> Self {
        Self(Arc::new(Mutex::new(State {
            delay: USUAL_DELAY,
            seen,
            ..State::default()
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A member is there from now on.
    pub(crate) fn enter(&self, id: u64, running: Running) {
        let before = self.state().running.insert(id, running);
        drop(before);
    }

    /// A member is there no more.
    pub(crate) fn leave(&self, id: u64) {
        let gone = self.state().running.remove(&id);
        drop(gone);
    }

    pub(crate) fn find(&self, id: u64) -> Option<Running> {
        self.state().running.get(&id).cloned()
    }

    /// All that run.
    pub(crate) fn running(&self) -> Vec<(u64, Running)> {
        let state = self.state();
        state
            .running
            .iter()
            .map(|(id, running)| (*id, running.clone()))
            .collect()
    }

    pub(crate) fn cut(&self, from: u64, to: u64) {
        self.state().cut.insert((from, to));
    }

    pub(crate) fn mend(&self, from: u64, to: u64) {
        self.state().cut.remove(&(from, to));
    }

    /// Loses so many messages of a thousand, and delays the others up to so many microseconds; `None`: as usual.
    pub(crate) fn disturb(&self, how: Option<(u32, u64)>) {
        let mut state = self.state();
        (state.loss, state.delay) = how.unwrap_or((0, USUAL_DELAY));
    }

    pub(crate) fn heal(&self) {
        self.state().cut.clear();
        self.disturb(None);
    }

    async fn travel(&self) {
        let longest = self.state().delay;
        if longest > USUAL_DELAY {
            self.state().seen.note("a message was late");
        }
        let took = draw(|random| random.random_range(50..=longest));
        sleep(Duration::from_micros(took)).await;
    }

    fn is_lost(&self, from: u64, to: u64) -> bool {
        let state = self.state();
        if state.cut.contains(&(from, to)) {
            state.seen.note("a message was cut off");
            return true;
        }
        let between = from != CLIENTS && to != CLIENTS;
        let lost = between && state.loss > 0 && draw(|random| random.random_range(0..1000)) < state.loss;
        if lost {
            state.seen.note("a message was lost");
        }
        lost
    }

    /// Has `handle` run at the member `to`, and gives its answer.
    pub(crate) async fn call<T, F>(
        &self,
        from: u64,
        to: u64,
        patience: Duration,
        handle: impl FnOnce(Running) -> F + 'static,
    ) -> Result<T, Failed>
    where
        T: 'static,
        F: Future<Output = T> + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let net = self.clone();
        drop(spawn_on(WORLD, async move {
            net.travel().await;
            if net.is_lost(from, to) {
                sleep(FORGOTTEN).await;
                return drop(answer);
            }
            let Some(running) = net.find(to) else {
                net.travel().await;
                return drop(answer);
            };
            let process = running.process;
            drop(spawn_on(process, async move {
                let said = handle(running).await;
                drop(spawn_on(WORLD, async move {
                    net.travel().await;
                    if net.is_lost(to, from) {
                        sleep(FORGOTTEN).await;
                        return drop(answer);
                    }
                    let _ = answer.send(said);
                }));
            }));
        }));
        match timeout(patience, answered).await {
            Ok(Ok(said)) => Ok(said),
            Ok(Err(_)) => Err(Failed::Refused),
            Err(_) => Err(Failed::Late),
        }
    }

    /// The network as a member sees it.
    pub(crate) fn of(&self, id: u64) -> Dialer {
        Dialer {
            net: self.clone(),
            from: id,
        }
    }
}

/// A member's way into the network.
#[derive(Clone)]
pub(crate) struct Dialer {
    net: Net,
    from: u64,
}

impl RaftNetworkFactory<Simulated> for Dialer {
    type Network = Link;

    async fn new_client(&mut self, target: u64, _: &Member) -> Link {
        Link {
            dialer: self.clone(),
            target,
            pace: Pace::default(),
            learners: None,
        }
    }
}

/// The way to one member.
pub(crate) struct Link {
    dialer: Dialer,
    target: u64,
    pace: Pace<Instant>,
    /// Who learns, as of when: as in the product, it is looked at once in a round only.
    learners: Option<(Instant, BTreeSet<u64>)>,
}

type Told<T> = Result<T, RaftError<Simulated>>;

impl Link {
    /// How many learners there are, if this member is one of them.
    fn learners(&mut self) -> usize {
        let now = Instant::now();
        if self.learners.as_ref().is_none_or(|(at, _)| now - *at > ROUND) {
            let sender = self.dialer.net.find(self.dialer.from);
            let learners = sender.map(|sender| sender.learners()).unwrap_or_default();
            self.learners = Some((now, learners));
        }
        match &self.learners {
            Some((_, learners)) if learners.contains(&self.target) => learners.len(),
            _ => 0,
        }
    }

    async fn call<T, F>(
        &self,
        patience: Duration,
        handle: impl FnOnce(SimulatedRaft) -> F + Send + 'static,
    ) -> Result<T, RPCError<Simulated>>
    where
        T: Send + 'static,
        F: Future<Output = Told<T>> + Send + 'static,
    {
        let (net, from, to) = (self.dialer.net.clone(), self.dialer.from, self.target);
        let (answer, answered) = oneshot::channel();
        drop(crate::executor::spawn(async move {
            let said = net.call(from, to, patience, |running| handle(running.raft)).await;
            let _ = answer.send(said);
        }));
        match answered.await {
            Ok(Ok(Ok(said))) => Ok(said),
            // As over HTTP: an error of the other's comes as an answer that has another code.
            Ok(Ok(Err(error))) => Err(RPCError::Unreachable(Unreachable::new(&error))),
            Ok(Err(error @ Failed::Late)) => Err(RPCError::Network(NetworkError::new(&error))),
            Ok(Err(error @ Failed::Refused)) => Err(RPCError::Unreachable(Unreachable::new(&error))),
            Err(error) => Err(RPCError::Unreachable(Unreachable::new(&error))),
        }
    }
}

impl RaftNetworkV2<Simulated> for Link {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Simulated>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Simulated>, RPCError<Simulated>> {
        let heartbeat = rpc
            .entries
            .is_empty()
            .then_some((rpc.vote, rpc.prev_log_id, rpc.leader_commit));
        let learners = self.learners();
        match self.pace.plan(Instant::now(), learners, heartbeat.as_ref()) {
            Turn::Now => {}
            Turn::Later(at) => Runtime::sleep_until(at).await,
            Turn::LeftOut => {
                self.dialer.net.state().seen.note("a heartbeat was left out");
                return Err(RPCError::Network(NetworkError::new(&LeftOut)));
            }
        }
        let began = Instant::now();
        let call = move |raft: SimulatedRaft| async move { raft.append_entries(rpc).await };
        let answer = self.call(option.soft_ttl(), call).await;
        let taken = matches!(answer, Ok(AppendEntriesResponse::Success));
        self.pace.sent(began, heartbeat.filter(|_| taken));
        answer
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Simulated>,
        option: RPCOption,
    ) -> Result<VoteResponse<Simulated>, RPCError<Simulated>> {
        let call = move |raft: SimulatedRaft| async move { raft.vote(rpc).await };
        self.call(option.soft_ttl(), call).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Simulated>,
        option: RPCOption,
    ) -> Result<VoteResponse<Simulated>, RPCError<Simulated>> {
        let call = move |raft: SimulatedRaft| async move { raft.pre_vote(rpc).await };
        self.call(option.soft_ttl(), call).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Simulated>, StreamingError<Simulated>> {
        let seen = self.dialer.net.state().seen.clone();
        seen.note_of(
            "a snapshot was sent",
            format_args!("to {}: {:?}", self.target, snapshot.meta.last_log_id),
        );
        let call = move |raft: SimulatedRaft| async move {
            let installed = raft.install_full_snapshot(vote, snapshot).await;
            installed.map_err(RaftError::Fatal)
        };
        let send = self.call(option.soft_ttl(), call);
        match Runtime::select2(cancel, send).await {
            Select2::First(closed) => Err(StreamingError::Closed(closed)),
            Select2::Second(result) => result.map_err(StreamingError::from),
        }
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<Simulated>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Simulated>, RPCError<Simulated>> {
        let call = move |raft: SimulatedRaft| async move {
            raft.handle_transfer_leader(rpc).await.map_err(RaftError::Fatal)
        };
        self.call(option.soft_ttl(), call).await
    }
}
