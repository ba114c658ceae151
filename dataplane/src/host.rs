//! The other hosts of the cluster.

use std::net::Ipv4Addr;

/// Another host as the programs know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// The part of the cluster's network that is its: the first address.
    pub subnet: Ipv4Addr,
    /// Its own address.
    pub address: Ipv4Addr,
    /// IPv4 packets go to it as they are, without a tunnel.
    pub direct: bool,
    /// Tunnelled packets go to it encrypted: the way there is by the device that does that. Without a way, what is sent
    /// is dropped for [`DropReason::NotEncrypted`](crate::DropReason::NotEncrypted).
    pub encrypted: bool,
    /// Tunnelled packets that come from it have to be encrypted.
    pub only_encrypted: bool,
    /// The way there, if there is one.
    pub way: Option<Way>,
}

/// The way to another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The interface.
    pub ifindex: u32,
    /// The neighbour that packets are handed to: a router, or the host itself.
    pub next_hop: Ipv4Addr,
    /// The address of this host that they come from.
    pub source: Ipv4Addr,
}

impl Host {
    /// By the entries of both maps.
    pub(crate) fn of(subnet: Ipv4Addr, entry: &flynn_abi::Host, peer: Option<&flynn_abi::Peer>) -> Self {
        Self {
            subnet,
            address: entry.address.into(),
            direct: entry.flags & flynn_abi::Host::DIRECT != 0,
            encrypted: entry.flags & flynn_abi::Host::ENCRYPTED != 0,
            only_encrypted: peer.is_some_and(|peer| peer.flags & flynn_abi::Peer::ENCRYPTED != 0),
            way: (entry.ifindex != 0).then(|| Way {
                ifindex: entry.ifindex,
                next_hop: entry.next_hop.into(),
                source: entry.source.into(),
            }),
        }
    }

    pub(crate) fn entry(&self) -> flynn_abi::Host {
        let way = self.way.unwrap_or(Way {
            ifindex: 0,
            next_hop: Ipv4Addr::UNSPECIFIED,
            source: Ipv4Addr::UNSPECIFIED,
        });
        flynn_abi::Host {
            address: self.address.into(),
            source: way.source.into(),
            next_hop: way.next_hop.into(),
            ifindex: way.ifindex,
            flags: if self.encrypted {
                flynn_abi::Host::ENCRYPTED
            } else if self.direct {
                flynn_abi::Host::DIRECT
            } else {
                0
            },
            reserved: 0,
        }
    }

    pub(crate) fn peer(&self) -> flynn_abi::Peer {
        flynn_abi::Peer {
            subnet: self.subnet.into(),
            flags: if self.only_encrypted {
                flynn_abi::Peer::ENCRYPTED
            } else {
                0
            },
        }
    }
}
