//! The life of the CA's roots with hosts that are away, slow, half dead or late: 500 seeds.
//!
//! A failing seed is printed; `SEED=n` runs that one alone.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::sync::LazyLock;
use std::time::Duration;

use flynn_api::Digest;
use flynn_api::discovery::{ClusterCa, Held, Root, Stage};
use flynn_api::tls::{IDENTITY_DAYS, RENEW_AFTER_DAYS};
use flynn_discovery::ca::rotation::{self, Next, Standing, Step};
use jiff::{SignedDuration, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const SEEDS: u64 = 500;
const STEPS: u32 = 150;
const SETTLE: Duration = Duration::from_secs(30);
/// Seconds after which a host that says nothing is not there.
const LEASE: i64 = 10;
/// Seconds that a signature is at most under way.
const FLIGHT: i64 = 10;

/// Roots by number; sets of them as bits.
type Roots = u64;

static NAMES: LazyLock<Vec<Digest>> = LazyLock::new(|| (0..64_u8).map(|root| Digest::of(&[root])).collect());

fn name(root: u8) -> Digest {
    NAMES[usize::from(root)]
}

fn number(digest: Digest) -> u8 {
    let at = NAMES.iter().position(|name| *name == digest).unwrap();
    u8::try_from(at).unwrap()
}

fn names(roots: Roots) -> BTreeSet<Digest> {
    (0..64).filter(|root| roots >> root & 1 == 1).map(name).collect()
}

/// A certificate with what goes along with it, and the roots that its owner trusts.
#[derive(Clone, Debug, PartialEq)]
struct Cert {
    signer: u8,
    /// The new one, and the one that has certified it.
    links: Vec<(u8, u8)>,
    trusts: Roots,
    began: Timestamp,
    ends: Timestamp,
}

impl Cert {
    /// Whether somebody who trusts `roots` can verify it, and whether it takes a link.
    fn verified_by(&self, roots: Roots) -> Option<bool> {
        let mut known: Roots = 1 << self.signer;
        if known & roots != 0 {
            return Some(false);
        }
        for _ in &self.links {
            for (new, old) in &self.links {
                known |= (known >> new & 1) << old;
            }
        }
        (known & roots != 0).then_some(true)
    }

    fn held(&self) -> Held {
        Held {
            trusts: names(self.trusts),
            holds: [name(self.signer)].into(),
        }
    }
}

/// The daemon's listener, discoverd, and a job that reads its files each time.
const PARTS: usize = 3;
const DISCOVERD: usize = 1;
const JOB: usize = 2;

struct Host {
    up: bool,
    /// Whether its daemon is: without, the other parts go on.
    daemon: bool,
    files: Vec<Cert>,
    used: Vec<Cert>,
    /// Signatures under way: for which part, what, and when it is there.
    flying: Vec<(usize, Cert, Timestamp)>,
    heard: Option<Timestamp>,
    told: Option<Held>,
}

impl Host {
    fn looks(&self) -> bool {
        self.up && self.daemon
    }
}

/// What must have happened for the run to mean anything.
#[derive(Debug, Default)]
struct Seen {
    switches: u32,
    switched_without_a_host: u32,
    dropped_by_time: u32,
    by_link: u32,
    late: u32,
    forgotten: u32,
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.switches += other.switches;
        self.switched_without_a_host += other.switched_without_a_host;
        self.dropped_by_time += other.dropped_by_time;
        self.by_link += other.by_link;
        self.late += other.late;
        self.forgotten += other.forgotten;
    }
}

struct World {
    rng: StdRng,
    now: Timestamp,
    /// All versions of the document: reads that need not be fresh may see an old one.
    versions: Vec<ClusterCa>,
    next_root: u8,
    hosts: Vec<Host>,
    seen: Seen,
}

fn seconds(count: i64) -> SignedDuration {
    SignedDuration::from_secs(count)
}

