//! Simulation: hosts with clocks of their own on a network that loses, delays, doubles and cuts.

use std::collections::BinaryHeap;
use std::net::Ipv4Addr;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

const SEEDS: u64 = 500;

/// One host, and what it believes of the time.
struct Host {
    id: String,
    core: Floating,
    /// Its clock shows this when the simulation begins, and runs so much too fast (in millionths).
    offset: Duration,
    drift: i64,
    up: bool,
    /// Until then its process does not run.
    paused: Duration,
    queue: Vec<Beat>,
}

enum Event {
    Tick(usize, u64),
    Arrives(usize, Beat),
}

struct World {
    rng: StdRng,
    now: Duration,
    hosts: Vec<Host>,
    addresses: BTreeSet<IpAddr>,
    /// Directed.
    cut: BTreeSet<(usize, usize)>,
    loss: f64,
    twice: f64,
    delay: Duration,
    events: BTreeMap<u64, Event>,
    heap: BinaryHeap<Reverse<(Duration, u64)>>,
    count: u64,
    incarnations: u64,
    /// Packets that were seen, to be replayed.
    seen: Vec<(usize, Beat)>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let hosts = rng.random_range(2..=6);
        let addresses = rng.random_range(1..=3_u8);
        let mut world = Self {
            now: Duration::ZERO,
            hosts: Vec::new(),
            addresses: (0..addresses)
                .map(|last| Ipv4Addr::new(192, 0, 2, last).into())
                .collect(),
            cut: BTreeSet::new(),
            loss: 0.0,
            twice: 0.0,
            delay: Duration::from_millis(2),
            events: BTreeMap::new(),
            heap: BinaryHeap::new(),
            count: 0,
            incarnations: 0,
            seen: Vec::new(),
            rng: StdRng::seed_from_u64(seed ^ 0xf10a),
        };
        for index in 0..hosts {
            let id = format!("host{index}");
            world.hosts.push(Host {
                core: Floating::new(&id, 0),
                id,
                offset: Duration::from_millis(rng.random_range(0..10_000_000)),
                drift: rng.random_range(-500..=500),
                up: false,
                paused: Duration::ZERO,
                queue: Vec::new(),
            });
        }
        for index in 0..hosts {
            world.start(index);
        }
        world
    }

    fn start(&mut self, index: usize) {
        let keys = self.hosts.iter().map(|host| HostKey::of(&host.id)).collect();
        self.incarnations += 1;
        let (incarnation, addresses) = (self.incarnations, self.addresses.clone());
        let host = &mut self.hosts[index];
        host.core = Floating::new(&host.id, incarnation);
        host.core.configure(&keys, &addresses);
        host.up = true;
        host.queue.clear();
        self.at(self.now, Event::Tick(index, incarnation));
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.count += 1;
        self.events.insert(self.count, event);
        self.heap.push(Reverse((time, self.count)));
    }

    fn local(&self, index: usize) -> Duration {
        let host = &self.hosts[index];
        let micros = i128::try_from(self.now.as_micros()).unwrap();
        let skewed = micros + micros * i128::from(host.drift) / 1_000_000;
        host.offset + Duration::from_micros(u64::try_from(skewed).unwrap())
    }

    fn run_until(&mut self, end: Duration) {
        while let Some(Reverse((time, id))) = self.heap.peek().copied() {
            if time > end {
                break;
            }
            self.heap.pop();
            self.now = time;
            match self.events.remove(&id).unwrap() {
                Event::Tick(index, incarnation) => self.tick(index, incarnation),
                Event::Arrives(index, beat) => self.arrive(index, beat),
            }
        }
        self.now = end;
    }

    fn tick(&mut self, index: usize, incarnation: u64) {
        if !self.hosts[index].up || self.hosts[index].core.incarnation != incarnation {
            return;
        }
        if self.hosts[index].paused > self.now {
            self.at(self.hosts[index].paused, Event::Tick(index, incarnation));
            return;
        }
        // What came while it was paused comes first, as from a socket's queue.
        for beat in std::mem::take(&mut self.hosts[index].queue) {
            self.arrive(index, beat);
        }
        let now = self.local(index);
        let actions = self.hosts[index].core.tick(now, true);
        for beat in actions.beats {
            self.send(index, &beat);
        }
        let late = Duration::from_micros(self.rng.random_range(0..5000));
        self.at(self.now + TICK + late, Event::Tick(index, incarnation));
    }

    fn send(&mut self, from: usize, beat: &Beat) {
        let to = self
            .hosts
            .iter()
            .position(|host| HostKey::of(&host.id) == beat.to)
            .unwrap();
        if self.rng.random_bool(0.01) {
            self.seen.push((to, beat.clone()));
        }
        if self.cut.contains(&(from, to)) || self.rng.random_bool(self.loss) {
            return;
        }
        let copies = if self.rng.random_bool(self.twice) { 2 } else { 1 };
        for _ in 0..copies {
            let delay = self.delay.mul_f64(self.rng.random_range(0.1..1.0));
            self.at(self.now + delay, Event::Arrives(to, beat.clone()));
        }
    }

    fn arrive(&mut self, index: usize, beat: Beat) {
        if !self.hosts[index].up {
            return;
        }
        if self.hosts[index].paused > self.now {
            self.hosts[index].queue.push(beat);
            return;
        }
        let now = self.local(index);
        let actions = self.hosts[index].core.receive(now, beat);
        assert!(actions.beats.is_empty());
    }

    fn wait(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    /// Those that are up and hold the address.
    fn holders(&self, address: IpAddr) -> Vec<usize> {
        let holds = |host: &Host| host.up && host.core.held().any(|held| held == address);
        (0..self.hosts.len())
            .filter(|index| holds(&self.hosts[*index]))
            .collect()
    }

    fn heal(&mut self) {
        self.cut.clear();
        self.loss = 0.0;
        self.twice = 0.0;
        self.delay = Duration::from_millis(2);
        let awake = self.hosts.iter().map(|host| host.paused).max();
        self.run_until(awake.unwrap_or_default().max(self.now));
    }

    fn assert_one_holder_each(&self, seed: u64, when: &str) {
        for address in &self.addresses {
            let holders = self.holders(*address);
            assert_eq!(
                holders.len(),
                1,
                "seed {seed}, {when}: {address} is held by {holders:?}"
            );
        }
    }

    fn trouble(&mut self) {
        let count = self.hosts.len();
        let (one, other) = (self.rng.random_range(0..count), self.rng.random_range(0..count));
        match self.rng.random_range(0..9) {
            0 => {
                self.cut.insert((one, other));
            }
            1 => {
                self.cut.extend([(one, other), (other, one)]);
            }
            2 => {
                let side: Vec<bool> = (0..count).map(|_| self.rng.random_bool(0.5)).collect();
                for a in 0..count {
                    for b in 0..count {
                        if side[a] != side[b] {
                            self.cut.insert((a, b));
                        }
                    }
                }
            }
            3 => self.loss = self.rng.random_range(0.0..0.5),
            4 => self.twice = self.rng.random_range(0.0..0.5),
            5 => self.delay = Duration::from_millis(self.rng.random_range(1..400)),
            6 => self.hosts[one].paused = self.now + Duration::from_millis(self.rng.random_range(50..5000)),
            7 => self.hosts[one].up = false,
            _ if self.hosts[one].up => {}
            _ => self.start(one),
        }
        // Somebody replays what was seen on the wire.
        if !self.seen.is_empty() {
            let (to, beat) = self.seen[self.rng.random_range(0..self.seen.len())].clone();
            self.at(self.now, Event::Arrives(to, beat));
        }
    }
}

/// The time after which hosts that hear one another agree: the settling of one that was paused or has just started,
/// and some heartbeats.
const CONVERGED: Duration = Duration::from_millis(2500);

#[test]
fn whatever_happens_one_host_holds_each_address_afterwards() {
    for seed in 0..SEEDS {
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
    for seed in 0..SEEDS {
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

#[test]
fn two_that_only_a_third_connects_agree() {
    for seed in 0..SEEDS {
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
