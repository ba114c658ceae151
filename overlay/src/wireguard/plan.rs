//! What the device shall know, and what is encrypted. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use super::{Key, Peer};

/// How long plain packets are still taken from a host with which there has been a handshake: it may not have seen yet
/// that there was one.
pub(crate) const GRACE: Duration = Duration::from_secs(5);

/// A peer as the device has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Present {
    pub(crate) key: Key,
    /// The only address that packets go to by it and come from, if there is only one.
    pub(crate) address: Option<Ipv4Addr>,
    /// There was a handshake: the other side knows this one, and packets get through.
    pub(crate) handshake: bool,
    /// It is being called.
    pub(crate) called: bool,
}

/// What to do to the device.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) removed: Vec<Key>,
    /// New ones, which are called until they answer.
    pub(crate) added: Vec<(Ipv4Addr, Peer)>,
    /// Those that have answered.
    pub(crate) answered: Vec<Key>,
}

impl Changes {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The hosts whose keys can be used: not those that have the key of another, or this host's own. That is how disks
/// look that were copied.
pub(crate) fn usable(own: Key, hosts: &[(Ipv4Addr, Option<Peer>)]) -> BTreeMap<Ipv4Addr, Peer> {
    let mut times: BTreeMap<Key, u32> = BTreeMap::from([(own, 1)]);
    for peer in hosts.iter().filter_map(|(_, peer)| *peer) {
        *times.entry(peer.key).or_default() += 1;
    }
    hosts
        .iter()
        .filter_map(|&(address, peer)| Some((address, peer?)))
        .filter(|(_, peer)| times[&peer.key] == 1)
        .collect()
}

/// From the peers that the device has to those that it shall have.
pub(crate) fn changes(present: &[Present], wanted: &BTreeMap<Ipv4Addr, Peer>) -> Changes {
    let right = |peer: &&Present| {
        let wanted = peer.address.and_then(|address| wanted.get(&address));
        wanted.is_some_and(|wanted| wanted.key == peer.key)
    };
    let kept: BTreeSet<Key> = present.iter().filter(right).map(|peer| peer.key).collect();
    let added = wanted.iter().filter(|(_, peer)| !kept.contains(&peer.key));
    Changes {
        removed: present
            .iter()
            .map(|peer| peer.key)
            .filter(|key| !kept.contains(key))
            .collect(),
        added: added.map(|(address, peer)| (*address, *peer)).collect(),
        answered: present
            .iter()
            .filter(|peer| kept.contains(&peer.key) && peer.handshake && peer.called)
            .map(|peer| peer.key)
            .collect(),
    }
}

/// How a host's packets are to be treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Protection {
    /// What is sent to it is encrypted, or not sent.
    pub(crate) sent: bool,
    /// What comes from it is only taken encrypted.
    pub(crate) received: bool,
}

impl Protection {
    const FULL: Self = Self {
        sent: true,
        received: true,
    };

    /// For a host with or without a usable key; `since` is how long ago this process saw the first handshake with it,
    /// and `before` how it was treated until now. What was encrypted once stays so as long as the host has a key: also
    /// a new one, with which there was no handshake yet.
    pub(crate) fn of(required: bool, has_key: bool, since: Option<Duration>, before: Self) -> Self {
        if required {
            return Self::FULL;
        }
        Self {
            sent: has_key && (since.is_some() || before.sent),
            received: has_key && (before.received || since.is_some_and(|since| since >= GRACE)),
        }
    }

    /// Nothing more will change by itself.
    pub(crate) fn is_settled(self, has_key: bool) -> bool {
        !has_key || self == Self::FULL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

    fn peer(number: u8) -> Peer {
        Peer {
            key: Key([number; 32]),
            port: super::super::PORT,
        }
    }

    fn present(number: u8, address: Ipv4Addr, handshake: bool) -> Present {
        Present {
            key: Key([number; 32]),
            address: Some(address),
            handshake,
            called: true,
        }
    }

    #[test]
    fn keys_of_copied_disks_are_not_used() {
        let own = Key([9; 32]);
        let hosts = [
            (A, Some(peer(1))),
            (B, Some(peer(1))),
            (Ipv4Addr::new(192, 0, 2, 3), Some(peer(9))),
            (Ipv4Addr::new(192, 0, 2, 4), Some(peer(4))),
            (Ipv4Addr::new(192, 0, 2, 5), None),
        ];
        let usable: Vec<_> = usable(own, &hosts).into_values().collect();
        assert_eq!(usable, [peer(4)]);
    }

    #[test]
    fn what_is_right_stays() {
        let wanted = BTreeMap::from([(A, peer(1)), (B, peer(2))]);
        let there = [present(1, A, false), present(2, B, false)];
        assert!(changes(&there, &wanted).is_empty());
        let answered = [present(1, A, true), present(2, B, false)];
        assert_eq!(changes(&answered, &wanted).answered, [peer(1).key]);
    }

    #[test]
    fn a_new_key_or_another_address_is_a_new_peer() {
        let wanted = BTreeMap::from([(A, peer(3)), (B, peer(2))]);
        // A has another key; B's key was at another address; somebody is gone.
        let there = [present(1, A, true), present(2, A, true), present(7, B, true)];
        let changes = changes(&there, &wanted);
        assert_eq!(changes.removed, [peer(1).key, peer(2).key, peer(7).key]);
        assert_eq!(changes.added, [(A, peer(3)), (B, peer(2))]);
        assert!(changes.answered.is_empty());
    }

    #[test]
    fn plain_until_a_handshake_and_never_again_after() {
        let none = Protection::default();
        let of = |has_key, since: Option<u64>, before| {
            Protection::of(false, has_key, since.map(Duration::from_secs), before)
        };
        assert_eq!(of(false, None, none), none);
        assert_eq!(of(true, None, none), none, "nobody may have answered yet");
        let sent = of(true, Some(0), none);
        assert!(sent.sent && !sent.received && !sent.is_settled(true));
        let full = of(true, Some(GRACE.as_secs()), sent);
        assert!(full.is_settled(true));
        // A new daemon, or a new key of the host's.
        assert_eq!(of(true, None, full), full);
        assert_eq!(of(true, Some(0), full), full);
        // The host takes its key back.
        assert_eq!(of(false, None, full), none);
    }

    #[test]
    fn where_it_is_required_nothing_is_plain() {
        for has_key in [false, true] {
            let protection = Protection::of(true, has_key, None, Protection::default());
            assert_eq!(protection, Protection::FULL);
        }
    }
}
