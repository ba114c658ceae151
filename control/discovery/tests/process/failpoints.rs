//! A member is killed wherever it changes its disk, and started again: it starts, holds all that was acknowledged,
//! has not forgotten its vote, and agrees with the others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use flynn_api::discovery::ServiceConfig;
use flynn_discovery::Options;
use flynn_discovery::raft::journal::{Record, scan};

use crate::common::{block_on, eventually};
use crate::disk::Cut;
use crate::hosts::{Hosts, SNAPSHOT_AFTER};
use crate::ledger::Ledger;
use crate::watch::{Plan, Point, Strike};

/// How a process can end at a write.
const ENDS: [Strike; 3] = [Strike::Tear, Strike::Cut(Cut::Clean), Strike::Cut(Cut::Torn)];

/// Points before the first answer.
const BEGIN: [&str; 12] = [
    "raft: make",
    "data: sync after raft: make",
    "lock: create",
    "id.new: create",
    "id.new: write",
    "id.new: sync",
    "id.new: rename",
    "raft: sync after id.new: rename",
    "journal: create",
    "journal: write header",
    "journal: sync header",
    "raft: sync after journal: create",
];

/// Points that each member comes by again and again.
const AGAIN: [&str; 19] = [
    "data: sync",
    "journal: sync at open",
    "journal: write vote",
    "journal: sync vote",
    "journal: write entry",
    "journal: sync entry",
    "journal: write committed",
    "journal: write purge",
    "snapshot.new: create",
    "snapshot.new: write",
    "snapshot.new: sync",
    "snapshot.new: rename",
    "raft: sync after snapshot.new: rename",
    "journal.new: create",
    "journal.new: write header",
    "journal.new: write",
    "journal.new: sync",
    "journal.new: rename",
    "raft: sync after journal.new: rename",
];

/// Points that come after another misfortune.
const AFTER: [(&str, &str, Strike); 4] = [
    ("journal: shorten", "journal: write entry", Strike::Tear),
    (
        "journal: shorten",
        "journal: write entry",
        Strike::Fail(libc::ENOSPC),
    ),
    (
        "journal.new: remove",
        "journal.new: write",
        Strike::Fail(libc::ENOSPC),
    ),
    (
        "snapshot.new: remove",
        "snapshot.new: write",
        Strike::Fail(libc::ENOSPC),
    ),
];

/// Points of a member among others.
const AMONG: [&str; 16] = [
    "data: sync",
    "journal: write vote",
    "journal: sync vote",
    "journal: write entry",
    "journal: sync entry",
    "journal: write committed",
    "journal: write purge",
    "journal: write truncate",
    "journal: sync truncate",
    "snapshot.new: create",
    "snapshot.new: write",
    "snapshot.new: sync",
    "snapshot.new: rename",
    "raft: sync after snapshot.new: rename",
    "journal: sync at open",
    "journal: shorten",
];

/// Whether there is time for everything.
pub(crate) fn long() -> bool {
    std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1")
}

/// The ways to strike that the so-many-th point gets in this run.
fn ends(number: usize) -> Vec<Strike> {
    if long() {
        return ENDS.to_vec();
    }
    vec![ENDS[number % 3]]
}

fn at(point: &str, strike: Strike) -> Plan {
    [(Point::Named(point.to_owned(), 1), strike)].into()
}

/// Every point of the list was struck, and there are no others.
fn account(hosts: &Hosts, points: impl IntoIterator<Item = &'static str>, others: &[&str]) {
    let points: BTreeSet<&str> = points.into_iter().collect();
    for (point, count) in &hosts.struck {
        println!("{count:4} × {point}");
    }
    let total: usize = hosts.struck.values().sum();
    println!("{} points, {total} strikes", hosts.struck.len());
    let missed: Vec<_> = points
        .iter()
        .filter(|point| !hosts.struck.contains_key(**point))
        .collect();
    assert!(missed.is_empty(), "never struck: {missed:?}");
    let new: BTreeMap<_, _> = hosts
        .seen
        .iter()
        .filter(|(point, _)| !points.contains(point.as_str()) && !others.contains(&point.as_str()))
        .collect();
    assert!(new.is_empty(), "points that no list knows: {new:?}");
}

