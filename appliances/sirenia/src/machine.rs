//! The state machine of one peer.

use flynn_api::discovery::Instance;
use flynn_api::sirenia::{Freeze, Role, STATE_VERSION, State};
use jiff::Timestamp;

use crate::{Problem, role_of};

/// Why a singleton's state is frozen, for people.
const SINGLETON_FREEZE: &str = "a singleton: it has no other peer to change to";

/// Who a peer is.
#[derive(Clone, Debug)]
pub struct Config {
    /// The label of instances that carries a peer's identity, such as `POSTGRES_ID`.
    pub label: &'static str,
    /// This peer's instance; `label` is among its labels.
    pub me: Instance,
    /// The position at the beginning of the log, in the engine's notation.
    pub zero: String,
    /// Whether the data volume holds a database.
    pub initialised: bool,
}

/// A state with the index that a write must replace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The state.
    pub state: State,
    /// Its index in discoverd; never 0.
    pub index: u64,
}

/// The service in discoverd, all of it.
#[derive(Clone, Debug, Default)]
pub struct Service {
    /// The peers that are there.
    pub peers: Vec<Instance>,
    /// The id of the leading instance.
    pub leader: Option<String>,
    /// The cluster's state.
    pub state: Option<Stored>,
}

/// How a write went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// It is the state now, at this index.
    Accepted(u64),
    /// It is not: the state had changed.
    Conflict,
    /// There is no telling: no answer came.
    Failed,
}

/// Something that a peer is told.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
#[derive(Clone, Debug)]
pub enum Event {
    /// The service as discoverd has it, or had it a while ago.
    Service(Service),
    /// How [`Action::Write`] went.
    Written(WriteOutcome),
    /// Whether [`Action::Reconfigure`] went well.
    Reconfigured(bool),
    /// The database ended by itself.
    DatabaseDown,
    /// A second has passed: what failed may be tried again.
    Tick,
}

/// Something that a peer shall do. Each is answered by its event before there is another of its kind.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write this state if it replaces that index (0: there was none), and make `leader` the service's leader with it.
    Write {
        /// The state.
        state: State,
        /// The index that it replaces.
        replaces: u64,
        /// The instance that leads from then on.
        leader: String,
    },
    /// Bring the database into this role: as primary it is made where it is not there, and runs; otherwise it is down.
    Reconfigure(Role),
}

/// What is known of the cluster's state.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
#[derive(Debug)]
enum Cluster {
    /// Nothing was heard.
    Unknown,
    /// Discoverd has none.
    Absent,
    /// This.
    Known(Stored),
}

/// Work that is asked for, answered and sometimes fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Idle,
    UnderWay,
    /// Failed: waits for the next tick.
    Waiting,
}

/// One peer.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    cluster: Cluster,
    peers: Vec<Instance>,
    leader: Option<String>,
    /// The state that is being written.
    written: Option<State>,
    write: Work,
    /// The role that the database has, or is being brought into.
    database: Role,
    reconfigure: Work,
}

