//! Raft with three and with five voters, under faults: 500 seeds, each of which replays.
//!
//! What is real: openraft with our configuration; our log store with the journal's format and its recovery; our state
//! machine with view, state and snapshots; how reads ask for an index and what is said of writes that fail; the choice
//! of voters. What is simulated: time and scheduling ([`executor`]), the clocks, the network in place of HTTP, the disk
//! in place of files and of the journal's thread ([`disk`]), and the rest of a member: forwarding, beats, chores.
//!
//! A run is a safety phase, in which clients write and read while things go wrong ([`faults`]), and a liveness phase: the
//! faults end, and within a bound of simulated time all members agree and answer. [`chronicle`] says what must hold
//! throughout. A failing seed is printed; `SEED=n` runs that one alone, and `TRACE=1` prints what happens in it.
//!
//! Everything runs on one thread and draws from the seed, openraft's random timeouts included: a seed gives the same run
//! each time on the same build, down to the order of polls, which a test checks. Neither `select!` nor a hash map's order
//! nor the machine's clock plays a part; tracing and the display of times do read that clock, and nothing depends on it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "it is a test, which may panic"
)]

mod chronicle;
mod clients;
mod cluster;
mod disk;
mod executor;
mod faults;
mod member;
mod network;
mod runtime;
mod seen;

use std::collections::BTreeMap;
use std::time::Duration;

use flynn_api::discovery::Consistency;
use flynn_discovery::voters;
use openraft::async_runtime::WatchReceiver as _;

use crate::cluster::Cluster;
use crate::executor::{WORLD, elapsed, sleep, spawn_on};

/// How long things go wrong.
const SAFETY: Duration = Duration::from_secs(10);
/// Within this time of the last fault all is well. A snapshot whose connection died in silence is sent again after 22.5 s.
const BOUND: Duration = Duration::from_secs(35);
const CLIENTS: u64 = 4;

/// What happened, and how often.
pub type Happened = BTreeMap<&'static str, u64>;

/// One run: what happened in it, and a digest of all its steps. Panics when something does not hold.
pub fn run(seed: u64) -> (Happened, u64) {
    executor::run(seed, async move {
        let cluster = Cluster::new();
        let voters = if seed.is_multiple_of(2) { 3 } else { 5 };
        let ids: Vec<u64> = (0..voters).map(|_| cluster.add()).collect();
        spare(&cluster, &ids).await;

        // Leases rely on clocks; whoever tests them must not turn the clocks.
        let lease = seed.is_multiple_of(3);
        drop(spawn_on(WORLD, cluster.clone().watch()));
        let mut clients: Vec<_> = (1..=CLIENTS)
            .map(|number| spawn_on(WORLD, clients::client(number, cluster.clone(), lease)))
            .collect();
        let faults = spawn_on(WORLD, faults::faults(cluster.clone(), !lease));
        sleep(SAFETY).await;
        cluster.end();
        let Ok(()) = faults.await;
        for client in clients.drain(..) {
            let Ok(()) = client.await;
        }
        heal(&cluster);
        converge(&cluster).await;
        cluster.chronicle().write().close();
        cluster.seen().all()
    })
}

/// Makes the cluster, and brings in one more member, which does not vote yet.
async fn spare(cluster: &Cluster, voters: &[u64]) {
    let first = voters[0];
    while cluster.net().running().len() < voters.len() {
        sleep(Duration::from_millis(5)).await;
    }
    let members: BTreeMap<_, _> = voters.iter().map(|id| (*id, member::named(*id))).collect();
    let running = cluster.net().find(first).unwrap();
    let Ok(made) = spawn_on(
        running.process,
        async move { running.raft.initialize(members).await },
    )
    .await;
    made.unwrap();
    while clients::write(cluster, clients::create()).await != Some(true) {}
    let spare = cluster.add();
    drop(spawn_on(WORLD, faults::join(cluster.clone(), spare)));
}

fn heal(cluster: &Cluster) {
    cluster.net().heal();
    for id in cluster.hosts() {
        cluster.slow_disk(id, None);
        cluster.turn_clock(id, Duration::ZERO, 1000);
        if let Some(process) = cluster.process(id) {
            executor::stop(process, false);
        }
        cluster.boot(id);
    }
}

/// Liveness: a write and a read at each member are answered, and all have the same state and know the same leader.
async fn converge(cluster: &Cluster) {
    let begin = elapsed();
    let mut number = 0;
    let why = loop {
        number += 1;
        let why = match unwell(cluster).await {
            Some(why) => why,
            None if clients::write(cluster, clients::register(0, number)).await != Some(true) => {
                "a write was not acknowledged".to_owned()
            }
            None => match deaf(cluster).await {
                Some(id) => format!("{id} does not answer a read"),
                None => return cluster.seen().note("converged"),
            },
        };
        if elapsed() > begin + BOUND {
            break why;
        }
        sleep(Duration::from_millis(100)).await;
    };
    panic!("liveness: not well {BOUND:?} after the last fault: {why}");
}

/// A member that does not answer a linearizable read.
async fn deaf(cluster: &Cluster) -> Option<u64> {
    for id in cluster.hosts() {
        let known = cluster.chronicle().write().known();
        if clients::read_at(cluster, id, known, Consistency::Linearizable)
            .await
            .is_none()
        {
            return Some(id);
        }
    }
    None
}

/// Why not all is well.
async fn unwell(cluster: &Cluster) -> Option<String> {
    let Some((leader, leading)) = cluster.leader() else {
        return Some("nobody leads".to_owned());
    };
    for id in cluster.hosts() {
        let Some(running) = cluster.net().find(id) else {
            return Some(format!("{id} does not run"));
        };
        let knows = running.raft.server_metrics().borrow_watched().current_leader;
        if knows != Some(leader) {
            return Some(format!("{id} takes {knows:?} for the leader, not {leader}"));
        }
        let (applied, all) = (running.view.applied(), leading.view.applied());
        if applied != all {
            return Some(format!("{id} has applied {applied}, the leader {all}"));
        }
    }
    let configs = leading.configs();
    if configs.len() > 1 {
        return Some(format!("the voters still change: {configs:?}"));
    }
    // Who is there has settled; who is gone for good is lost by now.
    // By its own clock.
    let Ok(standings) = spawn_on(leading.process, async move { leading.standings() }).await;
    let mut standings = standings?;
    for standing in &mut standings {
        let there = cluster.hosts().contains(&standing.id);
        standing.silent = if there { 0 } else { u64::MAX };
        standing.well = there.then_some(u64::MAX);
        standing.lag = there.then_some(0);
    }
    let next = voters::next(&standings, &configs, leader, member::RULES)?;
    Some(format!(
        "the voters are to be {next:?}, not {configs:?}: {standings:?}"
    ))
}
