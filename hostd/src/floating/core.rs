//! Who holds which floating address. Pure: no clock, no sockets.
//!
//! Each host sends each other host a heartbeat every [`TICK`]. It carries the number of the last heartbeat that came
//! the other way, so that one counts only if it answers something that was sent within [`TIMEOUT`]: what was recorded
//! earlier, or lay in a queue while a process was paused, proves nothing, and who hears without being heard is not
//! taken for alive. A heartbeat also says whom its sender hears, so that two hosts which only a third connects agree.
//!
//! Of the hosts that are alive and eligible, the first in an order that is the same everywhere takes an address that
//! nobody holds, and keeps it: one that comes back does not move what others have by now. Before it takes what a lost
//! host held, each that it still hears must have been heard since that loss: links are not cut at one instant, and who
//! is about to lose the others too would take what is theirs.
//!
//! Each take has a greater epoch than those before, also than the one by which another was to take it, who may have been
//! lost before it could tell. Of two holders the one with the smaller epoch yields: connections have moved to the other.
//!
//! Who hears no majority of the hosts (of three or more, be they eligible or not) is rather cut off itself than left
//! over. It takes what nobody holds only when it has heard none for [`PATIENCE`], and by no greater epoch, so that those
//! who had it have it still when it comes back. And what it held has another [`Standing`] from then on: it yields to what
//! was taken where there was a majority all the time, whatever the epochs, of which neither could hear. When it hears a
//! majority again, and of nobody who has taken what it holds, that is as good as any. Of two hosts neither can tell which
//! one is cut off, and the last take is right.
//!
//! A host is eligible once it has listened for [`SETTLE`]: it takes nothing before it can know who is there. One whose
//! clock has jumped, because it was paused, begins anew.

mod messages;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

pub(crate) use messages::{AddressKey, Beat, Claim, HostKey, MAX_EPOCH, Number, Standing};

