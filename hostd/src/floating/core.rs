//! Who holds which floating address. Pure: no clock, no sockets.
//!
//! Each host sends each other host a heartbeat every [`BEAT`]. It carries the number of the last heartbeat that came
//! the other way, so that one counts only if it answers something that was sent within [`TIMEOUT`]: what was recorded
//! earlier, or lay in a queue while a process was paused, proves nothing, and who hears without being heard is not
//! taken for alive. A heartbeat also says whom its sender hears, so that two hosts which only a third connects agree.
//!
//! Of the hosts that are alive and eligible, the first in an order that is the same everywhere takes an address that
//! nobody holds, and keeps it: one that comes back does not move what others have by now. Each take has a greater number
//! than those before, and of two holders the one with the smaller number yields: connections have moved to the other.
//! One who hears nobody, though there are several, is rather cut off itself than left over: what it takes has a number
//! below that of those who had it, so that they have it still when it comes back. Heartbeats say who holds what by which
//! number. A host is eligible once it has listened for [`SETTLE`]: it takes
//! nothing before it can know who is there. One whose clock has jumped, because it was paused, begins anew.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

/// Between heartbeats.
pub(crate) const BEAT: Duration = Duration::from_millis(100);
/// Between ticks.
pub(crate) const TICK: Duration = Duration::from_millis(50);
/// A host that was not heard for so long is gone.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(300);
/// How long a host listens before it takes anything.
pub(crate) const SETTLE: Duration = Duration::from_secs(1);
/// Between announcements of an address that is held: who has missed one hears the next.
pub(crate) const ANNOUNCE: Duration = Duration::from_secs(1);
/// So many hosts at most take part: everybody hears everybody.
pub(crate) const MAX_HOSTS: usize = 16;
/// So many addresses there may be: a heartbeat has to fit into a packet.
pub(crate) const MAX_ADDRESSES: usize = 48;

/// A host, by a digest of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HostKey(pub(crate) u64);

impl HostKey {
    /// Of the host with this id.
    pub(crate) fn of(id: &str) -> Self {
        Self(digest(id.as_bytes()))
    }

    /// Its place in the order of those that may hold an address: the smallest is the first.
    fn rank(self, address: AddressKey) -> (u64, Self) {
        // Two digests, mixed so that each of their bits tells (as SplitMix64 does).
        let mut mixed = self.0 ^ address.0;
        for factor in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(factor);
        }
        (mixed ^ (mixed >> 31), self)
    }
}

/// An address, by a digest of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AddressKey(pub(crate) u64);

impl AddressKey {
    fn of(address: IpAddr) -> Self {
        let address = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        Self(digest(&address.octets()))
    }
}

fn digest(bytes: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&Sha256::digest(bytes)[..8]);
    u64::from_be_bytes(first)
}

/// That a host holds an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) address: AddressKey,
    pub(crate) host: HostKey,
    /// The number of its take.
    pub(crate) take: u64,
}

impl Claim {
    /// The greatest is right.
    fn order(&self) -> (u64, Reverse<(u64, HostKey)>) {
        (self.take, Reverse(self.host.rank(self.address)))
    }
}

/// The number of a heartbeat. A host that starts anew has another incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Number {
    pub(crate) incarnation: u64,
    pub(crate) sequence: u64,
}

/// A heartbeat from one host to one other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) from: HostKey,
    pub(crate) to: HostKey,
    pub(crate) number: Number,
    /// The last one that came the other way.
    pub(crate) echo: Number,
    /// Whether the sender takes addresses.
    pub(crate) eligible: bool,
    /// Which others the sender hears that take addresses.
    pub(crate) hears: Vec<HostKey>,
    /// What the sender holds, or hears that others hold: one claim for each address.
    pub(crate) claims: Vec<Claim>,
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Actions {
    /// To be taken and announced.
    pub(crate) take: Vec<IpAddr>,
    /// To be announced again.
    pub(crate) announce: Vec<IpAddr>,
    /// To be given up.
    pub(crate) release: Vec<IpAddr>,
    /// To be sent.
    pub(crate) beats: Vec<Beat>,
}

#[derive(Debug, Default)]
struct Peer {
    /// Its newest heartbeat.
    last: Number,
    /// When one came that answers what was sent lately.
    heard: Option<Duration>,
    eligible: bool,
    hears: Vec<HostKey>,
    claims: Vec<Claim>,
}

/// An address that is held.
#[derive(Debug)]
struct Hold {
    announced: Duration,
    claim: Claim,
}

