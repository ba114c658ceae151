//! This member: writes that find their way to the leader, reads that are as fresh as asked, heartbeats.
//!
//! Whoever calls need not know who leads. A command goes to the leader, wherever that is ([`crate::writes`]); reads are
//! answered from this host's [`View`], after [`Node::ready_for`] where they must not be stale. The HTTP API therefore
//! works alike on every host.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use flynn_api::discovery::{Instance, OwnStatus, Peer};
use flynn_api::server::CancellationToken;
use flynn_api::{Error, ErrorCode};
use openraft::{Instant as _, ServerState, async_runtime::WatchReceiver as _};
use serde::{Deserialize, Serialize};

use crate::claims::{Beat, Claims, Heard, Told};
use crate::command::Command;
use crate::liveness::{Lead, Liveness, Times};
use crate::metrics::{Metrics, Times as Durations};
use crate::raft::log::LogStore;
use crate::raft::machine::Machine;
use crate::raft::network::Dialer;
use crate::raft::snapshot::SnapshotFile;
use crate::raft::{Member, Raft, Timing, dir};
use crate::reads::Questions;
use crate::recovery;
use crate::state::State;
use crate::view::View;
use crate::voters::{Rules, Standing};
use crate::writes::{WRITE_TIMEOUT, Writes};

/// A log longer than this is cut short.
const MAX_LOG_BYTES: u64 = 32 << 20;
/// A member this many entries behind has caught up.
const CAUGHT_UP: u64 = 100;
/// A leader whom no majority has answered for this long leads nobody: it cannot write, and others may have elected another.
/// Nor does one that a follower has not heard for this long.
const UNANSWERED: Duration = Duration::from_secs(2);

/// A member of the cluster. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    /// openraft's handle.
    pub raft: Raft,
    /// The state as far as it is known here.
    pub view: Arc<View>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    id: u64,
    dialer: Dialer,
    log: LogStore,
    claims: Arc<Mutex<Claims>>,
    liveness: Arc<Mutex<Liveness>>,
    watch: Arc<Mutex<Watch>>,
    pub(crate) questions: Questions,
    pub(crate) writes: Writes,
    rules: Rules,
    pub(crate) orders: Arc<Orders>,
    ca_settle: Duration,
    began: Instant,
    /// Told from those of other starts.
    session: u64,
    /// It is about to end: lines to it end.
    pub(crate) closing: CancellationToken,
    /// When a leader was heard last, by [`Node::now`]; 0 before the first.
    heard_leader: Arc<AtomicU64>,
    // Held until the last clone is gone: one process alone may use the directory.
    _lock: Arc<std::fs::File>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// What is to be done about this member's store when it is not open ([`recovery`]).
#[derive(Debug)]
pub(crate) struct Orders {
    /// The data directory.
    pub(crate) data: PathBuf,
    /// Why the last one was not carried out.
    refused: Option<String>,
    /// Ids that this member had before it was recovered or restored.
    former: Vec<u64>,
    /// One is given: this member is about to end.
    pub(crate) given: AtomicBool,
    /// It must start anew.
    pub(crate) anew: CancellationToken,
    /// It looks into whether it must follow a recovered cluster.
    pub(crate) following: AtomicBool,
}

/// Since when the leader has seen what it sees.
#[derive(Debug, Default)]
struct Watch {
    term: u64,
    began: u64,
    well: std::collections::BTreeMap<u64, u64>,
}

/// What the leader says to a forwarded call.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Forwarded<T> {
    /// It was taken.
    Taken(T),
    /// That member does not lead.
    NotLeader,
}

