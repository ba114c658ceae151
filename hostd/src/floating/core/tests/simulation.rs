//! Hosts with clocks of their own on a network that loses, delays, doubles and cuts.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::super::{Beat, Floating, HostKey, TICK, is_fresh};

/// One host, and what it believes of the time.
pub(super) struct Host {
    id: String,
    key: HostKey,
    pub(super) core: Floating,
    /// Its clock shows this when the simulation begins, and runs so much too fast (in millionths).
    offset: Duration,
    drift: i64,
    pub(super) up: bool,
    /// Until then its process does not run.
    pub(super) paused: Duration,
    queue: Vec<Beat>,
}

enum Event {
    Tick(usize, u64),
    /// From the one to the other.
    Arrives(usize, usize, Beat),
}

pub(super) struct World {
    pub(super) rng: StdRng,
    pub(super) now: Duration,
    pub(super) hosts: Vec<Host>,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Directed.
    pub(super) cut: BTreeSet<(usize, usize)>,
    pub(super) loss: f64,
    pub(super) twice: f64,
    pub(super) delay: Duration,
    pub(super) load: Load,
    events: BTreeMap<u64, Event>,
    heap: BinaryHeap<Reverse<(Duration, u64)>>,
    count: u64,
    incarnations: u64,
    /// Packets that were seen, to be replayed.
    seen: Vec<(usize, Beat)>,
}

/// How unevenly processes run and packets travel, now and then.
#[derive(Clone, Copy, Default)]
pub(super) struct Load {
    /// How likely a process stands still after a tick, and for how long at most.
    pub(super) stalls: (f64, Duration),
    /// How likely a packet is late, and by how much at most.
    pub(super) late: (f64, Duration),
}

impl World {
    /// Of two to six hosts.
    pub(super) fn new(seed: u64) -> Self {
        Self::of(seed, 2..=6)
    }

    pub(super) fn of(seed: u64, hosts: RangeInclusive<usize>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let hosts = rng.random_range(hosts);
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
            load: Load::default(),
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
                key: HostKey::of(&id),
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

    pub(super) fn start(&mut self, index: usize) {
        let keys = self.hosts.iter().map(|host| host.key).collect();
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

    pub(super) fn run_until(&mut self, end: Duration) {
        while let Some(Reverse((time, id))) = self.heap.peek().copied() {
            if time > end {
                break;
            }
            self.heap.pop();
            self.now = time;
            match self.events.remove(&id).unwrap() {
                Event::Tick(index, incarnation) => self.tick(index, incarnation),
                Event::Arrives(from, to, beat) => {
                    // What is on its way is lost as well.
                    if !self.cut.contains(&(from, to)) {
                        self.arrive(to, beat);
                    }
                }
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
        let stall = self.sometimes(self.load.stalls);
        if !stall.is_zero() {
            self.hosts[index].paused = self.hosts[index].paused.max(self.now + stall);
        }
        self.at(self.now + TICK + late, Event::Tick(index, incarnation));
    }

    fn send(&mut self, from: usize, beat: &Beat) {
        let to = self.hosts.iter().position(|host| host.key == beat.to).unwrap();
        if self.rng.random_bool(0.01) {
            self.seen.push((to, beat.clone()));
        }
        if self.cut.contains(&(from, to)) || self.rng.random_bool(self.loss) {
            return;
        }
        let copies = if self.rng.random_bool(self.twice) { 2 } else { 1 };
        for _ in 0..copies {
            let delay = self.delay.mul_f64(self.rng.random_range(0.1..1.0)) + self.sometimes(self.load.late);
            self.at(self.now + delay, Event::Arrives(from, to, beat.clone()));
        }
    }

    fn sometimes(&mut self, (likely, most): (f64, Duration)) -> Duration {
        if likely == 0.0 || !self.rng.random_bool(likely) {
            return Duration::ZERO;
        }
        most.mul_f64(self.rng.random_range(0.0..1.0))
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
        self.hosts[index].core.receive(now, beat);
    }

    pub(super) fn wait(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    /// Those that are up and hold the address.
    pub(super) fn holders(&self, address: IpAddr) -> Vec<usize> {
        let holds = |host: &Host| host.up && host.core.held().any(|held| held == address);
        (0..self.hosts.len())
            .filter(|index| holds(&self.hosts[*index]))
            .collect()
    }

    /// Whether both hear one another, as far as they know.
    pub(super) fn hear_mutually(&self, one: usize, other: usize) -> bool {
        let hears = |one: usize, other: usize| {
            let peer = &self.hosts[one].core.peers[&self.hosts[other].key];
            is_fresh(peer, self.local(one))
        };
        hears(one, other) && hears(other, one)
    }

    pub(super) fn heal(&mut self) {
        self.cut.clear();
        self.loss = 0.0;
        self.twice = 0.0;
        self.delay = Duration::from_millis(2);
        let awake = self.hosts.iter().map(|host| host.paused).max();
        self.run_until(awake.unwrap_or_default().max(self.now));
    }

    pub(super) fn assert_one_holder_each(&self, seed: u64, when: &str) {
        for address in &self.addresses {
            let holders = self.holders(*address);
            assert_eq!(
                holders.len(),
                1,
                "seed {seed}, {when}: {address} is held by {holders:?}"
            );
        }
    }

    pub(super) fn trouble(&mut self) {
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
            6 => {
                let until = self.now + Duration::from_millis(self.rng.random_range(50..5000));
                // One that is paused longer stays so: its next tick is when that ends.
                self.hosts[one].paused = self.hosts[one].paused.max(until);
            }
            7 => self.hosts[one].up = false,
            _ if self.hosts[one].up => {}
            _ => self.start(one),
        }
        // Somebody replays what was seen on the wire.
        if !self.seen.is_empty() {
            let (to, beat) = self.seen[self.rng.random_range(0..self.seen.len())].clone();
            self.at(self.now, Event::Arrives(to, to, beat));
        }
    }
}
