//! The rule, simulated.

mod cut_off;
mod simulation;

use rand::Rng as _;

use super::*;
use simulation::World;

/// How many runs there are of each kind.
fn seeds() -> u64 {
    let long = std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1");
    if long { 3000 } else { 120 }
}

/// The time after which hosts that hear one another agree: the settling of one that was paused or has just started,
/// and some heartbeats.
const CONVERGED: Duration = Duration::from_millis(2500);

#[test]
fn whatever_happens_one_host_holds_each_address_afterwards() {
    for seed in 0..seeds() {
        let mut world = World::new(seed);
        world.wait(CONVERGED);
        world.assert_one_holder_each(seed, "at first");
        for _ in 0..12 {
            world.trouble();
            let time = world.rng.random_range(10..1500);
            world.wait(Duration::from_millis(time));
        }
        world.heal();
        for index in 0..world.hosts.len() {
            if !world.hosts[index].up && (index == 0 || world.rng.random_bool(0.5)) {
                world.start(index);
            }
        }
        world.wait(CONVERGED);
        world.assert_one_holder_each(seed, "after the troubles");
        // It stays with its holder.
        let before: Vec<_> = world
            .addresses
            .iter()
            .map(|address| world.holders(*address))
            .collect();
        world.wait(Duration::from_secs(2));
        let after: Vec<_> = world
            .addresses
            .iter()
            .map(|address| world.holders(*address))
            .collect();
        assert_eq!(before, after, "seed {seed}");
    }
}

#[test]
fn an_address_is_taken_over_within_a_second() {
    let mut slowest = Duration::ZERO;
    for seed in 0..seeds() {
        let mut world = World::new(seed);
        world.loss = 0.02;
        world.twice = 0.02;
        world.delay = Duration::from_millis(20);
        let phase = world.rng.random_range(0..100);
        world.wait(CONVERGED + Duration::from_millis(phase));
        let address = *world.addresses.first().unwrap();
        let Some(holder) = world.holders(address).first().copied() else {
            panic!("seed {seed}: nobody holds {address}");
        };
        // What others hold, if there are others to hear of it.
        let held = |world: &World| -> Vec<Vec<usize>> {
            world
                .addresses
                .iter()
                .map(|address| world.holders(*address))
                .filter(|holders| *holders != [holder] && world.hosts.len() > 2)
                .collect()
        };
        let of_others = held(&world);
        // Dead, or alive and cut off: the others cannot tell, and need not.
        let dies = world.rng.random_bool(0.5);
        if dies {
            world.hosts[holder].up = false;
        } else {
            for other in 0..world.hosts.len() {
                world.cut.extend([(holder, other), (other, holder)]);
            }
        }
        let lost = world.now;
        while world.holders(address).iter().all(|index| *index == holder) {
            world.wait(Duration::from_millis(10));
            let took = world.now.saturating_sub(lost);
            assert!(
                took <= Duration::from_secs(1),
                "seed {seed}: {address} is held by nobody after {took:?}"
            );
        }
        slowest = slowest.max(world.now.saturating_sub(lost));
        // The old holder is back, and there is one again: the new one, which nothing has taken it from.
        let new = |world: &World| {
            let holders = world.holders(address);
            holders
                .into_iter()
                .filter(|index| *index != holder)
                .collect::<Vec<_>>()
        };
        world.heal();
        if dies {
            world.start(holder);
        }
        let before = new(&world);
        world.wait(CONVERGED);
        world.assert_one_holder_each(seed, "after its return");
        let after = world.holders(address);
        assert!(
            before.contains(&after[0]),
            "seed {seed}: {address} went from {before:?} to {after:?}"
        );
        // It took them for its own while it heard nobody, but they stay where they were.
        for holders in of_others {
            assert!(
                held(&world).contains(&holders),
                "seed {seed}: what {holders:?} held has moved"
            );
        }
    }
    println!("the slowest took {slowest:?}");
}

/// Who holds each address, alone.
fn holders(world: &World, seed: u64, when: &str) -> Vec<usize> {
    world.assert_one_holder_each(seed, when);
    let addresses = world.addresses.iter();
    addresses.map(|address| world.holders(*address)[0]).collect()
}

fn cut_from_all(world: &mut World, host: usize) {
    for other in 0..world.hosts.len() {
        world.cut.extend([(host, other), (other, host)]);
    }
}

#[test]
fn when_everybody_was_cut_off_everything_stays_where_it_was() {
    for seed in 0..seeds() {
        let mut world = World::of(seed, 3..=6);
        world.wait(CONVERGED);
        let before = holders(&world, seed, "at first");
        // As when a switch starts anew.
        for host in 0..world.hosts.len() {
            cut_from_all(&mut world, host);
        }
        let time = world.rng.random_range(50..4000);
        world.wait(Duration::from_millis(time));
        for address in &world.addresses {
            let all = world.hosts.len();
            let count = world.holders(*address).len();
            assert!(
                count == all || time < 1000,
                "seed {seed}: {count} of {all} hosts have taken {address}"
            );
        }
        world.heal();
        world.wait(CONVERGED);
        let after = holders(&world, seed, "afterwards");
        assert_eq!(before, after, "seed {seed}");
    }
}

