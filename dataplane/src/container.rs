//! The containers of this host.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use flynn_abi::{Counters, DropReason};

/// A container of this host as the programs know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its IPv4 address, by which it is named.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// The Ethernet address of its end of the veth.
    pub mac: [u8; 6],
    /// The interface index of the host's end.
    pub ifindex: u32,
}

/// What went through a container's veth, all CPUs together.
pub type Traffic = Counters;

/// How many packets of a container were dropped, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// Those that it had sent.
    pub sent: BTreeMap<DropReason, u64>,
    /// Those that were for it, as far as they had come to this host.
    pub for_it: BTreeMap<DropReason, u64>,
}