/// One member alone is killed at the first point that it comes by, at the second, … until it answers before.
pub(crate) fn one_begins() {
    block_on(async {
        let mut struck = BTreeMap::new();
        let rounds = if long() { ENDS.len() } else { 1 };
        for (round, number) in (0..rounds).flat_map(|round| (1..=60).map(move |number| (round, number))) {
            let mut hosts = Hosts::one();
            let ledger = Ledger::default();
            let client = hosts.client(0).clone();
            let begin = async || {
                ledger.try_create(&client, 1).await.ok()?;
                ledger.write(&client, "w0").await.ok()
            };
            let plan = [(Point::Any(number), ENDS[(round + number) % 3])];
            hosts.start_watched(0, plan.into());
            let through = hosts.struck_or(0, begin).await.is_some();
            hosts.kill(0);
            struck.append(&mut hosts.struck);
            // Once more while it recovers.
            let plan = [(Point::Any(1 + number % 5), ENDS[(round + number / 3) % 3])];
            hosts.start_watched(0, plan.into());
            hosts.struck_or(0, begin).await;
            hosts.kill(0);

            hosts.start(0);
            hosts.ready(0).await;
            eventually("a beginning", begin).await;
            hosts.kill(0);
            hosts.start(0);
            hosts.agree(&ledger).await;
            if through {
                break;
            }
        }
        let missed: Vec<_> = BEGIN
            .iter()
            .filter(|point| !struck.contains_key(**point))
            .collect();
        assert!(missed.is_empty(), "never struck: {missed:?}");
        println!("{} points: {:?}", struck.len(), struck.keys());
    });
}

/// One member alone is killed at each point of a long life.
pub(crate) fn one_writes() {
    block_on(async {
        let mut hosts = Hosts::one();
        let ledger = Ledger::padded(100 << 10);
        hosts.start(0);
        hosts.ready(0).await;
        let client = hosts.client(0).clone();
        ledger.create(&client, 3).await;
        hosts.kill(0);
        let mut lives: Vec<Vec<Plan>> = Vec::new();
        for (number, point) in AGAIN.into_iter().enumerate() {
            lives.extend(ends(number).into_iter().map(|end| vec![at(point, end)]));
        }
        for (number, (point, before, strike)) in AFTER.into_iter().enumerate() {
            for end in ends(number) {
                let (first, then) = (at(before, strike), at(point, end));
                lives.push(match strike {
                    Strike::Fail(_) => vec![first.into_iter().chain(then).collect()],
                    _ => vec![first, then],
                });
            }
        }
        for plan in lives.into_iter().flatten() {
            hosts.start_watched(0, plan);
            let load = ledger.load(std::slice::from_ref(&client));
            hosts.struck(0).await;
            load.stop().await;
        }
        hosts.start(0);
        hosts.agree(&ledger).await;
        println!("{} writes", ledger.total());
        account(
            &hosts,
            AGAIN.into_iter().chain(AFTER.map(|(point, ..)| point)),
            &[],
        );
    });
}

/// Writes fail: what cannot be trusted any more ends the process, and anything else is made up for.
pub(crate) fn failures() {
    const EIO: Strike = Strike::Fail(libc::EIO);
    const FULL: Strike = Strike::Fail(libc::ENOSPC);
    let fates = [
        ("journal: write entry", EIO, true),
        ("journal: write entry", FULL, false),
        ("journal: sync entry", EIO, true),
        ("journal: sync vote", EIO, true),
        ("journal.new: create", FULL, false),
        ("journal.new: write", FULL, false),
        ("journal.new: sync", EIO, false),
        ("journal.new: rename", EIO, false),
        ("raft: sync after journal.new: rename", EIO, true),
        ("snapshot.new: create", FULL, false),
        ("snapshot.new: write", FULL, false),
        ("snapshot.new: sync", EIO, true),
        ("snapshot.new: rename", EIO, true),
        ("raft: sync after snapshot.new: rename", EIO, true),
    ];
    block_on(async {
        let mut hosts = Hosts::one();
        let ledger = Ledger::padded(100 << 10);
        hosts.start(0);
        hosts.ready(0).await;
        let client = hosts.client(0).clone();
        ledger.create(&client, 3).await;
        hosts.kill(0);
        for (point, failure, ends) in fates {
            hosts.start_watched(0, at(point, failure));
            let load = ledger.load(std::slice::from_ref(&client));
            if ends {
                hosts.struck(0).await;
                load.stop().await;
            } else {
                let watch = hosts.watch(0);
                eventually(point, async || watch.plan().is_empty().then_some(())).await;
                let before = ledger.total();
                eventually("writes go on", async || {
                    (ledger.total() > before + 30).then_some(())
                })
                .await;
                load.stop().await;
                hosts.kill(0);
            }
        }
        hosts.start(0);
        hosts.agree(&ledger).await;
        assert_eq!(hosts.struck.values().sum::<usize>(), fates.len());
    });
}