#[test]
fn the_last_one_takes_all_within_a_second_and_keeps_them() {
    for seed in 0..seeds() {
        let mut world = World::of(seed, 3..=6);
        let phase = world.rng.random_range(0..100);
        world.wait(CONVERGED + Duration::from_millis(phase));
        let count = world.hosts.len();
        let last = world.rng.random_range(0..count);
        for lost in (0..count).filter(|host| *host != last) {
            world.hosts[lost].up = false;
        }
        world.wait(Duration::from_secs(1));
        assert_eq!(
            holders(&world, seed, "with one left"),
            vec![last; world.addresses.len()]
        );
        for lost in (0..count).filter(|host| *host != last) {
            world.start(lost);
        }
        world.wait(CONVERGED);
        // It is as good a holder as any by now: no other that is cut off for a while is better.
        cut_from_all(&mut world, (last + 1) % count);
        let time = world.rng.random_range(50..2000);
        world.wait(Duration::from_millis(time));
        world.heal();
        world.wait(CONVERGED);
        assert_eq!(
            holders(&world, seed, "with all back"),
            vec![last; world.addresses.len()],
            "seed {seed}"
        );
    }
}

#[test]
fn nothing_is_taken_on_the_word_of_one_that_is_about_to_be_lost_too() {
    for seed in 0..seeds() {
        let mut world = World::of(seed, 3..=3);
        world.wait(CONVERGED);
        let address = *world.addresses.first().unwrap();
        let holder = world.holders(address)[0];
        let (cut, back) = ((holder + 1) % 3, (holder + 2) % 3);
        // It is back after a pause, takes nothing yet, and does not hear the holder.
        world.cut.extend([(holder, back), (back, holder)]);
        world.hosts[back].paused = world.now + Duration::from_millis(500);
        world.wait(Duration::from_millis(700));
        world.cut.extend([(holder, cut), (cut, holder)]);
        world.wait(Duration::from_millis(40));
        world.cut.extend([(back, cut), (cut, back)]);
        world.wait(Duration::from_millis(450));
        assert_eq!(world.holders(address), [holder], "seed {seed}: it is taken");
        let time = world.rng.random_range(0..1000);
        world.wait(Duration::from_millis(time));
        world.heal();
        world.wait(CONVERGED);
        assert_eq!(world.holders(address), [holder], "seed {seed}: it has moved");
    }
}

#[test]
fn two_that_only_a_third_connects_agree() {
    for seed in 0..seeds() {
        let mut world = World::new(seed);
        if world.hosts.len() < 3 {
            continue;
        }
        world.wait(CONVERGED);
        world.cut.extend([(0, 1), (1, 0)]);
        world.wait(CONVERGED);
        world.assert_one_holder_each(seed, "with one link cut");
    }
}

#[test]
fn a_host_that_was_paused_gives_up_what_others_have_taken() {
    let mut world = World::new(7);
    world.wait(CONVERGED);
    let address = *world.addresses.first().unwrap();
    let holder = world.holders(address)[0];
    world.hosts[holder].paused = world.now + Duration::from_secs(3);
    world.wait(Duration::from_millis(2900));
    let others: Vec<_> = world
        .holders(address)
        .into_iter()
        .filter(|index| *index != holder)
        .collect();
    assert_eq!(others.len(), 1, "another has taken it");
    world.wait(Duration::from_millis(110));
    assert_eq!(world.holders(address), others, "at its first tick");
}

#[test]
fn a_host_alone_holds_all_and_one_that_is_ill_nothing() {
    let addresses = BTreeSet::from([[192, 0, 2, 1].into(), [192, 0, 2, 2].into()]);
    let mut core = Floating::new("a", 1);
    core.configure(&BTreeSet::from([HostKey::of("a")]), &addresses);
    let mut now = Duration::from_secs(5);
    while now < Duration::from_secs(6) {
        assert_eq!(core.tick(now, true), Actions::default(), "it listens first");
        now += TICK;
    }
    assert_eq!(core.tick(now, true).take.len(), 2);
    now += TIMEOUT;
    // So long without a tick is a pause: everything begins anew.
    assert_eq!(core.tick(now, true).release.len(), 2);
    for _ in 0..30 {
        now += TICK;
        core.tick(now, true);
    }
    assert_eq!(core.held().count(), 2);
    assert_eq!(core.tick(now + TICK, false).release.len(), 2);
    core.configure(&BTreeSet::new(), &addresses);
    for _ in 0..30 {
        now += TICK;
        core.tick(now, true);
    }
    assert_eq!(core.held().count(), 0, "it is not of the cluster any more");
}

#[test]
fn addresses_are_shared_out() {
    let hosts = ["a", "b", "c"].map(HostKey::of);
    let mut first = BTreeMap::<HostKey, u32>::new();
    for last in 0..250 {
        let address = AddressKey::of([192, 0, 2, last].into());
        let host = hosts.into_iter().min_by_key(|host| host.rank(address)).unwrap();
        *first.entry(host).or_default() += 1;
    }
    assert!(
        first.len() == 3 && first.values().all(|count| *count > 50),
        "{first:?}"
    );
}
