//! What goes wrong, and what operators do meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use flynn_api::discovery::Voting;
use flynn_discovery::raft::Member;
use flynn_discovery::voters;
use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver as _;
use rand::RngExt as _;

use crate::cluster::Cluster;
use crate::executor::{self, WORLD, draw, sleep, spawn_on};
use crate::member::{RULES, Running, named};

fn between(least: u64, most: u64) -> Duration {
    Duration::from_millis(draw(|random| random.random_range(least..=most)))
}

fn chance(probability: f64) -> bool {
    draw(|random| random.random_bool(probability))
}

/// Makes trouble until `over`. Without `clocks` they all go right.
pub(crate) async fn faults(cluster: Cluster, clocks: bool) {
    let mut may_lose = true;
    while !cluster.over() {
        sleep(between(50, 1200)).await;
        match draw(|random| random.random_range(0..20)) {
            0 | 1 => partition(&cluster),
            2 => one_way(&cluster),
            3 => isolate(&cluster),
            4..=6 => crash(&cluster, false),
            7 | 8 => crash(&cluster, true),
            9 => blackout(&cluster),
            10 | 11 => pause(&cluster),
            12 => slow_disk(&cluster),
            13 if clocks => skew(&cluster),
            14 | 15 if clocks => leap(&cluster),
            16 => disturb(&cluster),
            17 => hand_over(&cluster),
            18 => operate(&cluster),
            19 if may_lose => may_lose = !lose(&cluster),
            _ => {}
        }
    }
}

fn partition(cluster: &Cluster) {
    let (one, other): (Vec<u64>, Vec<u64>) = cluster.hosts().into_iter().partition(|_| chance(0.5));
    cut(cluster, "the network was parted", &one, &other, true);
}

fn isolate(cluster: &Cluster) {
    let alone = cluster.any_or_leader();
    let others: Vec<u64> = cluster.hosts().into_iter().filter(|id| *id != alone).collect();
    cut(cluster, "a member was cut off", &[alone], &others, true);
}

fn one_way(cluster: &Cluster) {
    let deaf = cluster.any_or_leader();
    let others: Vec<u64> = cluster
        .hosts()
        .into_iter()
        .filter(|id| *id != deaf && chance(0.7))
        .collect();
    if chance(0.5) {
        cut(cluster, "a member was heard no more", &[deaf], &others, false);
    } else {
        cut(cluster, "a member heard no more", &others, &[deaf], false);
    }
}

fn cut(cluster: &Cluster, what: &'static str, from: &[u64], to: &[u64], both: bool) {
    let mut pairs = BTreeSet::new();
    for one in from {
        for other in to {
            pairs.insert((*one, *other));
            if both {
                pairs.insert((*other, *one));
            }
        }
    }
    if pairs.is_empty() {
        return;
    }
    cluster.seen().note_of(what, format_args!("{pairs:?}"));
    for (from, to) in &pairs {
        cluster.net().cut(*from, *to);
    }
    cluster.later(between(200, 3000), move |cluster| {
        for (from, to) in pairs {
            cluster.net().mend(from, to);
        }
    });
}

fn crash(cluster: &Cluster, power: bool) {
    let id = cluster.any_or_leader();
    if cluster.crash(id, power) {
        let what = if power {
            "a host lost its power"
        } else {
            "a member was killed"
        };
        cluster.seen().note_of(what, id);
        // Now and then for so long that it loses its vote.
        let away = if chance(0.1) {
            between(5000, 8000)
        } else {
            between(20, 2000)
        };
        cluster.later(away, move |cluster| cluster.boot(id));
    }
}

fn blackout(cluster: &Cluster) {
    if !chance(0.5) {
        return;
    }
    cluster.seen().note("all hosts lost their power");
    for id in cluster.hosts() {
        cluster.crash(id, true);
        cluster.later(between(10, 2000), move |cluster| cluster.boot(id));
    }
}

fn pause(cluster: &Cluster) {
    let id = cluster.any_or_leader();
    let Some(process) = cluster.process(id) else {
        return;
    };
    cluster.seen().note_of("a member was stopped", id);
    executor::stop(process, true);
    cluster.later(between(50, 3000), move |_| executor::stop(process, false));
}