/// One of three voters is killed while it votes, writes, takes back what was never agreed to, and takes a snapshot.
pub(crate) fn three_write() {
    block_on(async {
        let mut hosts = Hosts::voters(3).await;
        let ledger = Ledger::default();
        let leader = hosts.cluster.ready(0).await;
        ledger.create(hosts.client(leader), 3).await;
        hosts.agree(&ledger).await;
        for (number, point) in AMONG.into_iter().enumerate() {
            for end in ends(number) {
                let leader = hosts.cluster.ready(0).await;
                let plan = at(point, end);
                let victim = if point.ends_with("truncate") {
                    disagree(&mut hosts, &ledger, leader).await;
                    hosts.start_watched(leader, plan);
                    hosts.struck(leader).await;
                    leader
                } else {
                    let victim = (leader + 1 + number % 2) % 3;
                    if point.contains("snapshot") {
                        fall_behind(&mut hosts, &ledger, victim).await;
                    }
                    hosts.kill(victim);
                    if point == "journal: shorten" {
                        one_life(
                            &mut hosts,
                            &ledger,
                            victim,
                            at("journal: write entry", Strike::Tear),
                        )
                        .await;
                    }
                    if point.ends_with("vote") {
                        vote(&mut hosts, victim, plan).await;
                    } else {
                        one_life(&mut hosts, &ledger, victim, plan).await;
                    }
                    victim
                };
                hosts.cluster.members[victim].options.timing.snapshot_after = SNAPSHOT_AFTER;
                hosts.start(victim);
                hosts.agree(&ledger).await;
            }
        }
        println!("{} writes", ledger.total());
        account(&hosts, AMONG, &[]);
    });
}

/// The others write until `victim` is struck.
async fn one_life(hosts: &mut Hosts, ledger: &Ledger, victim: usize, plan: Plan) {
    let others: Vec<_> = (0..3)
        .filter(|at| *at != victim)
        .map(|at| hosts.client(at).clone())
        .collect();
    hosts.start_watched(victim, plan);
    let load = ledger.load(&others);
    hosts.struck(victim).await;
    load.stop().await;
}

/// The leader dies, and whatever `victim` does then for another, its vote is asked for.
async fn vote(hosts: &mut Hosts, victim: usize, plan: Plan) {
    let other = (victim + 1) % 3;
    hosts.start_watched(victim, plan);
    let client = hosts.client(victim).clone();
    let leader = hosts.cluster.ready(other).await;
    let there = hosts
        .struck_or(victim, async || client.own_status().await.ok()?.leader)
        .await;
    if there.is_some() {
        hosts.kill(leader);
        hosts.struck(victim).await;
        hosts.start(leader);
    }
}

/// Leaves `leader` with an entry that nobody else has, dead, and the others with another in its place.
async fn disagree(hosts: &mut Hosts, ledger: &Ledger, leader: usize) {
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    for other in others {
        hosts.kill(other);
    }
    let client = hosts.client(leader).clone();
    let before = client.own_status().await.unwrap().last_log;
    let name = format!("lost-{before}");
    let write = tokio::spawn({
        let (client, name) = (client.clone(), name.clone());
        async move { client.create_service(&name, &ServiceConfig::default()).await }
    });
    // In its journal, not in its memory alone.
    let journal = hosts.cluster.members[leader].options.data.join("raft/journal");
    eventually("an entry that nobody else has", async || {
        let written = std::fs::read(&journal).unwrap();
        let mut places = written.windows(name.len());
        places.any(|place| place == name.as_bytes()).then_some(())
    })
    .await;
    hosts.kill(leader);
    write.await.unwrap().unwrap_err();
    for other in others {
        hosts.start(other);
    }
    hosts.ready(others[0]).await;
    ledger.check(hosts.client(others[0])).await;
}

/// Has `victim` miss so much that it must get a snapshot. It makes none of its own.
async fn fall_behind(hosts: &mut Hosts, ledger: &Ledger, victim: usize) {
    let last = hosts.client(victim).own_status().await.unwrap().last_log;
    hosts.kill(victim);
    hosts.cluster.members[victim].options.timing.snapshot_after = 1 << 20;
    let others: Vec<_> = (0..3)
        .filter(|at| *at != victim)
        .map(|at| hosts.client(at).clone())
        .collect();
    let load = ledger.load(&others);
    // Whoever leads then: what is about to be sent to it is kept, however many snapshots there are.
    for other in (0..3).filter(|at| *at != victim) {
        eventually("what it lacks is dropped", async || {
            (dropped(hosts, other) > last).then_some(())
        })
        .await;
    }
    load.stop().await;
}

/// The last entry that a member has dropped from its journal.
fn dropped(hosts: &Hosts, at: usize) -> u64 {
    let journal = hosts.cluster.members[at].options.data.join("raft/journal");
    let mut dropped = 0;
    let _ = scan(&std::fs::read(journal).unwrap(), |record| {
        if let Record::Purge(upto) = record {
            dropped = upto.index;
        }
    });
    dropped
}

