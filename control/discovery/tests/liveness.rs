//! Who lives, under random faults: 500 seeds.
//!
//! Members, their voters and a leader are simulated tick by tick; [`Claims`] and [`Liveness`] are the real ones. Hosts
//! lose power, their discoverd is killed, links are cut for a while, members are stopped, leaders die. A failing seed is
//! printed; `SEED=n` runs that one alone.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};

use flynn_discovery::claims::{Claims, Told};
use flynn_discovery::liveness::{Lead, Liveness, Registered, Times};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const SEEDS: u64 = 500;
/// Milliseconds.
const TICK: u64 = 50;
const BEAT: u64 = 300;
const ROUND: u64 = 100;
const PROBE: u64 = 300;
const HEARTBEAT: u64 = 3_000;
const ELECTION: u64 = 800;
const TIMES: Times = Times {
    silence: 1_400,
    lease: 10_000,
};
/// Within this time of its loss a host's instances are gone.
const BOUND: u64 = 2_000;

/// A host with its discoverd and one instance.
struct Host {
    /// When it lost its power.
    dead: Option<u64>,
    /// Whether nothing else was wrong then.
    alone: bool,
    /// Until when its discoverd is not there.
    down_until: u64,
    /// Until when all its processes are stopped; the kernel answers.
    stopped_until: u64,
    /// Until when it reaches nobody.
    cut_until: u64,
    session: u64,
    claims: Claims,
    liveness: Liveness,
    told: BTreeMap<u64, Told>,
    /// When a voter could hear it last.
    sound: u64,
    /// When it would not have answered a probe last.
    unreachable: u64,
}

impl Host {
    fn new() -> Self {
        Self {
            dead: None,
            alone: false,
            down_until: 0,
            stopped_until: 0,
            cut_until: 0,
            session: 1,
            claims: Claims::new(TIMES.lease),
            liveness: Liveness::new(TIMES),
            told: BTreeMap::new(),
            sound: 0,
            unreachable: 0,
        }
    }

    fn runs(&self, now: u64) -> bool {
        self.dead.is_none() && now >= self.down_until && now >= self.stopped_until
    }

    fn linked(&self, now: u64) -> bool {
        self.dead.is_none() && now >= self.cut_until
    }

    /// discoverd has started anew: what it held in memory is lost.
    fn restart(&mut self) {
        self.session += 1;
        self.claims = Claims::new(TIMES.lease);
        self.liveness = Liveness::new(TIMES);
        self.told.clear();
    }
}

struct Cluster {
    now: u64,
    hosts: BTreeMap<u64, Host>,
    voters: u64,
    leader: u64,
    term: u64,
    /// Since when there has been no leader.
    leaderless: Option<u64>,
    led_since: u64,
    registered: BTreeMap<String, u64>,
    index: u64,
    /// Probes under way: when they began, of whom.
    probes: Vec<(u64, u64)>,
    /// When the last fault began that is not over at once.
    fault: u64,
    seen: BTreeSet<&'static str>,
}

fn instance(host: u64) -> String {
    format!("instance-{host}")
}

fn of_instance(id: &str) -> u64 {
    id.strip_prefix("instance-").unwrap().parse().unwrap()
}

fn registration(id: &str, index: u64, member: u64) -> Registered<'_> {
    Registered {
        service: "web",
        id,
        index,
        member,
    }
}

impl Cluster {
    fn new(random: &mut StdRng) -> Self {
        let hosts = random.random_range(2..=8);
        Self {
            now: 0,
            hosts: (1..=hosts).map(|id| (id, Host::new())).collect(),
            voters: match hosts {
                2 => 1,
                3 | 4 => 3,
                _ => 5,
            },
            leader: 1,
            term: 1,
            leaderless: None,
            led_since: 0,
            registered: BTreeMap::new(),
            index: 0,
            probes: Vec::new(),
            fault: 0,
            seen: BTreeSet::new(),
        }
    }

    fn is_voter(&self, id: u64) -> bool {
        id <= self.voters
    }