/// One host's part. Times are those of its own monotonic clock.
#[derive(Debug)]
pub(crate) struct Floating {
    own: HostKey,
    incarnation: u64,
    peers: BTreeMap<HostKey, Peer>,
    addresses: BTreeMap<IpAddr, AddressKey>,
    held: BTreeMap<IpAddr, Hold>,
    /// The greatest number of a take that was heard of.
    takes: BTreeMap<IpAddr, u64>,
    /// Since when it listens; none while it is not healthy.
    settling: Option<Duration>,
    ticked: Option<Duration>,
    /// When each of the last heartbeats was sent, by its number.
    sent: BTreeMap<u64, Duration>,
    sequence: u64,
}

impl Floating {
    /// The host with this id, started for the `incarnation`th time: a number that it never had before.
    pub(crate) fn new(id: &str, incarnation: u64) -> Self {
        Self {
            own: HostKey::of(id),
            incarnation,
            peers: BTreeMap::new(),
            addresses: BTreeMap::new(),
            held: BTreeMap::new(),
            takes: BTreeMap::new(),
            settling: None,
            ticked: None,
            sent: BTreeMap::new(),
            sequence: 0,
        }
    }

    /// These are the cluster's hosts and addresses from now on. Of too many hosts, the same take part everywhere.
    pub(crate) fn configure(&mut self, hosts: &BTreeSet<HostKey>, addresses: &BTreeSet<IpAddr>) {
        let part: BTreeSet<HostKey> = hosts.iter().copied().take(MAX_HOSTS).collect();
        self.peers.retain(|host, _| part.contains(host));
        for host in &part {
            if *host != self.own {
                self.peers.entry(*host).or_default();
            }
        }
        // A host that is none of them holds nothing.
        self.addresses = if part.contains(&self.own) {
            let addresses = addresses.iter().take(MAX_ADDRESSES);
            addresses
                .map(|address| (*address, AddressKey::of(*address)))
                .collect()
        } else {
            BTreeMap::new()
        };
        self.takes
            .retain(|address, _| self.addresses.contains_key(address));
    }

    /// The addresses that it holds.
    pub(crate) fn held(&self) -> impl Iterator<Item = IpAddr> {
        self.held.keys().copied()
    }

    /// Time has passed. To be called every [`TICK`].
    pub(crate) fn tick(&mut self, now: Duration, healthy: bool) -> Actions {
        let paused = self
            .ticked
            .is_some_and(|before| now.saturating_sub(before) >= TIMEOUT);
        self.ticked = Some(now);
        if paused || !healthy {
            self.settling = None;
        }
        if healthy {
            self.settling.get_or_insert(now);
        }
        let mut actions = Actions::default();
        self.decide(now, &mut actions);
        let due = self
            .sent
            .last_key_value()
            .is_none_or(|(_, sent)| now.saturating_sub(*sent) >= BEAT);
        if due {
            self.beat(now, &mut actions);
        }
        actions
    }

    /// A heartbeat has come, of which it is certain who has sent it.
    pub(crate) fn receive(&mut self, now: Duration, beat: Beat) -> Actions {
        let mut actions = Actions::default();
        if beat.to != self.own {
            return actions;
        }
        let answers = beat.echo.incarnation == self.incarnation
            && self
                .sent
                .get(&beat.echo.sequence)
                .is_some_and(|sent| now.saturating_sub(*sent) <= TIMEOUT);
        let Some(peer) = self.peers.get_mut(&beat.from) else {
            return actions;
        };
        let newer =
            beat.number.incarnation != peer.last.incarnation || beat.number.sequence > peer.last.sequence;
        if !newer {
            return actions;
        }
        if !answers {
            // It counts for nothing but that it can be answered, and only while nobody better is known: a recorded one
            // would else have us answer the wrong number for ever.
            if !is_fresh(peer, now) {
                peer.last = beat.number;
            }
            return actions;
        }
        peer.last = beat.number;
        peer.heard = Some(now);
        peer.eligible = beat.eligible;
        peer.hears = beat.hears;
        peer.claims = beat.claims;
        for (address, key) in &self.addresses {
            for claim in peer.claims.iter().filter(|claim| claim.address == *key) {
                let greatest = self.takes.entry(*address).or_default();
                *greatest = claim.take.max(*greatest);
            }
        }
        self.decide(now, &mut actions);
        actions
    }

    fn is_eligible(&self, now: Duration) -> bool {
        self.settling
            .is_some_and(|since| now.saturating_sub(since) >= SETTLE)
    }

    /// Those that take addresses, as far as this host hears, and hears of.
    fn alive(&self, now: Duration) -> BTreeSet<HostKey> {
        let fresh = || self.peers.iter().filter(move |(_, peer)| is_fresh(peer, now));
        let direct = fresh().filter(|(_, peer)| peer.eligible).map(|(host, _)| *host);
        let heard_of = fresh().flat_map(|(_, peer)| peer.hears.iter().copied());
        let mut alive: BTreeSet<HostKey> = direct
            .chain(heard_of.filter(|host| self.peers.contains_key(host)))
            .collect();
        // One that says of itself that it takes nothing is believed more than those who hear it.
        alive.retain(|host| {
            self.peers
                .get(host)
                .is_none_or(|peer| peer.eligible || !is_fresh(peer, now))
        });
        alive
    }