fn slow_disk(cluster: &Cluster) {
    let id = cluster.any_or_leader();
    let sync = draw(|random| random.random_range(5_000..400_000));
    cluster
        .seen()
        .note_of("a disk was made slow", format_args!("{id} {sync}"));
    cluster.slow_disk(id, Some(sync));
    cluster.later(between(300, 3000), move |cluster| cluster.slow_disk(id, None));
}

fn skew(cluster: &Cluster) {
    let per_mille = draw(|random| random.random_range(500..=2000));
    cluster.seen().note("a clock ran wrong");
    cluster.turn_clock(cluster.any_or_leader(), Duration::ZERO, per_mille);
}

fn leap(cluster: &Cluster) {
    cluster.seen().note("a clock leapt");
    cluster.turn_clock(cluster.any_or_leader(), between(50, 10_000), 1000);
}

fn disturb(cluster: &Cluster) {
    let loss = draw(|random| random.random_range(10..300));
    let delay = draw(|random| random.random_range(1_000..150_000));
    cluster.net().disturb(Some((loss, delay)));
    cluster.later(between(300, 2500), |cluster| cluster.net().disturb(None));
}

fn hand_over(cluster: &Cluster) {
    let Some((id, leader)) = cluster.leader() else {
        return;
    };
    let voters: Vec<u64> = leader
        .configs()
        .into_iter()
        .flatten()
        .filter(|other| *other != id)
        .collect();
    if voters.is_empty() {
        return;
    }
    let to = voters[draw(|random| random.random_range(0..voters.len()))];
    cluster.seen().note("the lead was to be handed over");
    drop(spawn_on(leader.process, async move {
        let _ = leader.raft.trigger().transfer_leader(to).await;
    }));
}

/// An operator promotes or demotes a member, as [`flynn_discovery::members`] has it done.
fn operate(cluster: &Cluster) {
    let Some((leads, leader)) = cluster.leader() else {
        return;
    };
    let id = cluster.any();
    let vote = [Voting::Auto, Voting::Promoted, Voting::Demoted][draw(|random| random.random_range(0..3))];
    let seen = cluster.seen().clone();
    drop(spawn_on(leader.process, async move {
        let known = {
            let metrics = leader.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.membership().get_node(&id).cloned()
        };
        let (Some(member), Some(mut standings)) = (known, leader.standings()) else {
            return;
        };
        for standing in standings.iter_mut().filter(|standing| standing.id == id) {
            standing.vote = vote;
        }
        let present = leader.configs().last().cloned().unwrap_or_default();
        let next = voters::next(&standings, std::slice::from_ref(&present), leads, RULES).unwrap_or(present);
        match vote {
            Voting::Promoted if !next.contains(&id) => return,
            Voting::Demoted if next.contains(&id) => return,
            _ => seen.note_of("an operator changed a vote", format_args!("{id} {vote:?}")),
        }
        let node = ChangeMembers::SetNodes([(id, Member { vote, ..member })].into());
        let voters = ChangeMembers::ReplaceAllVoters(next);
        leader.change(ChangeMembers::Batch(vec![node, voters])).await;
    }));
}

/// A host is lost for good, and another comes in its stead; if that leaves a majority of all present voters.
fn lose(cluster: &Cluster) -> bool {
    let Some((_, leader)) = cluster.leader() else {
        return false;
    };
    let id = cluster.any_or_leader();
    let configs = leader.configs();
    let safe = configs.iter().all(|voters| {
        let left = voters
            .iter()
            .filter(|other| **other != id && cluster.process(**other).is_some());
        left.count() >= voters::majority(voters.len()).max(2)
    });
    if !safe || configs.len() != 1 {
        return false;
    }
    cluster.seen().note_of("a host was lost for good", id);
    cluster.lose(id);
    let new = cluster.add();
    drop(spawn_on(WORLD, join(cluster.clone(), new)));
    true
}

/// Has the leader take a newcomer in, however often it takes.
pub(crate) async fn join(cluster: Cluster, id: u64) {
    loop {
        sleep(Duration::from_millis(300)).await;
        let Some((_, leader)) = cluster.leader() else {
            continue;
        };
        if is_member(&leader, id) {
            return;
        }
        drop(spawn_on(leader.process, async move {
            leader
                .change(ChangeMembers::AddNodes([(id, named(id))].into()))
                .await;
        }));
    }
}

fn is_member(leader: &Running, id: u64) -> bool {
    let metrics = leader.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    metrics
        .committed_membership_config
        .membership()
        .get_node(&id)
        .is_some()
}