impl Machine {
    /// A peer that has heard nothing yet and whose database is down.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            cluster: Cluster::Unknown,
            peers: Vec::new(),
            leader: None,
            written: None,
            write: Work::Idle,
            database: Role::None,
            reconfigure: Work::Idle,
        }
    }

    /// Takes in what happened at `now` and says what to do about it.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Action> {
        match event {
            Event::Service(service) => self.observe(service),
            Event::Written(outcome) => self.finish_write(outcome),
            Event::Reconfigured(true) => {
                self.reconfigure = Work::Idle;
                self.config.initialised |= self.database == Role::Primary;
            }
            Event::Reconfigured(false) => {
                self.reconfigure = Work::Waiting;
                self.database = Role::None;
            }
            Event::DatabaseDown if self.reconfigure == Work::Idle => {
                self.reconfigure = Work::Waiting;
                self.database = Role::None;
            }
            // What is under way notices by itself that the database is down.
            Event::DatabaseDown => {}
            Event::Tick => {
                for work in [&mut self.write, &mut self.reconfigure] {
                    if *work == Work::Waiting {
                        *work = Work::Idle;
                    }
                }
            }
        }
        self.next_write(now)
            .into_iter()
            .chain(self.next_reconfigure())
            .collect()
    }

    /// This peer's role.
    pub fn role(&self) -> Role {
        match &self.cluster {
            Cluster::Known(stored) if readable(&stored.state).is_ok() => self.role_in(&stored.state),
            // What runs goes on: nobody else can have taken its place.
            _ if self.database == Role::Primary => Role::Primary,
            _ => Role::None,
        }
    }

    /// The state, as far as it is known.
    pub fn state(&self) -> Option<&State> {
        match &self.cluster {
            Cluster::Known(stored) => Some(&stored.state),
            _ => None,
        }
    }

    /// What this peer waits for or cannot get over.
    pub fn problem(&self) -> Option<Problem> {
        match &self.cluster {
            Cluster::Unknown => Some(Problem::Unknown),
            Cluster::Absent if self.config.initialised => Some(Problem::StateLost),
            Cluster::Absent => (self.is_registered() && !self.is_oldest()).then_some(Problem::NotOldest),
            Cluster::Known(stored) => {
                readable(&stored.state)
                    .err()
                    .or_else(|| match self.role_in(&stored.state) {
                        Role::Primary => None,
                        Role::Deposed => Some(Problem::Deposed),
                        _ => Some(Problem::Singleton),
                    })
            }
        }
    }

    fn observe(&mut self, service: Service) {
        let seen = service.state.as_ref().map_or(0, |stored| stored.index);
        if let Cluster::Known(known) = &self.cluster
            && seen < known.index
        {
            return; // Old news.
        }
        self.peers = service.peers;
        self.leader = service.leader;
        match (&self.cluster, service.state) {
            (Cluster::Known(known), _) if seen == known.index => {}
            (_, Some(stored)) => {
                self.cluster = Cluster::Known(stored);
                self.retry_write();
            }
            (_, None) => self.cluster = Cluster::Absent,
        }
    }

    fn finish_write(&mut self, outcome: WriteOutcome) {
        let written = self.written.take();
        self.write = match (outcome, written) {
            (WriteOutcome::Accepted(index), Some(state)) => {
                self.leader = Some(self.config.me.id.clone());
                if !matches!(&self.cluster, Cluster::Known(known) if known.index >= index) {
                    self.cluster = Cluster::Known(Stored { state, index });
                }
                Work::Idle
            }
            _ => Work::Waiting,
        };
    }

    /// A newer state is there: what failed against the older one need not wait.
    fn retry_write(&mut self) {
        if self.write == Work::Waiting {
            self.write = Work::Idle;
        }
    }

    fn next_write(&mut self, now: Timestamp) -> Option<Action> {
        if self.write != Work::Idle || !self.is_registered() {
            return None;
        }
        let me = &self.config.me;
        let (state, replaces) = match &self.cluster {
            Cluster::Absent if !self.config.initialised && self.is_oldest() => (self.first_state(now), 0),
            Cluster::Known(Stored { state, index })
                if readable(state).is_ok()
                    && self.role_in(state) == Role::Primary
                    && (state.primary.addr != me.addr || self.leader.as_ref() != Some(&me.id)) =>
            {
                // The same peer at another address: nothing that a generation stands for has changed.
                (
                    State {
                        primary: me.clone(),
                        ..state.clone()
                    },
                    *index,
                )
            }
            _ => return None,
        };
        self.write = Work::UnderWay;
        self.written = Some(state.clone());
        Some(Action::Write {
            state,
            replaces,
            leader: me.id.clone(),
        })
    }

    fn next_reconfigure(&mut self) -> Option<Action> {
        let role = self.role();
        if self.reconfigure != Work::Idle || role == self.database {
            return None;
        }
        self.reconfigure = Work::UnderWay;
        self.database = role;
        Some(Action::Reconfigure(role))
    }

    fn first_state(&self, now: Timestamp) -> State {
        State {
            version: STATE_VERSION,
            generation: 1,
            freeze: Some(Freeze {
                at: now,
                reason: SINGLETON_FREEZE.into(),
            }),
            singleton: true,
            init_wal: self.config.zero.clone(),
            primary: self.config.me.clone(),
            sync: None,
            asyncs: Vec::new(),
            deposed: Vec::new(),
        }
    }

    fn role_in(&self, state: &State) -> Role {
        self.identity(&self.config.me)
            .map_or(Role::None, |id| role_of(state, self.config.label, id))
    }

    fn identity<'a>(&self, instance: &'a Instance) -> Option<&'a str> {
        instance.meta.get(self.config.label).map(String::as_str)
    }

    /// Discoverd knows of this process: only an instance that is there can lead.
    fn is_registered(&self) -> bool {
        self.peers.iter().any(|peer| peer.id == self.config.me.id)
    }

    fn is_oldest(&self) -> bool {
        let oldest = self.peers.iter().min_by_key(|peer| peer.index);
        oldest.is_some_and(|oldest| self.identity(oldest) == self.identity(&self.config.me))
    }
}

/// Whether this release may act on a state.
fn readable(state: &State) -> Result<(), Problem> {
    if state.version > STATE_VERSION {
        Err(Problem::Version(state.version))
    } else if !state.singleton {
        Err(Problem::Replicated)
    } else {
        Ok(())
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
