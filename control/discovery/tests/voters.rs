//! Who votes: properties of each single choice, and a simulation of hosts that come, go and flap.
//!
//! A failing seed is printed; `SEED=n` runs that one alone.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};

use flynn_api::discovery::Voting;
use flynn_discovery::voters::{MAX_VOTERS, Rules, Standing, majority, next, without};
use proptest::collection::vec;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const RULES: Rules = Rules {
    silence: 1_400,
    replace: 60_000,
    settle: 2_000,
    lag: 100,
};

fn well(id: u64, zone: &str) -> Standing {
    Standing {
        id,
        zone: zone.into(),
        vote: Voting::Auto,
        silent: 100,
        well: Some(10_000),
        lag: Some(0),
    }
}

fn all_well(ids: impl IntoIterator<Item = u64>) -> Vec<Standing> {
    ids.into_iter().map(|id| well(id, &format!("h{id}"))).collect()
}

fn dead(mut members: Vec<Standing>, ids: &[u64]) -> Vec<Standing> {
    for member in members.iter_mut().filter(|member| ids.contains(&member.id)) {
        (member.silent, member.well) = (100_000, None);
    }
    members
}

fn set(ids: &[u64]) -> BTreeSet<u64> {
    ids.iter().copied().collect()
}

fn choose(members: &[Standing], present: &[u64]) -> Option<Vec<u64>> {
    next(members, &[set(present)], 1, RULES).map(|next| next.into_iter().collect())
}

#[test]
fn a_cluster_grows_by_two() {
    assert_eq!(choose(&all_well([1]), &[1]), None);
    assert_eq!(choose(&all_well([1, 2]), &[1]), None);
    assert_eq!(choose(&all_well([1, 2, 3]), &[1]), Some(vec![1, 2, 3]));
    assert_eq!(choose(&all_well(1..=4), &[1, 2, 3]), None);
    assert_eq!(choose(&all_well(1..=7), &[1, 2, 3]), Some(vec![1, 2, 3, 4, 5]));
    // Those that came just now, or lack a part of the log, wait.
    for spoil in [
        |member: &mut Standing| member.well = Some(1_000),
        |member: &mut Standing| member.lag = Some(101),
        |member: &mut Standing| member.lag = None,
        |member: &mut Standing| member.vote = Voting::Demoted,
    ] {
        let mut members = all_well([1, 2, 3]);
        spoil(&mut members[2]);
        assert_eq!(choose(&members, &[1]), None);
    }
}

#[test]
fn the_dead_are_replaced() {
    let four = dead(all_well(1..=4), &[3]);
    assert_eq!(choose(&four, &[1, 2, 3]), Some(vec![1, 2, 4]));
    // Not yet.
    let mut soon = four;
    soon[2].silent = 59_000;
    assert_eq!(choose(&soon, &[1, 2, 3]), None);
    // By nobody: three stay three, for one alone would be worse off. Of five, three are better off.
    assert_eq!(choose(&dead(all_well(1..=3), &[3]), &[1, 2, 3]), None);
    assert_eq!(choose(&dead(all_well(1..=5), &[5]), &[1, 2, 3, 4, 5]), None);
    let two = dead(all_well(1..=5), &[4, 5]);
    assert_eq!(choose(&two, &[1, 2, 3, 4, 5]), Some(vec![1, 2, 3]));
    // Without a majority nothing can be done.
    assert_eq!(choose(&dead(all_well(1..=6), &[2, 3]), &[1, 2, 3]), None);
}

#[test]
fn voters_are_spread_over_zones() {
    let zones = ["a", "a", "a", "b", "c"];
    let members: Vec<Standing> = (1..).zip(zones).map(|(id, zone)| well(id, zone)).collect();
    assert_eq!(choose(&members[..3], &[1]), Some(vec![1, 2, 3]));
    assert_eq!(choose(&members, &[1]), Some(vec![1, 2, 3, 4, 5]));
    assert_eq!(choose(&members[..4], &[1, 2, 3]), Some(vec![1, 2, 4]));
    // One of the same zone comes in for a dead one.
    let gone = dead(
        vec![
            well(1, "a"),
            well(2, "b"),
            well(3, "c"),
            well(4, "a"),
            well(5, "c"),
        ],
        &[3],
    );
    assert_eq!(choose(&gone, &[1, 2, 3]), Some(vec![1, 2, 5]));
}