    fn active(&self, id: u64) -> bool {
        let host = &self.hosts[&id];
        host.runs(self.now) && host.linked(self.now)
    }

    /// A majority of the voters is there, whoever they are.
    fn quorum(&self) -> bool {
        (1..=self.voters).filter(|id| self.active(*id)).count() as u64 * 2 > self.voters
    }

    fn elect(&mut self) {
        if self.active(self.leader) && self.quorum() {
            self.leaderless = None;
            return;
        }
        let since = *self.leaderless.get_or_insert(self.now);
        if self.now - since >= ELECTION && self.quorum() {
            let next = (1..=self.voters).find(|id| self.active(*id) && *id != self.leader);
            if let Some(next) = next {
                (self.leader, self.term) = (next, self.term + 1);
                (self.leaderless, self.led_since) = (None, self.now);
                self.seen.insert("another leader");
                if std::env::var_os("SEED").is_some() {
                    eprintln!("{}: host {next} leads", self.now);
                }
            }
        }
    }

    fn fault(&mut self, random: &mut StdRng) {
        let hosts = self.hosts.len() as u64;
        let id = random.random_range(1..=hosts);
        let (now, is_only_voter) = (self.now, self.voters == 1 && id == 1);
        let host = self.hosts.get_mut(&id).unwrap();
        if host.dead.is_some() || now < host.down_until || now < host.stopped_until || now < host.cut_until {
            return;
        }
        let kind = match random.random_range(0..4) {
            0 if !is_only_voter => {
                host.dead = Some(now);
                host.alone = self.fault <= now;
                "power lost"
            }
            1 => {
                host.down_until = now + random.random_range(100..6_000);
                host.restart();
                "discoverd killed"
            }
            2 => {
                host.stopped_until = now + random.random_range(800..6_000);
                "stopped"
            }
            _ => {
                host.cut_until = now + random.random_range(100..6_000);
                "cut off"
            }
        };
        let until = now
            .max(host.down_until)
            .max(host.stopped_until)
            .max(host.cut_until);
        self.fault = self.fault.max(until);
        self.seen.insert(kind);
        if std::env::var_os("SEED").is_some() {
            eprintln!("{now}: host {id}: {kind}, until {}", self.fault);
        }
    }

    fn step(&mut self) {
        self.now += TICK;
        let now = self.now;
        self.elect();
        let ids: Vec<u64> = self.hosts.keys().copied().collect();
        let hears: BTreeMap<u64, bool> = ids.iter().map(|id| (*id, self.active(*id))).collect();
        let voters: Vec<u64> = ids
            .iter()
            .copied()
            .filter(|id| self.is_voter(*id) && hears[id])
            .collect();

        for id in &ids {
            let host = self.hosts.get_mut(id).unwrap();
            if !host.linked(now) {
                host.unreachable = now;
            }
            if host.runs(now) && now.is_multiple_of(HEARTBEAT / 3) {
                let known = self.registered.contains_key(&instance(*id));
                let may = hears[id] && self.leaderless.is_none();
                if !known && may {
                    self.index += 1;
                    self.registered.insert(instance(*id), self.index);
                }
                if known || may {
                    host.claims.heard(now, "web", &instance(*id));
                }
            }
        }
        if now.is_multiple_of(BEAT) {
            self.beats(&ids, &voters);
        }
        if now.is_multiple_of(ROUND) {
            self.rounds(&ids, &voters);
        }
        self.check_bound();
    }

    fn beats(&mut self, ids: &[u64], voters: &[u64]) {
        for id in ids {
            for voter in voters {
                let host = self.hosts.get_mut(id).unwrap();
                // A member always hears itself.
                if !host.runs(self.now) || (id != voter && !host.linked(self.now)) {
                    continue;
                }
                host.sound = self.now;
                let mut told = host.told.remove(voter).unwrap_or_default();
                for _ in 0..2 {
                    let host = &self.hosts[id];
                    let (beat, next) = told.next(*id, host.session, self.index, &host.claims);
                    let heard = self.hosts.get_mut(voter).unwrap().liveness.beat(self.now, beat);
                    if heard.understood {
                        told = next.unwrap_or(told);
                        break;
                    }
                    told = Told::default();
                }
                self.hosts.get_mut(id).unwrap().told.insert(*voter, told);
            }
        }
    }