fn days(count: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * count)
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let mut ca = ClusterCa::new("0", "key 0");
        ca.roots.push(root(0, now));
        let count = rng.random_range(2..5);
        let mut world = Self {
            rng,
            now,
            versions: vec![ca],
            next_root: 1,
            hosts: Vec::new(),
            seen: Seen::default(),
        };
        for _ in 0..count {
            let cert = world.sign();
            world.hosts.push(Host {
                up: true,
                daemon: true,
                files: vec![cert.clone(); PARTS],
                used: vec![cert; PARTS],
                flying: Vec::new(),
                heard: None,
                told: None,
            });
        }
        world
    }

    fn ca(&self) -> &ClusterCa {
        self.versions.last().unwrap()
    }

    fn sign(&self) -> Cert {
        let ca = self.ca();
        Cert {
            signer: number(ca.roots[0].fingerprint),
            links: ca.retired.iter().map(|retired| link(&retired.link)).collect(),
            trusts: ca
                .roots
                .iter()
                .fold(0, |all, root| all | 1 << number(root.fingerprint)),
            began: self.now,
            // Validity is in whole days.
            ends: self.now + days(IDENTITY_DAYS + 1),
        }
    }

    fn standings(&self) -> BTreeMap<String, Standing> {
        let standing = |host: &Host| {
            let there = host.heard.is_some_and(|heard| self.now <= heard + seconds(LEASE));
            match &host.told {
                _ if !there => Standing::Away,
                None => Standing::Silent,
                Some(held) => Standing::Holds(held.clone()),
            }
        };
        let hosts = self.hosts.iter().enumerate();
        hosts
            .map(|(at, host)| (format!("h{at}"), standing(host)))
            .collect()
    }

    /// What discoverd's leader does each second.
    fn lead(&mut self) {
        let standings = self.standings();
        let Next::Do(step) = rotation::next(self.ca(), &standings, self.now, SETTLE) else {
            return;
        };
        let mut ca = self.ca().clone();
        match step {
            Step::Begin => {
                let (new, old) = (self.next_root, number(ca.roots[0].fingerprint));
                self.next_root += 1;
                let made = root(new, self.now);
                rotation::begin(
                    &mut ca,
                    made,
                    format!("key {new}"),
                    format!("{new} {old}"),
                    self.now,
                );
            }
            Step::Switch => {
                self.seen.switches += 1;
                let away = standings.values().any(|standing| *standing == Standing::Away);
                self.seen.switched_without_a_host += u32::from(away);
                let old = ca.key.clone();
                rotation::switch(&mut ca, self.now);
                assert!(
                    !serde_json::to_string(&ca).unwrap().contains(&old),
                    "a key that signs no more is kept"
                );
            }
            Step::Drop => {
                let away = standings.values().any(|standing| *standing == Standing::Away);
                self.seen.dropped_by_time += u32::from(away);
                rotation::drop_old(&mut ca);
            }
            Step::Forget => {
                self.seen.forgotten += 1;
                rotation::forget(&mut ca, self.now);
            }
        }
        let signer = number(ca.roots[0].fingerprint);
        assert_eq!(ca.key, format!("key {signer}"));
        assert!(ca.cert.starts_with(&ca.roots[0].cert));
        self.versions.push(ca);
    }

    /// What a host's daemon does every few seconds.
    fn look(&mut self, at: usize) {
        let host = &self.hosts[at];
        if !host.looks() {
            return;
        }
        if host.files[0].ends <= self.now {
            return self.come_back(at);
        }
        // What its discoverd knows may be old.
        let oldest = self.versions.len().saturating_sub(2);
        let known = &self.versions[self.rng.random_range(oldest..self.versions.len())];
        let wanted = Held {
            trusts: known.roots.iter().map(|root| root.fingerprint).collect(),
            holds: [known.roots[0].fingerprint].into(),
        };
        let host = &self.hosts[at];
        let due = |cert: &Cert| self.now >= cert.began + days(RENEW_AFTER_DAYS) || cert.held() != wanted;
        // One after the other.
        let part = host
            .flying
            .is_empty()
            .then(|| host.files.iter().position(due))
            .flatten();
        let mut held = host.used[0].held();
        for cert in host.used.iter().chain(&host.files) {
            held.join(&cert.held());
        }
        if let Some(part) = part {
            let arrives = self.now + seconds(self.rng.random_range(0..=FLIGHT));
            let cert = self.sign();
            self.hosts[at].flying.push((part, cert, arrives));
        }
        let now = self.now;
        let host = &mut self.hosts[at];
        host.told = Some(held);
        host.heard = Some(now);
    }

    /// A host whose certificate has run out.
    fn come_back(&mut self, at: usize) {
        let own = self.hosts[at].files[0].clone();
        if self.now > own.ends + days(rotation::LATE) {
            // It joins anew by a token.
            let cert = self.sign();
            self.hosts[at].files.fill(cert);
            return;
        }
        // Whoever is asked has one that has not run out; if nobody has, the discoverds sign for themselves.
        let ca = self.ca();
        let others = self
            .hosts
            .iter()
            .filter(|host| host.up)
            .map(|host| &host.used[DISCOVERD]);
        for server in others.filter(|server| server.ends > self.now) {
            assert!(
                server.verified_by(own.trusts).is_some(),
                "a late host cannot know the cluster: {own:?}, {server:?}, {ca:?}"
            );
        }
        let known = ca
            .roots
            .iter()
            .chain(ca.retired.iter().map(|retired| &retired.root));
        let known = known.fold(0, |all, root| all | 1 << number(root.fingerprint));
        assert!(
            own.verified_by(known).is_some(),
            "the cluster does not know a late host"
        );
        self.seen.late += 1;
        let cert = self.sign();
        self.hosts[at].files.fill(cert);
    }

    /// Signatures arrive, and what is in the files comes into use: a job's at once, the others' when they look.
    fn settle(&mut self, at: usize, reload: bool) {
        let now = self.now;
        let host = &mut self.hosts[at];
        if !host.up {
            host.flying.clear();
            return;
        }
        let flying = std::mem::take(&mut host.flying);
        for (part, cert, arrives) in flying {
            if arrives <= now {
                host.files[part] = cert;
            } else {
                host.flying.push((part, cert, arrives));
            }
        }
        for part in 0..PARTS {
            if part == JOB || reload {
                host.used[part] = host.files[part].clone();
            }
        }
    }

    fn check(&mut self) {
        let mut linked = 0;
        let live = || {
            let hosts = self.hosts.iter().enumerate().filter(|(_, host)| host.up);
            hosts
                .flat_map(|(at, host)| host.used.iter().map(move |cert| (at, cert)))
                .filter(|(_, cert)| cert.ends > self.now)
        };
        for (one, shown) in live() {
            for (other, verifier) in live() {
                match shown.verified_by(verifier.trusts) {
                    Some(link) => linked += u32::from(link),
                    None => panic!(
                        "h{other} cannot verify h{one}: {shown:?} by {:?}; the CA is {:?}",
                        verifier,
                        self.ca()
                    ),
                }
            }
        }
        self.seen.by_link += linked;
    }

    fn step(&mut self, faults: bool) {
        self.now += seconds(self.rng.random_range(1..6));
        for at in 0..self.hosts.len() {
            if faults {
                self.disturb(at);
            }
            let (looks, reloads) = (self.rng.random_bool(0.6), self.rng.random_bool(0.7));
            if looks {
                self.look(at);
            }
            self.settle(at, reloads);
            // Between two hosts' doing, not only after all of it.
            self.check();
        }
        if self.rng.random_bool(0.7) {
            self.lead();
        }
        self.check();
    }

    fn disturb(&mut self, at: usize) {
        let dice = self.rng.random_range(0..100);
        let others = self.hosts.iter().filter(|host| host.up).count();
        let host = &mut self.hosts[at];
        match dice {
            0..2 if others > 1 => host.up = false,
            2..6 if !host.up => {
                host.up = true;
                host.daemon = true;
                host.used.clone_from(&host.files);
            }
            6..8 => host.daemon = false,
            8..13 => host.daemon = true,
            _ => {}
        }
    }

    /// Much time goes by, in which all that can do so go on as ever.
    fn pass(&mut self) {
        let longest = if self.rng.random_bool(0.3) { 300 } else { 25 };
        let mut left = self.rng.random_range(1..longest);
        while left > 0 {
            let day = left.min(20);
            left -= day;
            for _ in 0..30 {
                self.step(false);
            }
            // What is signed arrives.
            self.now += seconds(FLIGHT);
            for at in 0..self.hosts.len() {
                self.settle(at, true);
            }
            self.check();
            self.now += days(day);
            // Nobody is heard of, of those that are away; the others beat on.
            let now = self.now;
            for host in self
                .hosts
                .iter_mut()
                .filter(|host| host.looks() && host.heard.is_some())
            {
                host.heard = Some(now);
            }
            self.check();
        }
    }

    fn request(&mut self) {
        let mut ca = self.ca().clone();
        if ca.rotation.is_none() && !ca.requested && self.next_root < 60 {
            ca.requested = true;
            self.versions.push(ca);
        }
    }
}

