//! The other hosts of the cluster.

use crate::Ipv4;

/// A value of the map `hosts4`, whose keys are the hosts' subnets: the address with all bits of the host part zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Host {
    /// Its own address, which tunnelled packets go to.
    pub address: Ipv4,
    /// The address that this host has on the way there, which tunnelled packets come from.
    pub source: Ipv4,
    /// The neighbour that packets to it are handed to: a router, or itself.
    pub next_hop: Ipv4,
    /// The interface by which it is reached; zero while there is no route, or none that is encrypted where one must be.
    pub ifindex: u32,
    /// Bits of this type's constants.
    pub flags: u32,
    /// Zeros.
    pub reserved: u32,
}

impl Host {
    /// IPv4 packets go to it as they are, without a tunnel: it is on the same link.
    pub const DIRECT: u32 = 1;
    /// Tunnelled packets go to it by the device that encrypts, which is then its interface. Never beside
    /// [`Host::DIRECT`].
    pub const ENCRYPTED: u32 = 2;
}

/// A value of the map `peers`, whose keys are the addresses that hosts of the cluster send tunnelled packets from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Peer {
    /// The subnet that its packets come from.
    pub subnet: Ipv4,
    /// Bits of this type's constants.
    pub flags: u32,
}

impl Peer {
    /// Its packets count only if they come by the device that decrypts.
    pub const ENCRYPTED: u32 = 1;
}

const _: () = assert!(size_of::<Host>() == 24);
const _: () = assert!(size_of::<Peer>() == 8);