    fn rounds(&mut self, ids: &[u64], voters: &[u64]) {
        let now = self.now;
        let members: BTreeSet<u64> = ids.iter().copied().collect();
        let leader = self.leader;
        let leads = self.leaderless.is_none();
        if leads {
            for suspect in self.hosts[&leader].liveness.suspects(now) {
                if self.probes.iter().all(|(_, of)| *of != suspect) {
                    self.probes.push((now, suspect));
                }
            }
            let probes = std::mem::take(&mut self.probes);
            for (began, suspect) in probes {
                let answers = self.hosts[&suspect].linked(now);
                if !answers && now - began < PROBE {
                    self.probes.push((began, suspect));
                    continue;
                }
                let ages: Vec<u64> = voters
                    .iter()
                    .filter(|voter| **voter != leader && **voter != suspect)
                    .filter_map(|voter| {
                        self.hosts[voter]
                            .liveness
                            .ages(now, &[suspect])
                            .get(&suspect)
                            .copied()
                    })
                    .collect();
                let liveness = &mut self.hosts.get_mut(&leader).unwrap().liveness;
                if let Some(age) = ages.into_iter().min() {
                    liveness.heard_elsewhere(suspect, now - age);
                }
                liveness.probed(suspect, began, answers);
            }
        } else {
            self.probes.clear();
        }
        for id in ids {
            let runs = self.hosts[id].runs(now);
            if !runs {
                continue;
            }
            let lead = (*id == leader && leads).then_some(Lead {
                term: self.term,
                acked: Some(0),
            });
            let registered = self.registered.clone();
            let host = self.hosts.get_mut(id).unwrap();
            host.claims.round(now);
            let expired = host.liveness.round(now, *id, &members, lead, || {
                registered
                    .iter()
                    .map(|(instance, index)| registration(instance, *index, of_instance(instance)))
            });
            for gone in expired {
                self.check_expiry(&gone.id);
                self.registered.remove(&gone.id);
            }
        }
    }

    /// Nobody expires who was heard, or whose host answered, just now.
    fn check_expiry(&mut self, instance: &str) {
        let host = &self.hosts[&of_instance(instance)];
        let unheard = self.now - host.sound;
        assert!(
            unheard + 2 * BEAT >= TIMES.silence,
            "{instance} expires at {} after {unheard} ms of silence",
            self.now
        );
        let answers_for = self.now - host.unreachable;
        assert!(
            answers_for <= 2 * PROBE || unheard + 2 * BEAT >= TIMES.lease,
            "{instance} expires at {} though its host answers",
            self.now
        );
        self.seen.insert(if host.dead.is_some() {
            "the dead expire"
        } else {
            "the living expire"
        });
    }

    /// The dead are gone within their bound, when they are the only ones that give no sign.
    fn check_bound(&mut self) {
        let (now, led_since) = (self.now, self.led_since);
        if self.leaderless.is_some() {
            return;
        }
        for (id, host) in &self.hosts {
            let Some(dead) = host.dead else { continue };
            let quiet = host.alone && self.fault == dead;
            let bound = if quiet {
                BOUND
            } else {
                BOUND + TIMES.lease + TIMES.silence
            };
            let since = if quiet {
                dead
            } else {
                dead.max(led_since).max(self.fault)
            };
            if now.saturating_sub(since) > bound {
                assert!(
                    !self.registered.contains_key(&instance(*id)),
                    "host {id} died at {dead}, and its instance is there at {now}"
                );
                if quiet {
                    self.seen.insert("within the bound");
                }
            }
        }
    }
}