impl Node {
    /// Opens the store in `dir` and starts the member, which may not belong to a cluster yet.
    pub async fn start(dir: &Path, dialer: Dialer, timing: Timing) -> anyhow::Result<Self> {
        dir::make(dir)?;
        let lock = dir::lock(dir)?;
        let id = dir::member_id(dir)?;
        dir::check_whole(dir)?;
        let log = LogStore::open(dir).context("cannot open the Raft journal")?;
        let view = Arc::new(View::default());
        if log.last().is_some() || SnapshotFile::new(dir).exists() {
            recovery::forget_last_known(dir);
        } else if let Some(last) = recovery::last_known(dir) {
            view.replace(0, last);
        }
        let machine = Machine::new(Arc::clone(&view), SnapshotFile::new(dir));
        let raft = Raft::new(id, timing.config()?, dialer.clone(), log.clone(), machine)
            .await
            .context("cannot start Raft")?;
        Ok(Self {
            raft,
            view,
            metrics: Arc::default(),
            id,
            dialer,
            log,
            claims: Arc::new(Mutex::new(Claims::new(millis(timing.lease)))),
            liveness: Arc::new(Mutex::new(Liveness::new(Times {
                silence: millis(timing.silence),
                lease: millis(timing.lease),
            }))),
            watch: Arc::default(),
            questions: Questions::default(),
            writes: Writes::default(),
            rules: Rules {
                silence: millis(timing.silence),
                replace: millis(timing.replace),
                settle: millis(timing.settle),
                lag: CAUGHT_UP,
            },
            orders: Arc::new(Orders {
                data: recovery::data_of(dir).to_owned(),
                refused: recovery::refusal(recovery::data_of(dir)),
                former: recovery::former(dir),
                given: AtomicBool::new(false),
                anew: CancellationToken::new(),
                following: AtomicBool::new(false),
            }),
            ca_settle: timing.ca_settle,
            began: Instant::now(),
            session: rand::random_range(1..1_u64 << 48),
            closing: CancellationToken::new(),
            heard_leader: Arc::default(),
            _lock: Arc::new(lock),
        })
    }

    /// Its Raft id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether it had the id `id` in a cluster that it has left behind by being recovered or restored.
    pub fn was(&self, id: u64) -> bool {
        self.orders.former.contains(&id)
    }

    /// How other members are reached.
    pub fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    /// Makes this the one member of a new cluster, unless it belongs to one.
    pub async fn initialize(&self, member: Member) -> anyhow::Result<()> {
        if self.raft.is_initialized().await? {
            return Ok(());
        }
        let members = std::collections::BTreeMap::from([(self.id, member)]);
        self.raft
            .initialize(members)
            .await
            .context("cannot make a new cluster")
    }

    /// Whether this member belongs to a cluster.
    pub async fn is_member(&self) -> bool {
        self.raft.is_initialized().await.unwrap_or(false)
    }