fn root(number: u8, now: Timestamp) -> Root {
    Root {
        fingerprint: name(number),
        not_before: now,
        not_after: now + days(3650),
        cert: format!("<{number}>"),
    }
}

fn link(text: &str) -> (u8, u8) {
    let (new, old) = text.split_once(' ').unwrap();
    (new.parse().unwrap(), old.parse().unwrap())
}

fn run(seed: u64) -> Seen {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        match world.rng.random_range(0..100) {
            0..4 => world.request(),
            4..6 => world.pass(),
            _ => world.step(true),
        }
    }
    // All are well again: the change comes to its end.
    for host in &mut world.hosts {
        if !host.up {
            host.used.clone_from(&host.files);
        }
        (host.up, host.daemon) = (true, true);
    }
    world.request();
    let settled = |world: &World| {
        let ca = world.ca();
        let signer = Held {
            trusts: [ca.roots[0].fingerprint].into(),
            holds: [ca.roots[0].fingerprint].into(),
        };
        ca.rotation.is_none()
            && !ca.requested
            && world
                .hosts
                .iter()
                .all(|host| host.used.iter().all(|cert| cert.held() == signer))
    };
    let asked = |world: &World| world.ca().requested || world.ca().rotation.is_some();
    assert!(asked(&world) || world.next_root >= 60);
    for _ in 0..2_000 {
        if settled(&world) {
            return world.seen;
        }
        world.step(false);
    }
    panic!("it does not come to an end: {:?}", world.standings());
}