#[test]
fn operators_have_their_say() {
    let mut members = all_well(1..=4);
    members[3].vote = Voting::Promoted;
    assert_eq!(choose(&members, &[1, 2, 3]), Some(vec![1, 2, 4]));
    members[0].vote = Voting::Demoted;
    assert_eq!(choose(&members, &[1, 2, 4]), Some(vec![2, 3, 4]));
    // One that is demoted stays while there is nobody else.
    assert_eq!(choose(&members[..1], &[1]), None);
    assert_eq!(choose(&members[..2], &[1]), Some(vec![2]));
    assert_eq!(choose(&members[..3], &[1, 2, 3]), None);
}

#[test]
fn members_leave() {
    let leave = |members: &[Standing], present: &[u64], out| {
        without(members, &set(present), 1, RULES, out).map(|next| next.into_iter().collect::<Vec<_>>())
    };
    assert_eq!(leave(&all_well(1..=4), &[1, 2, 3], 4), Some(vec![1, 2, 3]));
    assert_eq!(leave(&all_well(1..=4), &[1, 2, 3], 2), Some(vec![1, 3, 4]));
    assert_eq!(leave(&all_well(1..=3), &[1, 2, 3], 2), Some(vec![1, 3]));
    assert_eq!(
        leave(&dead(all_well(1..=3), &[2]), &[1, 2, 3], 2),
        Some(vec![1, 3])
    );
    assert_eq!(leave(&all_well(1..=5), &[1, 2, 3, 4, 5], 2).unwrap().len(), 3);
    assert_eq!(leave(&all_well([1, 2]), &[1, 2], 1), Some(vec![2]));
    assert_eq!(leave(&all_well([1, 2]), &[1], 1), Some(vec![2]));
    assert_eq!(leave(&all_well([1]), &[1], 1), None);
    assert_eq!(
        leave(&dead(all_well([1, 2]), &[2]), &[1, 2], 2),
        None,
        "two of two are needed"
    );
    assert_eq!(leave(&dead(all_well(1..=3), &[2]), &[1, 2, 3], 3), None);
}

#[test]
fn a_change_that_is_under_way_comes_to_its_end() {
    let configs = [set(&[1]), set(&[1, 2, 3])];
    assert_eq!(
        next(&all_well([1, 2, 3]), &configs, 1, RULES),
        Some(set(&[1, 2, 3]))
    );
}

fn standing(id: u64) -> impl Strategy<Value = Standing> {
    let vote = prop_oneof![
        4 => Just(Voting::Auto),
        1 => Just(Voting::Promoted),
        1 => Just(Voting::Demoted)
    ];
    let silent = prop_oneof![3 => 0..1_400_u64, 1 => 1_401..60_000_u64, 1 => 60_001..200_000_u64];
    (
        0..4_u8,
        vote,
        silent,
        0..5_000_u64,
        prop::option::weighted(0.9, 0..150_u64),
    )
        .prop_map(move |(zone, vote, silent, well, lag)| Standing {
            id,
            zone: format!("z{zone}"),
            vote,
            silent,
            well: (silent <= RULES.silence).then_some(well),
            lag,
        })
}

fn cluster() -> impl Strategy<Value = (Vec<Standing>, BTreeSet<u64>)> {
    (1..10_u64).prop_flat_map(|count| {
        let members: Vec<_> = (1..=count).map(standing).collect();
        (members, vec(1..=count, 1..6)).prop_map(|(mut members, present)| {
            members[0].silent = 0;
            (members, present.into_iter().chain([1]).take(MAX_VOTERS).collect())
        })
    })
}

fn there(members: &[Standing], of: &BTreeSet<u64>) -> usize {
    let is = |member: &&Standing| of.contains(&member.id) && member.silent <= RULES.silence;
    members.iter().filter(is).count()
}

proptest! {
    #[test]
    fn every_change_is_safe_and_they_end((members, mut present) in cluster()) {
        for step in 0.. {
            let Some(new) = next(&members, &[present.clone()], 1, RULES) else { break };
            prop_assert!(step < 3, "it does not come to rest");
            prop_assert!(new.len() % 2 == 1 && new.len() <= MAX_VOTERS);
            prop_assert!(there(&members, &present) >= majority(present.len()));
            prop_assert!(there(&members, &new) >= majority(new.len()));
            prop_assert!(there(&members, &new) >= majority(present.len()));
            for id in new.difference(&present) {
                let member = members.iter().find(|member| member.id == *id).unwrap();
                prop_assert!(member.well >= Some(RULES.settle) && member.lag <= Some(RULES.lag));
                prop_assert!(member.lag.is_some() && member.vote != Voting::Demoted);
            }
            present = new;
        }
    }

    #[test]
    fn whoever_leaves_leaves_a_majority((members, present) in cluster(), out in 1..10_u64) {
        if let Some(left) = without(&members, &present, 1, RULES, out) {
            prop_assert!(!left.contains(&out) || !present.contains(&out));
            prop_assert!(!left.is_empty());
            if present.contains(&out) {
                prop_assert!(there(&members, &present) >= majority(present.len()));
                prop_assert!(there(&members, &left) >= majority(left.len()));
            }
        }
    }
}