fn run(seed: u64) -> BTreeSet<&'static str> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::new(&mut random);
    let mut next = 8_000;
    while cluster.now < 60_000 {
        if cluster.now >= next {
            cluster.fault(&mut random);
            next = cluster.now + random.random_range(500..12_000);
        }
        cluster.step();
    }
    // No faults from here on: everybody who lives is registered, and nobody else.
    for _ in 0..(40_000 / TICK) {
        cluster.step();
    }
    if cluster.quorum() {
        for (id, host) in &cluster.hosts {
            assert_eq!(
                cluster.registered.contains_key(&instance(*id)),
                host.dead.is_none(),
                "host {id}"
            );
        }
        cluster.seen.insert("converged");
    }
    cluster.seen
}

/// That a majority follows now.
const LEAD: Lead = Lead {
    term: 1,
    acked: Some(0),
};

/// However long the network is away, it is nobody's end: no majority heard the leader meanwhile, and it does not hear all at once
/// when the network comes back.
#[test]
fn a_network_that_comes_back_is_nobody_s_end() {
    let members = BTreeSet::from([1, 2, 3]);
    let (two, three) = (instance(2), instance(3));
    for elected in [false, true] {
        let mut liveness = Liveness::new(TIMES);
        for member in [2, 3] {
            let mut claims = Claims::new(TIMES.lease);
            claims.heard(0, "web", &instance(member));
            liveness.beat(0, Told::default().next(member, 1, 7, &claims).0);
        }
        let mut expired = |now: u64, lead: Option<Lead>| {
            let registered = || [(2, &two), (3, &three)].map(|(member, id)| registration(id, 7, member));
            let registered = || registered().into_iter();
            liveness.round(now, 1, &members, lead, registered).len()
        };
        assert_eq!(expired(100, (!elected).then_some(LEAD)), 0);
        let mut now = 100;
        while now < 60_000 {
            now += 100;
            let cut_off = Lead {
                acked: Some(now),
                ..LEAD
            };
            assert_eq!(expired(now, (!elected).then_some(cut_off)), 0, "at {now}");
        }
        // A majority follows again; not a beat has come yet.
        let back = now;
        while now < back + TIMES.lease {
            assert_eq!(expired(now, Some(LEAD)), 0, "at {now}");
            now += 100;
        }
        // Those who stay silent are gone in the end.
        while now < back + TIMES.lease + 1_500 && expired(now, Some(LEAD)) == 0 {
            now += 100;
        }
        assert!(now < back + TIMES.lease + 1_500);
    }
}

/// What a member says of an instance that said goodbye is not said of it when it has come back meanwhile.
#[test]
fn a_goodbye_is_of_the_registration_that_it_ends() {
    let members = BTreeSet::from([1]);
    for (registered, gone) in [(7, true), (9, true), (10, false)] {
        let (mut claims, mut liveness) = (Claims::new(TIMES.lease), Liveness::new(TIMES));
        claims.heard(0, "web", "one");
        let (beat, told) = Told::default().next(1, 1, 7, &claims);
        liveness.beat(0, beat);
        claims.gone("web", "one");
        let (beat, _) = told.unwrap().next(1, 1, 9, &claims);
        liveness.beat(100, beat);
        let expired = liveness.round(100, 1, &members, Some(LEAD), || {
            [registration("one", registered, 1)].into_iter()
        });
        assert_eq!(!expired.is_empty(), gone, "registered at {registered}");
    }
}

#[test]
fn nobody_expires_alive_and_nobody_lives_on_dead() {
    let seeds = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    let many = seeds.len() > 1;
    let mut seen = BTreeMap::<&str, u64>::new();
    for seed in seeds {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(of_this) => of_this
                .into_iter()
                .for_each(|what| *seen.entry(what).or_default() += 1),
            Err(panic) => {
                eprintln!("SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    eprintln!("{seen:?}");
    // A fault that never happened proves nothing.
    for what in [
        "power lost",
        "discoverd killed",
        "stopped",
        "cut off",
        "another leader",
        "the dead expire",
        "within the bound",
        "converged",
    ] {
        assert!(
            !many || seen.get(what).is_some_and(|times| *times > 20),
            "{what}: {seen:?}"
        );
    }
}