#[test]
fn all_can_verify_each_other_at_any_time() {
    let seeds: Vec<u64> = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) if std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1") => (0..SEEDS * 20).collect(),
        Err(_) => (0..SEEDS).collect(),
    };
    let mut all = Seen::default();
    for seed in &seeds {
        let result = std::panic::catch_unwind(|| run(*seed));
        all += result.unwrap_or_else(|_| panic!("seed {seed}"));
    }
    eprintln!("{all:?}");
    if seeds.len() > 1 {
        let Seen {
            switches,
            switched_without_a_host,
            dropped_by_time,
            by_link,
            late,
            forgotten,
        } = all;
        for happened in [
            switches,
            switched_without_a_host,
            dropped_by_time,
            by_link,
            late,
            forgotten,
        ] {
            assert!(happened > 0, "not all happened that should: {all:?}");
        }
    }
}

/// Hosts that are there but do not say what they trust hold the new root back; those that are away do not.
#[test]
fn what_is_waited_for_is_named() {
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    let mut ca = ClusterCa::new("<0>", "key 0");
    ca.roots.push(root(0, now));
    let both = Held {
        trusts: names(0b11),
        holds: names(0b1),
    };
    let standing = |one: Standing| {
        BTreeMap::from([
            ("h1".to_owned(), Standing::Holds(both.clone())),
            ("h2".to_owned(), one),
        ])
    };
    let fine = standing(Standing::Holds(both.clone()));
    assert_eq!(rotation::next(&ca, &fine, now, SETTLE), Next::Rest);
    // A year before its end it is replaced by itself.
    let late = now + days(3650 - rotation::BEFORE + 1);
    assert_eq!(rotation::next(&ca, &fine, late, SETTLE), Next::Do(Step::Begin));
    ca.requested = true;
    assert_eq!(rotation::next(&ca, &fine, now, SETTLE), Next::Do(Step::Begin));
    rotation::begin(&mut ca, root(1, now), "key 1".into(), "1 0".into(), now);
    assert_eq!((ca.cert.as_str(), ca.key.as_str()), ("<0><1>", "key 0"));

    let waits = |ca: &ClusterCa, hosts: &BTreeMap<String, Standing>, now| match rotation::next(
        ca, hosts, now, SETTLE,
    ) {
        Next::Wait(waits, _) => waits
            .into_iter()
            .map(|wait| (wait.host, wait.away))
            .collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let soon = now + seconds(31);
    assert_eq!(waits(&ca, &fine, now + seconds(29)), []);
    assert_eq!(waits(&ca, &BTreeMap::new(), soon), []);
    let h2 = |away| [("h2".to_owned(), away)];
    assert_eq!(waits(&ca, &standing(Standing::Silent), soon), h2(false));
    let old = Held {
        trusts: names(0b1),
        holds: names(0b1),
    };
    assert_eq!(waits(&ca, &standing(Standing::Holds(old)), soon), h2(false));
    assert_eq!(
        rotation::next(&ca, &standing(Standing::Away), soon, SETTLE),
        Next::Do(Step::Switch)
    );
    assert_eq!(rotation::next(&ca, &fine, soon, SETTLE), Next::Do(Step::Switch));

    rotation::switch(&mut ca, soon);
    assert_eq!(
        (ca.cert.as_str(), ca.key.as_str(), ca.links().as_str()),
        ("<1><0>", "key 1", "1 0")
    );
    assert_eq!(ca.rotation.as_ref().unwrap().stage, Stage::Renew);
    let later = soon + seconds(31);
    assert_eq!(waits(&ca, &standing(Standing::Away), later).len(), 2);
    let renewed = Held {
        trusts: names(0b11),
        holds: names(0b10),
    };
    let hosts = BTreeMap::from([("h1".to_owned(), Standing::Holds(renewed))]);
    assert_eq!(rotation::next(&ca, &hosts, later, SETTLE), Next::Do(Step::Drop));
    let outlived = soon + days(IDENTITY_DAYS + 2);
    assert_eq!(
        rotation::next(&ca, &standing(Standing::Away), outlived, SETTLE),
        Next::Do(Step::Drop)
    );
    rotation::drop_old(&mut ca);
    assert_eq!((ca.cert.as_str(), ca.roots.len()), ("<1>", 1));
    // Its link is of use for a year.
    let forgotten = soon + days(IDENTITY_DAYS + 2 + rotation::LATE);
    assert_eq!(
        rotation::next(&ca, &hosts, forgotten, SETTLE),
        Next::Do(Step::Forget)
    );
    rotation::forget(&mut ca, forgotten);
    assert_eq!(ca.links(), "");
}