/// A host of the simulation.
#[derive(Clone)]
struct Host {
    zone: String,
    up: bool,
    since: u64,
}

/// Hosts join, die for good, return, flap and are removed, each second; then nothing happens any more.
fn simulate(seed: u64) -> usize {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut hosts: BTreeMap<u64, Host> = BTreeMap::new();
    let host = |rng: &mut StdRng, now| Host {
        zone: format!("z{}", rng.random_range(0..3)),
        up: true,
        since: now,
    };
    hosts.insert(1, host(&mut rng, 0));
    let mut voters = set(&[1]);
    let (mut newest, mut changes, mut last_change) = (1, 0, 0);
    let quiet = 600_000;
    let end = quiet + 200_000;
    for now in (0..end).step_by(1_000) {
        let up = |hosts: &BTreeMap<u64, Host>, of: &BTreeSet<u64>| {
            of.iter()
                .filter(|id| hosts.get(id).is_some_and(|host| host.up))
                .count()
        };
        if now < quiet && rng.random_ratio(1, 8) {
            let ids: Vec<u64> = hosts.keys().copied().collect();
            let id = ids[rng.random_range(0..ids.len())];
            match rng.random_range(0..10) {
                0..3 if hosts.len() < 8 => {
                    newest += 1;
                    hosts.insert(newest, host(&mut rng, now));
                }
                3..6 => {
                    // As many as a cluster must bear.
                    let dies = set(&[id]);
                    let left: BTreeSet<u64> = voters.difference(&dies).copied().collect();
                    if up(&hosts, &left) >= majority(voters.len()) {
                        let host = hosts.get_mut(&id).unwrap();
                        (host.up, host.since) = (false, now);
                    }
                }
                _ => {
                    let host = hosts.get_mut(&id).unwrap();
                    if !host.up {
                        (host.up, host.since) = (true, now);
                    }
                }
            }
        }
        let standings: Vec<Standing> = hosts
            .iter()
            .map(|(id, host)| Standing {
                id: *id,
                zone: host.zone.clone(),
                vote: Voting::Auto,
                silent: if host.up { 100 } else { now - host.since },
                well: host.up.then_some(now - host.since),
                lag: Some(if host.up { 0 } else { 1_000 }),
            })
            .collect();
        assert!(
            up(&hosts, &voters) >= majority(voters.len()),
            "seed {seed}: the majority is lost"
        );
        let leader = *voters.iter().find(|id| hosts[id].up).unwrap();
        if let Some(new) = next(&standings, &[voters.clone()], leader, RULES) {
            assert_eq!(new.len() % 2, 1, "seed {seed}");
            (voters, changes, last_change) = (new, changes + 1, now);
        }
    }
    let well = hosts.values().filter(|host| host.up).count();
    let wanted = (well.min(MAX_VOTERS) - 1) / 2 * 2 + 1;
    let voting = up_of(&hosts, &voters);
    assert!(
        voting >= wanted.min(MAX_VOTERS),
        "seed {seed}: {voting} of {} voters are up; {well} hosts are",
        voters.len()
    );
    assert!(
        last_change < quiet + 70_000,
        "seed {seed}: it does not come to rest"
    );
    changes
}

fn up_of(hosts: &BTreeMap<u64, Host>, of: &BTreeSet<u64>) -> usize {
    of.iter().filter(|id| hosts[id].up).count()
}

#[test]
fn hosts_come_go_and_flap() {
    if let Ok(seed) = std::env::var("SEED") {
        simulate(seed.parse().unwrap());
        return;
    }
    let changes: usize = (0..500).map(simulate).sum();
    assert!(changes > 1_000, "only {changes} changes: the test did not test");
}

#[test]
fn whoever_flaps_moves_no_votes() {
    let mut members = all_well(1..=6);
    let mut voters = set(&[1, 2, 3, 4, 5]);
    for second in 0..600_u64 {
        // Host 3 is away for 20 of 30 seconds.
        let (away, back) = (second % 30 < 20, second % 30);
        members[2].silent = if away { second % 30 * 1_000 + 2_000 } else { 0 };
        members[2].well = (!away).then(|| (back - 20) * 1_000);
        if let Some(new) = next(&members, &[voters.clone()], 1, RULES) {
            voters = new;
        }
    }
    assert_eq!(voters, set(&[1, 2, 3, 4, 5]));
}