/// What a sync holds up: acknowledgements of writes and votes wait for it.
pub(crate) fn answers_wait() {
    const A_WHILE: Duration = Duration::from_millis(500);
    block_on(async {
        // One member alone.
        let mut hosts = Hosts::one();
        let ledger = Ledger::default();
        hosts.start_watched(0, Plan::new());
        hosts.ready(0).await;
        ledger.create(hosts.client(0), 1).await;
        hosts.watch(0).arm(at("journal: sync entry", Strike::Hold));
        let write = start_write(&ledger, &hosts, 0);
        eventually("a sync", async || hosts.watch(0).holds().then_some(())).await;
        tokio::time::sleep(A_WHILE).await;
        assert!(
            !write.is_finished(),
            "a write was acknowledged before it was on disk"
        );
        hosts.watch(0).release();
        write.await.unwrap().unwrap();

        // Three: the leader alone is no majority, with one more it is.
        let mut hosts = Hosts::voters(3).await;
        let ledger = Ledger::default();
        let leader = hosts.cluster.ready(0).await;
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        ledger.create(hosts.client(leader), 1).await;
        watch_anew(&mut hosts, others).await;
        for other in others {
            hosts.watch(other).arm(at("journal: sync entry", Strike::Hold));
        }
        let write = start_write(&ledger, &hosts, leader);
        for other in others {
            eventually("a sync", async || hosts.watch(other).holds().then_some(())).await;
        }
        tokio::time::sleep(A_WHILE).await;
        assert!(
            !write.is_finished(),
            "a write was acknowledged that one of three has on disk"
        );
        hosts.watch(others[0]).release();
        write.await.unwrap().unwrap();
        hosts.watch(others[1]).release();
        hosts.agree(&ledger).await;

        // An election between two: none is won by a vote that is not on disk.
        let leader = hosts.cluster.ready(0).await;
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        watch_anew(&mut hosts, others).await;
        hosts.watch(others[0]).arm(at("journal: sync vote", Strike::Hold));
        hosts.kill(leader);
        eventually("a vote", async || hosts.watch(others[0]).holds().then_some(())).await;
        let term = hosts.client(others[1]).own_status().await.unwrap().term;
        tokio::time::sleep(A_WHILE * 2).await;
        let now = hosts.client(others[1]).own_status().await.unwrap();
        assert!(
            now.state != "leader",
            "a vote was counted before it was on disk: {term}, then {now:?}"
        );
        hosts.watch(others[0]).release();
        hosts.start(leader);
        hosts.agree(&ledger).await;
    });
}

/// A leader loses the end of its log, which the others have, and is back before they elect another.
pub(crate) fn a_shorter_log() {
    block_on(async {
        let change = |options: &mut Options| options.timing.election = Duration::from_secs(2);
        let mut hosts = Hosts::voters_with(3, change).await;
        let ledger = Ledger::default();
        ledger.create(hosts.client(0), 1).await;
        watch_anew(&mut hosts, [0, 1, 2]).await;
        for round in 0..3 {
            let leader = hosts.cluster.ready(0).await;
            let client = hosts.client(leader).clone();
            let other = hosts.client((leader + 1) % 3).clone();
            let before = client.own_status().await.unwrap().last_log;
            hosts.watch(leader).arm(at("journal: sync entry", Strike::Hold));
            let service = format!("on-others-{round}");
            let write = tokio::spawn({
                let (client, service) = (client.clone(), service.clone());
                async move { client.create_service(&service, &ServiceConfig::default()).await }
            });
            eventually("an entry that others have", async || {
                (hosts.watch(leader).holds() && other.own_status().await.ok()?.last_log > before)
                    .then_some(())
            })
            .await;
            hosts.watch(leader).cut(Cut::Clean);
            hosts.kill(leader);
            // The others are a majority: they may have sufficed.
            let acknowledged = write.await.unwrap().is_ok();
            hosts.start_watched(leader, Plan::new());
            eventually("a write", async || ledger.write(&client, "w0").await.ok()).await;
            hosts.agree(&ledger).await;
            let there = client.services().await.unwrap().contains(&service);
            assert!(there || !acknowledged, "{service} was acknowledged, and lost");
        }
    });
}

async fn watch_anew<const N: usize>(hosts: &mut Hosts, members: [usize; N]) {
    for at in members {
        hosts.kill(at);
        hosts.start_watched(at, Plan::new());
        hosts.ready(at).await;
    }
}

fn start_write(ledger: &Ledger, hosts: &Hosts, at: usize) -> tokio::task::JoinHandle<flynn_api::Result<()>> {
    let (ledger, client) = (ledger.clone(), hosts.client(at).clone());
    tokio::spawn(async move { ledger.write(&client, "w0").await })
}