/// Between ticks, and heartbeats: some may be late or lost before their host seems to be.
pub(crate) const TICK: Duration = Duration::from_millis(50);
/// A host that was not heard for so long is gone.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(300);
/// For how long a host that hears no majority takes nothing.
pub(crate) const PATIENCE: Duration = Duration::from_millis(300);
/// How long a host listens before it takes anything.
pub(crate) const SETTLE: Duration = Duration::from_secs(1);
/// Between announcements of an address that is held: who has missed one hears the next.
pub(crate) const ANNOUNCE: Duration = Duration::from_secs(1);
/// So many hosts at most take part: everybody hears everybody.
pub(crate) const MAX_HOSTS: usize = 16;
/// So many addresses there may be: a heartbeat has to fit into a packet.
pub(crate) const MAX_ADDRESSES: usize = 48;

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
    /// The greatest epoch that was heard of.
    epochs: BTreeMap<IpAddr, u64>,
    /// The epoch by which another was to take it, and may have before it was lost without a word.
    awaited: BTreeMap<IpAddr, u64>,
    /// Since when it listens; none while it is not healthy.
    settling: Option<Duration>,
    /// Whether it hears a majority, and since when that is so.
    majority: (bool, Duration),
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
            epochs: BTreeMap::new(),
            awaited: BTreeMap::new(),
            settling: None,
            majority: (false, Duration::ZERO),
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
        for epochs in [&mut self.epochs, &mut self.awaited] {
            epochs.retain(|address, _| self.addresses.contains_key(address));
        }
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
        self.look_round(now);
        let mut actions = Actions::default();
        self.decide(now, &mut actions);
        self.beat(now, &mut actions);
        actions
    }

    /// A heartbeat has come, of which it is certain who has sent it. What follows from it is for the next tick, when the
    /// others of its time have come as well.
    pub(crate) fn receive(&mut self, now: Duration, beat: Beat) {
        if beat.to != self.own {
            return;
        }
        // Whoever is heard again must not hide that nobody was before.
        self.look_round(now);
        let answers = beat.echo.incarnation == self.incarnation
            && self
                .sent
                .get(&beat.echo.sequence)
                .is_some_and(|sent| now.saturating_sub(*sent) <= TIMEOUT);
        let Some(peer) = self.peers.get_mut(&beat.from) else {
            return;
        };
        let newer =
            beat.number.incarnation != peer.last.incarnation || beat.number.sequence > peer.last.sequence;
        if !newer {
            return;
        }
        if !answers {
            // It counts for nothing but that it can be answered, and only while nobody better is known: a recorded one
            // would else have us answer the wrong number for ever.
            if !is_fresh(peer, now) {
                peer.last = beat.number;
            }
            return;
        }
        peer.last = beat.number;
        peer.heard = Some(now);
        peer.eligible = beat.eligible;
        peer.hears = beat.hears;
        peer.claims = beat.claims;
        for (address, key) in &self.addresses {
            for claim in peer.claims.iter().filter(|claim| claim.address == *key) {
                let greatest = self.epochs.entry(*address).or_default();
                *greatest = claim.epoch.max(*greatest);
            }
        }
    }

    /// Whether this host and those that it hears are a majority. Of two there is none to be told from the rest.
    fn hears_majority(&self, now: Duration) -> bool {
        let heard = self.peers.values().filter(|peer| is_fresh(peer, now)).count();
        let (side, all) = (heard + 1, self.peers.len() + 1);
        all <= 2 || 2 * side > all
    }

    fn look_round(&mut self, now: Duration) {
        let majority = self.hears_majority(now);
        if majority != self.majority.0 {
            self.majority = (majority, now);
        }
        if !majority {
            for hold in self.held.values_mut() {
                hold.claim.standing = hold.claim.standing.min(Standing::Lost);
            }
        }
    }

    /// Whether it is known well enough who is there for something to be taken.
    fn may_take(&self, now: Duration) -> bool {
        let (majority, since) = self.majority;
        // Where a majority is heard again, so is the rest soon.
        let patience = if majority { 2 * TICK } else { PATIENCE };
        let patient = now.saturating_sub(since) >= patience;
        let heard = || self.peers.values().filter_map(|peer| peer.heard);
        let fresh = |heard: &Duration| now.saturating_sub(*heard) < TIMEOUT;
        let loss = heard().filter(|heard| !fresh(heard)).max();
        let since = loss.map_or(Duration::ZERO, |last| last + TIMEOUT);
        patient && heard().filter(fresh).all(|heard| heard >= since)
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
        let alive = self.alive(now);
        let eligible = self.is_eligible(now);
        let first = |address: AddressKey| {
            let own = self.own.rank(address);
            alive.iter().all(|host| own < host.rank(address))
        };
        let mut wanted = BTreeSet::new();
        for (address, key) in &self.addresses {
            let own = match self.holder(*key, now, &alive) {
                Some(holder) => holder == self.own,
                None if first(*key) => true,
                None => {
                    let greatest = self.epochs.get(address).copied().unwrap_or_default();
                    self.awaited.insert(*address, next(greatest));
                    false
                }
            };
            if own && eligible {
                wanted.insert(*address);
            }
        }
        let gone = self.held.keys().filter(|address| !wanted.contains(address));
        actions.release.extend(gone.copied());
        self.held.retain(|address, _| wanted.contains(address));
        let may_take = self.may_take(now);
        let (majority, since) = self.majority;
        // By now it would have heard of whoever has taken what it holds.
        let undisputed = majority && now.saturating_sub(since) >= TIMEOUT;
        for address in wanted {
            let greatest = self.epochs.entry(address).or_default();
            let Some(hold) = self.held.get_mut(&address) else {
                if may_take {
                    let standing = if majority {
                        let awaited = self.awaited.get(&address).copied().unwrap_or_default();
                        *greatest = next(awaited.max(*greatest));
                        Standing::Majority
                    } else {
                        Standing::Alone
                    };
                    let claim = Claim {
                        address: AddressKey::of(address),
                        host: self.own,
                        epoch: *greatest,
                        standing,
                    };
                    let announced = now;
                    self.held.insert(address, Hold { announced, claim });
                    actions.take.push(address);
                }
                continue;
            };
            if undisputed && hold.claim.standing != Standing::Majority {
                *greatest = next(*greatest);
                hold.claim.epoch = *greatest;
                hold.claim.standing = Standing::Majority;
            }
            if now.saturating_sub(hold.announced) >= ANNOUNCE {
                hold.announced = now;
                actions.announce.push(address);
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

fn next(epoch: u64) -> u64 {
    epoch.saturating_add(1).min(MAX_EPOCH)
}

fn is_fresh(peer: &Peer, now: Duration) -> bool {
    peer.heard
        .is_some_and(|heard| now.saturating_sub(heard) < TIMEOUT)
}

#[cfg(test)]
mod tests;
