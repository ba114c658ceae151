//! What a benchmark tells the programs that make and count its packets.

use crate::{Ipv4, Mac};

/// The one entry of the map `bench_plan`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Plan {
    /// How many flows there are, each in turn; 0 for a new one each time.
    pub flows: u32,
    /// The destination address.
    pub address: Ipv4,
    /// The destination port, in network byte order.
    pub port: [u8; 2],
    /// The Ethernet address to send to.
    pub to: Mac,
    /// The Ethernet address to send from.
    pub from: Mac,
    /// TCP's flags; 0 for UDP.
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
    /// The length that frames must have when they are back.
    pub length: u32,
}

/// The one entry of the per-CPU map `bench_seen`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Seen {
    /// Packets that were made, in all.
    pub made: u64,
    /// Packets that came back with the length that they must have.
    pub right: u64,
    /// Packets that came back with another.
    pub wrong: u64,
}

/// The length of the frames that are made.
pub const FRAME: usize = 64;

const _: () = assert!(size_of::<Plan>() == 28);
