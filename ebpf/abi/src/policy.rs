//! Who may talk to whom.

/// The number of the app that a container belongs to: 24 bits, which go over the wire as the VXLAN network identifier.
pub type Identity = u32;

/// Of what has no number of its own.
pub const UNKNOWN: Identity = 0;

/// Of hosts themselves, which nobody is closed to.
pub const HOST: Identity = 1;

/// The largest number.
pub const MAX_IDENTITY: Identity = (1 << 24) - 1;

/// Bits of a value of the map `identities`, whose keys are identities. Those without any bit are not in it.
pub mod identity {
    /// Talks only to identities that it is paired with.
    pub const ISOLATED: u32 = 1;
    /// Part of the platform: reaches every port of its other parts, and of hosts.
    pub const SYSTEM: u32 = 2;
}

/// A key of the map `pairs`: whose packets may go to whom, in spite of isolation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Pair {
    /// The sender's identity.
    pub from: Identity,
    /// The receiver's identity.
    pub to: Identity,
}

impl Pair {
    /// The bit in a pair's value that lets the sender open connections, and not only answer.
    pub const INITIATE: u32 = 1;
}

/// A key of the map `open_ports`: a port that everybody reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct OpenPort {
    /// Whose: the place of a container in the map `counters`, or [`OpenPort::HOSTS`].
    pub slot: u32,
    /// The port, in network byte order.
    pub port: [u8; 2],
    /// The protocol's number in IP headers.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

impl OpenPort {
    /// In place of a slot: all hosts of the cluster.
    pub const HOSTS: u32 = u32::MAX;
}

const _: () = assert!(size_of::<Pair>() == 8);
const _: () = assert!(size_of::<OpenPort>() == 8);