    /// The leader, as far as it is known here: a follower knows of none once it has not heard it for [`UNANSWERED`]. Raft
    /// itself goes on naming the last one, for as long as no other can be elected.
    pub fn leader(&self) -> Option<(u64, Member)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let id = metrics.current_leader?;
        if id != self.id {
            let silent = Duration::from_millis(
                self.now()
                    .saturating_sub(self.heard_leader.load(Ordering::Relaxed)),
            );
            if silent > UNANSWERED {
                return None;
            }
        }
        let member = metrics.membership_config.membership().get_node(&id)?;
        Some((id, member.clone()))
    }

    /// This member hears the leader.
    pub(crate) fn hear_leader(&self) {
        self.heard_leader.store(self.now().max(1), Ordering::Relaxed);
    }

    /// Whether it has heard a leader since its start.
    pub(crate) fn has_heard_leader(&self) -> bool {
        self.heard_leader.load(Ordering::Relaxed) > 0
    }

    /// The term that this member leads in, if it leads.
    pub fn leads(&self) -> Option<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        (metrics.state == ServerState::Leader).then_some(metrics.vote.leader_id.term)
    }

    /// The members.
    pub fn peers(&self) -> Vec<Peer> {
        let leader = self.leader().map(|(id, _)| id);
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters: std::collections::BTreeSet<_> = membership.voter_ids().collect();
        let peer = |(id, member): (&u64, &Member)| Peer {
            id: *id,
            addr: member.addr.clone(),
            voter: voters.contains(id),
            leader: leader == Some(*id),
        };
        membership.nodes().map(peer).collect()
    }

    /// Registers an instance, or keeps it alive if it is there just so. This member answers for it from then on, for a
    /// lease.
    pub async fn register(&self, service: &str, instance: Instance) -> Result<(), Error> {
        let id = instance.id.clone();
        let same = self.view.read(|state| {
            let known = state
                .service(service)
                .and_then(|of| of.instances.get(&instance.id));
            known.is_some_and(|known| {
                Instance {
                    index: known.index,
                    ..instance.clone()
                } == *known
            }) && state
                .service(service)
                .is_some_and(|of| of.member_of(&instance.id) == self.id)
        });
        // Before it is written: what is said of it until then is said of an earlier registration.
        let new = self.claims().heard(self.now(), service, &id);
        if same {
            return Ok(());
        }
        let command = Command::PutInstance {
            service: service.to_owned(),
            instance: instance.into(),
            member: self.id,
        };
        let written = self.write(command).await;
        if new && written.as_ref().is_err_and(|error| !error.may_be_done()) {
            self.claims().gone(service, &id);
        }
        written.map(drop)
    }

    /// Deregisters an instance.
    pub async fn deregister(&self, service: String, id: String) -> Result<u64, Error> {
        self.claims().gone(&service, &id);
        self.write(Command::DeleteInstance { service, id }).await
    }

    /// The next beat to a voter that was told `told`, and what it will have been told by it.
    pub fn next_beat(&self, told: &Told) -> (Beat, Option<Told>) {
        told.next(self.id, self.session, self.view.applied(), &self.claims())
    }

    /// Takes a member's beat.
    pub fn beat(&self, beat: Beat) -> Heard {
        self.liveness().beat(self.now(), beat)
    }

    /// Since when members were heard of, in milliseconds.
    pub fn ages(&self, members: &[u64]) -> std::collections::BTreeMap<u64, u64> {
        self.liveness().ages(self.now(), members)
    }

    /// Keeps the time by which silence is counted. To be called several times a second, whatever else goes on.
    pub fn tick(&self) {
        let now = self.now();
        self.claims().round(now);
        self.liveness().tick(now);
    }

    /// That this member leads, if it does.
    fn lead(&self) -> Option<Lead> {
        let term = self.leads()?;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        if metrics.membership_config.membership().voter_ids().count() < 2 {
            return Some(Lead { term, acked: Some(0) });
        }
        let acked = metrics.last_quorum_acked.as_ref();
        let acked = acked.map(|acked| millis(openraft::Instant::elapsed(&**acked)));
        Some(Lead { term, acked })
    }

    /// If this member leads, takes out the instances that live no more. To be called several times a second.
    pub async fn expire(&self) -> Result<(), Error> {
        let now = self.now();
        let lead = self.lead();
        let members = self.peers().into_iter().map(|peer| peer.id).collect();
        let expired = self.view.read(|state| {
            self.liveness()
                .round(now, self.id, &members, lead, || state.registrations())
        });
        if expired.is_empty() {
            return Ok(());
        }
        for gone in &expired {
            tracing::info!(service = gone.service, instance = gone.id, "it lives no more");
        }
        let count = expired.len() as u64;
        if let Forwarded::Taken(_) = self.write_here(&Command::Expire { instances: expired }).await? {
            self.metrics.expired.fetch_add(count, Ordering::Relaxed);
        }
        Ok(())
    }

    /// If this member leads, the members whose beats are missing.
    pub fn suspects(&self) -> Vec<u64> {
        if self.leads().is_none() {
            return Vec::new();
        }
        self.liveness().suspects(self.now())
    }

    /// What was found out about suspects: whether the host of `member` answered a probe that began at `began`, and how
    /// long ago (in milliseconds) others have heard it.
    pub fn looked_into(&self, member: u64, began: u64, answered: bool, elsewhere: Option<u64>) {
        let now = self.now();
        let mut liveness = self.liveness();
        if let Some(age) = elsewhere {
            liveness.heard_elsewhere(member, now.saturating_sub(age));
        }
        liveness.probed(member, began, answered);
    }

    /// Milliseconds since this member's start.
    pub fn now(&self) -> u64 {
        millis(self.began.elapsed())
    }

    /// What counts as well, and as lost.
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// How long a step of a change of the CA's roots is let sink in.
    pub fn ca_settle(&self) -> Duration {
        self.ca_settle
    }

    /// If this member leads, how all do. Signs of life are beats and answers to what is replicated; a new leader gives
    /// everybody the full time. To be called each second, for whoever is well between two calls has been well all along.
    pub fn standings(&self) -> Option<Vec<Standing>> {
        let term = self.leads()?;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let (replication, acks) = (metrics.replication.as_ref()?, metrics.heartbeat.as_ref()?);
        let members = metrics.membership_config.membership();
        let ids: Vec<u64> = members.nodes().map(|(id, _)| *id).collect();
        let (now, ages) = (self.now(), self.ages(&ids));
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if watch.term != term {
            *watch = Watch {
                term,
                began: now,
                ..Watch::default()
            };
        }
        let last = metrics.last_log_index.unwrap_or(0);
        let standing = |(id, member): (&u64, &Member)| {
            let beat = ages.get(id).copied();
            let ack = acks
                .get(id)
                .and_then(|ack| ack.as_ref())
                .map(|ack| millis(openraft::Instant::elapsed(&**ack)));
            let well = |age: Option<u64>| age.is_some_and(|age| age <= self.rules.silence);
            let own = *id == self.id;
            if own || (well(beat) && well(ack)) {
                watch.well.entry(*id).or_insert(now);
            } else {
                watch.well.remove(id);
            }
            let led = now.saturating_sub(watch.began);
            let silent = beat.into_iter().chain(ack).fold(led, u64::min);
            let matched = replication.get(id).and_then(|matched| matched.as_ref());
            let zone = match (member.zone.as_str(), member.host.as_str()) {
                ("", "") => format!("member {id}"),
                ("", host) => format!("host {host}"),
                (zone, _) => format!("zone {zone}"),
            };
            Standing {
                id: *id,
                zone,
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

    /// How this member does.
    pub fn own_status(&self) -> OwnStatus {
        let leader = self.leader();
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let index = |id: Option<crate::raft::LogId>| id.map_or(0, |id| id.index);
        let answered = metrics.last_quorum_acked.as_ref();
        let is_alone = metrics.state == ServerState::Leader
            && metrics.membership_config.membership().voter_ids().count() > 1
            && answered.is_none_or(|at| at.elapsed() > UNANSWERED);
        OwnStatus {
            id: self.id,
            state: format!("{:?}", metrics.state).to_lowercase(),
            term: metrics.current_term,
            leader: leader.filter(|_| !is_alone).map(|(_, member)| member.addr),
            last_log: metrics.last_log_index.unwrap_or(0),
            last_term: self.log.last().map_or(0, |last| last.leader_id.term),
            committed: index(metrics.cluster_committed),
            applied: index(metrics.last_applied),
            snapshot: index(metrics.snapshot),
            journal_bytes: self.log.bytes(),
            disk_full: self.log.disk_is_full(),
            refused_order: self.orders.refused.clone(),
        }
    }

    fn claims(&self) -> std::sync::MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn liveness(&self) -> std::sync::MutexGuard<'_, Liveness> {
        self.liveness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// If this member leads, gives numbers to services that have none. To be called each second.
    pub async fn number(&self) -> Result<(), Error> {
        if self.leads().is_none() {
            return Ok(());
        }
        match self.view.read(State::numbering) {
            Some(command) => self.write_here(&command).await.map(drop),
            None => Ok(()),
        }
    }

    /// Makes a snapshot and drops what it holds from the log, if the log has grown long. Entries alone are counted by
    /// openraft; but a thousand entries may be a thousand pieces of metadata of a megabyte each.
    pub async fn shorten(&self) -> Result<(), Error> {
        if self.log.bytes() <= MAX_LOG_BYTES {
            return Ok(());
        }
        let stopping = |error| Error::unavailable(format!("this discoverd is stopping: {error}"));
        let snapshot = self.raft.data_metrics().borrow_watched().snapshot;
        if let Some(snapshot) = snapshot {
            self.raft
                .trigger()
                .purge_log(snapshot.index)
                .await
                .map_err(stopping)?;
        }
        self.raft.trigger().snapshot().await.map_err(stopping)
    }

    /// Calls the member `id`.
    pub async fn call<T: serde::de::DeserializeOwned>(
        &self,
        id: u64,
        member: &Member,
        what: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        self.dialer
            .call((id, &member.addr), what, body, WRITE_TIMEOUT)
            .await
    }

    /// Calls the leader, which is given up on when it is known to lead no more; `None` when no other member leads.
    pub(crate) async fn call_leader<T: serde::de::DeserializeOwned>(
        &self,
        what: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> Option<Result<T, Error>> {
        let (id, member) = self.leader().filter(|(id, _)| *id != self.id)?;
        let late = || Error::new(ErrorCode::Timeout, "the leading discoverd does not answer").or_done();
        tokio::select! {
            answer = tokio::time::timeout(patience, self.call(id, &member, what, body)) => {
                Some(answer.unwrap_or_else(|_| Err(late())))
            }
            () = self.deposed(id) => Some(Err(late())),
        }
    }

    /// Returns once the member `id` is not known here as the leader any more.
    async fn deposed(&self, id: u64) {
        let mut metrics = self.raft.server_metrics();
        while metrics.borrow_watched().current_leader == Some(id) && metrics.changed().await.is_ok() {}
    }

    /// How long the journal takes to be written and synced.
    pub fn syncs(&self) -> &Durations {
        self.log.syncs()
    }

    /// Whether writes wait for room on this member's disk.
    pub fn disk_is_full(&self) -> bool {
        self.log.disk_is_full()
    }

    /// Waits a moment for a leader to appear.
    pub async fn election(&self, deadline: tokio::time::Instant) -> Result<(), Error> {
        if tokio::time::Instant::now() + Duration::from_millis(50) >= deadline {
            return Err(Error::unavailable(
                "discoverd has no leader at present: a majority of its members is needed",
            ));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok(())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since 1970, for commands in which something expires.
pub fn wall_clock() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}
