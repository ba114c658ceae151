//! All members with their disks and clocks, and those who watch them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use openraft::storage::RaftLogStorage;
use rand::RngExt as _;

use crate::chronicle::{Chronicle, Shared};
use crate::disk::Disk;
use crate::executor::{self, Clock, Process, WORLD, draw, sleep, spawn_on};
use crate::member::{self, Running};
use crate::network::Net;
use crate::runtime::Simulated;
use crate::seen::Seen;

/// A host with a member.
struct Host {
    disk: Disk,
    clock: Clock,
    process: Option<Process>,
}

struct Inner {
    hosts: RefCell<BTreeMap<u64, Host>>,
    net: Net,
    chronicle: Shared,
    seen: Seen,
    over: Cell<bool>,
    /// The id that was given last.
    last: Cell<u64>,
}

/// The cluster. Clones share it.
#[derive(Clone)]
pub(crate) struct Cluster(Rc<Inner>);

impl Cluster {
    pub(crate) fn new() -> Self {
        let seen = Seen::default();
        Self(Rc::new(Inner {
            hosts: RefCell::default(),
            net: Net::new(seen.clone()),
            chronicle: Shared::new(seen.clone()),
            seen,
            over: Cell::new(false),
            last: Cell::new(0),
        }))
    }

    pub(crate) fn net(&self) -> &Net {
        &self.0.net
    }

    pub(crate) fn chronicle(&self) -> &Shared {
        &self.0.chronicle
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.0.seen
    }

    /// Whether clients and faults are to end.
    pub(crate) fn over(&self) -> bool {
        self.0.over.get()
    }

    pub(crate) fn end(&self) {
        self.0.over.set(true);
    }

    /// All that have a disk.
    pub(crate) fn hosts(&self) -> Vec<u64> {
        self.0.hosts.borrow().keys().copied().collect()
    }

    /// Adds a host and starts its member, which belongs to no cluster yet. Gives its id.
    pub(crate) fn add(&self) -> u64 {
        let mut hosts = self.0.hosts.borrow_mut();
        // Ids are not given again: a lost host's member is still known by its.
        let id = self.0.last.get() + 1;
        self.0.last.set(id);
        let host = Host {
            disk: Disk::new(self.0.seen.clone()),
            clock: Clock::default(),
            process: None,
        };
        hosts.insert(id, host);
        drop(hosts);
        self.boot(id);
        id
    }

    /// Starts the member, unless it runs or its host is lost.
    pub(crate) fn boot(&self, id: u64) {
        let mut hosts = self.0.hosts.borrow_mut();
        let Some(host) = hosts.get_mut(&id).filter(|host| host.process.is_none()) else {
            return;
        };
        self.0.seen.note_of("a member started", id);
        let process = executor::start(host.clock);
        host.process = Some(process);
        let (disk, net, chronicle) = (host.disk.clone(), self.0.net.clone(), self.0.chronicle.clone());
        drop(spawn_on(process, async move {
            let running = member::start(id, process, disk, net, chronicle).await;
            running.chores().await;
        }));
    }

    /// Kills the member; with `power` its host loses what was not synced. False when it did not run.
    pub(crate) fn crash(&self, id: u64, power: bool) -> bool {
        let (process, disk) = {
            let mut hosts = self.0.hosts.borrow_mut();
            let Some(host) = hosts.get_mut(&id) else {
                return false;
            };
            let Some(process) = host.process.take() else {
                return false;
            };
            host.clock = executor::clock(process);
            (process, host.disk.clone())
        };
        self.0.seen.note_of("a member ended", id);
        self.0.net.leave(id);
        executor::kill(process);
        disk.abandon();
        if power {
            disk.cut_power();
        }
        true
    }

    /// A host that does not come back.
    pub(crate) fn lose(&self, id: u64) {
        self.crash(id, true);
        let lost = self.0.hosts.borrow_mut().remove(&id);
        drop(lost);
    }

    pub(crate) fn process(&self, id: u64) -> Option<Process> {
        self.0.hosts.borrow().get(&id)?.process
    }

    /// Changes a host's clock.
    pub(crate) fn turn_clock(&self, id: u64, leap: Duration, per_mille: u64) {
        let mut hosts = self.0.hosts.borrow_mut();
        let Some(host) = hosts.get_mut(&id) else { return };
        if let Some(process) = host.process {
            host.clock = executor::clock(process);
        }
        executor::turn(&mut host.clock, leap, per_mille);
        if let Some(process) = host.process {
            executor::set_clock(process, host.clock);
        }
    }

    /// Makes a disk that slow, in microseconds a sync, or as fast as usual.
    pub(crate) fn slow_disk(&self, id: u64, sync: Option<u64>) {
        if let Some(host) = self.0.hosts.borrow().get(&id) {
            host.disk.slow(sync);
        }
    }

    /// Who leads by the greatest vote.
    pub(crate) fn leader(&self) -> Option<(u64, Running)> {
        let running = self.0.net.running().into_iter();
        running
            .filter(|(_, running)| running.leads())
            .max_by_key(|(_, running)| {
                let vote = running.raft.server_metrics().borrow_watched().vote;
                (vote.leader_id.term, vote.leader_id.node_id)
            })
    }

    /// Draws one of the hosts.
    pub(crate) fn any(&self) -> u64 {
        let hosts = self.hosts();
        hosts[draw(|random| random.random_range(0..hosts.len()))]
    }

    /// Draws one of the hosts, the leader more often than others.
    pub(crate) fn any_or_leader(&self) -> u64 {
        match self.leader() {
            Some((leader, _)) if draw(|random| random.random_bool(0.4)) => leader,
            _ => self.any(),
        }
    }

    /// Looks at leaders and logs all the time.
    pub(crate) async fn watch(self) {
        let mut before = 0;
        loop {
            for (id, running) in self.0.net.running() {
                let vote = running.raft.server_metrics().borrow_watched().vote;
                if !running.leads() || self.chronicle().write().knows(&vote) {
                    continue;
                }
                let mut log = running.log.clone();
                let state = RaftLogStorage::<Simulated>::get_log_state(&mut log).await;
                let last = state.expect("the log is in memory").last_log_id;
                let ids = running.log_ids().await;
                self.chronicle().write().leads(id, &vote, before, last, &ids);
            }
            let running = self.0.net.running();
            if running.len() > 1 && draw(|random| random.random_bool(0.05)) {
                let one = draw(|random| random.random_range(0..running.len()));
                let other = draw(|random| random.random_range(0..running.len()));
                let (one, other) = (running[one].1.log_ids().await, running[other].1.log_ids().await);
                Chronicle::match_logs(&one, &other);
            }
            before = self.chronicle().write().length();
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Does something later.
    pub(crate) fn later(&self, after: Duration, what: impl FnOnce(&Self) + 'static) {
        let cluster = self.clone();
        drop(spawn_on(WORLD, async move {
            sleep(after).await;
            what(&cluster);
        }));
    }
}