    /// What this host holds, and what those say of themselves whom it hears.
    fn direct_claims(&self, now: Duration) -> impl Iterator<Item = Claim> {
        let own = self.held.values().map(|hold| hold.claim);
        let fresh = self.peers.iter().filter(move |(_, peer)| is_fresh(peer, now));
        let of_peers = fresh.flat_map(|(host, peer)| {
            let own = peer.claims.iter().filter(|claim| claim.host == *host);
            own.filter(|_| peer.eligible).copied()
        });
        own.chain(of_peers)
    }

    /// Who holds an address, as far as this host hears, and hears of.
    fn holder(&self, address: AddressKey, now: Duration, alive: &BTreeSet<HostKey>) -> Option<HostKey> {
        let fresh = self.peers.values().filter(|peer| is_fresh(peer, now));
        let heard_of = fresh.flat_map(|peer| peer.claims.iter().copied());
        let heard_of = heard_of.filter(|claim| {
            // What is said of a host counts for less than what it says itself.
            let itself = self
                .peers
                .get(&claim.host)
                .is_some_and(|peer| is_fresh(peer, now));
            claim.host != self.own && !itself && alive.contains(&claim.host)
        });
        self.direct_claims(now)
            .chain(heard_of)
            .filter(|claim| claim.address == address)
            .max_by_key(Claim::order)
            .map(|claim| claim.host)
    }

    fn decide(&mut self, now: Duration, actions: &mut Actions) {
        let cut_off = self.peers.len() > 1 && !self.peers.values().any(|peer| is_fresh(peer, now));
        let alive = self.alive(now);
        let eligible = self.is_eligible(now);
        let first = |address: AddressKey| {
            let own = self.own.rank(address);
            alive.iter().all(|host| own < host.rank(address))
        };
        let is_own = |address| {
            let holder = self.holder(address, now, &alive);
            holder.map_or_else(|| first(address), |holder| holder == self.own)
        };
        let own = self.addresses.iter().filter(|(_, key)| eligible && is_own(**key));
        let wanted: BTreeSet<IpAddr> = own.map(|(address, _)| *address).collect();
        let gone = self.held.keys().filter(|address| !wanted.contains(address));
        actions.release.extend(gone.copied());
        self.held.retain(|address, _| wanted.contains(address));
        for address in wanted {
            match self.held.get_mut(&address) {
                None => {
                    let greatest = self.takes.entry(address).or_default();
                    let take = number_of_take(*greatest, cut_off);
                    *greatest = take.max(*greatest);
                    let claim = Claim {
                        address: AddressKey::of(address),
                        host: self.own,
                        take,
                    };
                    let announced = now;
                    self.held.insert(address, Hold { announced, claim });
                    actions.take.push(address);
                }
                Some(hold) if now.saturating_sub(hold.announced) >= ANNOUNCE => {
                    hold.announced = now;
                    actions.announce.push(address);
                }
                Some(_) => {}
            }
        }
    }

    fn beat(&mut self, now: Duration, actions: &mut Actions) {
        self.sequence += 1;
        self.sent.insert(self.sequence, now);
        self.sent.retain(|_, sent| now.saturating_sub(*sent) <= TIMEOUT);
        let eligible = self.is_eligible(now);
        let hears: Vec<HostKey> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.eligible && is_fresh(peer, now))
            .map(|(host, _)| *host)
            .collect();
        let claims = self.addresses.values().filter_map(|address| {
            let about = self.direct_claims(now).filter(|claim| claim.address == *address);
            about.max_by_key(Claim::order)
        });
        let claims: Vec<Claim> = claims.collect();
        actions.beats.extend(self.peers.iter().map(|(host, peer)| Beat {
            from: self.own,
            to: *host,
            number: Number {
                incarnation: self.incarnation,
                sequence: self.sequence,
            },
            echo: peer.last,
            eligible,
            hears: hears.clone(),
            claims: claims.clone(),
        }));
    }
}

/// The number of the next take. Those of hosts that hear others are even, and greater than all before; those of hosts
/// that hear nobody are odd, and less than that of the last of the others.
fn number_of_take(greatest: u64, cut_off: bool) -> u64 {
    match (cut_off, greatest % 2) {
        (false, rest) => greatest.saturating_add(2 - rest),
        (true, 0) => greatest.saturating_sub(1),
        (true, _) => greatest,
    }
}

fn is_fresh(peer: &Peer, now: Duration) -> bool {
    peer.heard
        .is_some_and(|heard| now.saturating_sub(heard) < TIMEOUT)
}

#[cfg(test)]
mod tests;
