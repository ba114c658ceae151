//! A host is cut off that has just taken over, while the former holder is hardly back: what a script does that has one
//! fault follow the other, on a machine that is busy.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use rand::Rng as _;
use rand::seq::SliceRandom as _;

use super::simulation::{Load, World};
use super::{CONVERGED, TIMEOUT, seeds};

/// Between looks at who holds what.
const STEP: Duration = Duration::from_millis(2);

/// What busy machines do to processes and packets, and is to make no difference.
const BUSY: Load = Load {
    stalls: (0.05, Duration::from_millis(150)),
    late: (0.05, Duration::from_millis(150)),
};

/// For so long at most two hosts that hear one another hold an address both, when nothing is late.
const BOTH: Duration = Duration::from_millis(150);

struct Run {
    world: World,
    seed: u64,
    address: IpAddr,
    /// Who has it at first, and is paused.
    first: usize,
    /// When that has noticed that it was.
    resumes: Duration,
    /// Who takes over, and is cut off.
    next: Option<usize>,
    /// Who holds what at first.
    before: BTreeMap<IpAddr, usize>,
    /// Since when two hold an address that hear one another, and the longest that it was so.
    both: BTreeMap<(IpAddr, usize, usize), Duration>,
    longest: Duration,
    wrong: Vec<String>,
}

impl Run {
    fn new(seed: u64, load: Load) -> Self {
        let mut world = World::of(seed, 3..=5);
        world.load = load;
        world.delay = Duration::from_millis(world.rng.random_range(1..=30));
        world.wait(CONVERGED + Duration::from_secs(1));
        let address = *world.addresses.first().unwrap();
        let before: BTreeMap<IpAddr, usize> = world
            .addresses
            .iter()
            .map(|address| (*address, world.holders(*address)[0]))
            .collect();
        Self {
            first: before[&address],
            world,
            seed,
            address,
            resumes: Duration::ZERO,
            next: None,
            before,
            both: BTreeMap::new(),
            longest: Duration::ZERO,
            wrong: Vec::new(),
        }
    }

    fn millis(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.world.rng.random_range(0..=most))
    }

    /// Who holds the address for clients that are not cut off, of all but the one that is paused.
    fn reached(&self, address: IpAddr) -> Vec<usize> {
        let paused = |index: usize| index == self.first && self.world.now < self.resumes;
        let holders = self.world.holders(address).into_iter();
        holders
            .filter(|index| Some(*index) != self.next && !paused(*index))
            .collect()
    }

    fn wait(&mut self, time: Duration) {
        let end = self.world.now + time;
        while self.world.now < end {
            let step = STEP.min(end.saturating_sub(self.world.now));
            self.world.wait(step);
            self.look();
        }
    }

    fn look(&mut self) {
        for (address, before) in self.before.clone() {
            let reached = self.reached(address);
            // What those hold to whom nothing happens stays where it is.
            if before != self.first && Some(before) != self.next && reached != [before] {
                let wrong = format!("{address} went from {before} to {reached:?} without a need");
                self.wrong.push(wrong);
            }
            let holders = self.world.holders(address);
            for one in 0..self.world.hosts.len() {
                for other in one + 1..self.world.hosts.len() {
                    let both = holders.contains(&one) && holders.contains(&other);
                    let key = (address, one, other);
                    if both && self.world.hear_mutually(one, other) {
                        let since = *self.both.entry(key).or_insert(self.world.now);
                        self.longest = self.longest.max(self.world.now.saturating_sub(since));
                    } else {
                        self.both.remove(&key);
                    }
                }
            }
        }
    }

    /// Waits until somebody holds the address again: who.
    fn taken(&mut self, limit: Duration) -> usize {
        let begun = self.world.now;
        loop {
            if let Some(holder) = self.reached(self.address).first() {
                return *holder;
            }
            self.wait(STEP);
            let seed = self.seed;
            assert!(self.world.now < begun + limit, "seed {seed}: nobody takes it");
        }
    }

    /// Something happens to the links between a host and the others, each in each direction: in any order, at once or
    /// one after the other.
    fn each_link(&mut self, host: usize, change: impl Fn(&mut World, (usize, usize))) {
        let mut others: Vec<usize> = (0..self.world.hosts.len())
            .filter(|other| *other != host)
            .collect();
        others.shuffle(&mut self.world.rng);
        let most = if self.world.rng.random_bool(0.3) { 0 } else { 20 };
        for other in others {
            for link in [(host, other), (other, host)] {
                change(&mut self.world, link);
                let pause = self.millis(most);
                self.wait(pause);
            }
        }
    }

    /// Soon, or later.
    fn wait_a_while(&mut self) {
        let most = if self.world.rng.random_bool(0.5) { 60 } else { 1500 };
        let wait = self.millis(most);
        self.wait(wait);
    }

    /// How long it took until the second took over.
    fn run(&mut self) -> Duration {
        let pause = Duration::from_millis(400) + self.millis(300);
        self.world.hosts[self.first].paused = self.world.now + pause;
        self.resumes = self.world.now + pause + Duration::from_millis(10);
        let next = self.taken(Duration::from_secs(1));
        self.wait_a_while();
        self.next = Some(next);
        let lost = self.world.now;
        self.each_link(next, |world, link| {
            world.cut.insert(link);
        });
        // For a moment the one that was paused may be missed as well: then there is no majority.
        self.taken(Duration::from_millis(1300));
        let took = self.world.now.saturating_sub(lost);
        self.wait_a_while();
        let addresses = self.before.keys().copied();
        let during: Vec<_> = addresses
            .map(|address| (address, self.reached(address)))
            .collect();
        self.each_link(next, |world, link| {
            world.cut.remove(&link);
        });
        self.wait(CONVERGED);
        for (address, during) in during {
            let after = self.world.holders(address);
            if after.len() != 1 || during.len() == 1 && after != during {
                let wrong = format!("{address} went back from {during:?} to {after:?}");
                self.wrong.push(wrong);
            }
        }
        took
    }
}

fn check(load: Load, both: Duration) {
    let seeds = seeds();
    let (mut slowest, mut longest) = (Duration::ZERO, Duration::ZERO);
    let mut wrong = Vec::new();
    for seed in 0..seeds {
        let mut run = Run::new(seed, load);
        slowest = slowest.max(run.run());
        longest = longest.max(run.longest);
        if let Some(first) = run.wrong.first() {
            let (one, other) = (run.first, run.next);
            wrong.push(format!("seed {seed}, {one} first, {other:?} next: {first}"));
        }
    }
    println!(
        "the slowest took over in {slowest:?}; for at most {longest:?} two held one that heard each other"
    );
    let some = &wrong[..wrong.len().min(10)];
    assert!(wrong.is_empty(), "{} of {seeds} runs: {some:#?}", wrong.len());
    assert!(longest <= both, "two hold one for {longest:?}");
}

#[test]
fn whoever_took_over_from_one_that_was_cut_off_keeps_it() {
    check(Load::default(), BOTH);
}

#[test]
fn whoever_took_over_on_busy_machines_keeps_it() {
    check(BUSY, BOTH + 2 * TIMEOUT);
}
