//! What hosts tell each other.

use std::cmp::Reverse;
use std::net::IpAddr;

use sha2::{Digest as _, Sha256};

/// No epoch is greater: it shares a number with the standing on the wire.
pub(crate) const MAX_EPOCH: u64 = u64::MAX >> 2;

/// A host, by a digest of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HostKey(pub(crate) u64);

impl HostKey {
    /// Of the host with this id.
    pub(crate) fn of(id: &str) -> Self {
        Self(digest(id.as_bytes()))
    }

    /// Its place in the order of those that may hold an address: the smallest is the first.
    pub(super) fn rank(self, address: AddressKey) -> (u64, Self) {
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
    pub(super) fn of(address: IpAddr) -> Self {
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

/// What a claim rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// It was taken by a host that heard no majority.
    Alone,
    /// The holder had a majority when it took the address, and has lost it since.
    Lost,
    /// The holder has had a majority ever since.
    Majority,
}

/// That a host holds an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) address: AddressKey,
    pub(crate) host: HostKey,
    /// The number of its take.
    pub(crate) epoch: u64,
    pub(crate) standing: Standing,
}

impl Claim {
    /// The greatest is right.
    pub(super) fn order(&self) -> (bool, u64, Standing, Reverse<(u64, HostKey)>) {
        let majority = self.standing == Standing::Majority;
        let rank = Reverse(self.host.rank(self.address));
        (majority, self.epoch, self.standing, rank)
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
