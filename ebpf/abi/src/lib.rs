//! What the eBPF programs and user space agree on: the keys and values of the maps, the flags in them, and the
//! reasons for which a packet is dropped.
//!
//! Nothing here acts. Addresses are kept as on the wire, in byte arrays behind types of their own, so that a number in
//! the wrong byte order cannot be written down. All types are `repr(C)` without padding, and their sizes are asserted:
//! a change of one is a change of [`LAYOUT`], which names the directory that maps are pinned in.
#![no_std]

mod address;
pub mod bench;
mod config;
mod container_drop;
mod counters;
mod drop_reason;
mod endpoint;
mod host;
pub mod lb;
mod limit;
pub mod policy;
mod service;
mod steer;
#[cfg(feature = "user")]
mod user;
pub mod v1;

pub use address::{Ipv4, Ipv6, Mac};
pub use config::Config;
pub use container_drop::ContainerDrop;
pub use counters::Counters;
pub use drop_reason::DropReason;
pub use endpoint::Endpoint;
pub use host::{Host, Peer};
pub use limit::{Limit, Limits};
pub use policy::{OpenPort, Pair};
pub use service::{
    Backend, BackendKey, DatagramFlow, DatagramPeer, MAX_BACKENDS, MAX_DATAGRAM_PEERS, MAX_PACKET_PEERS,
    MAX_SERVICES, PacketFlow, PacketPeer, ServiceConfig, ServiceFlow,
};
pub use steer::{MAX_STEER_SOCKETS, MAX_STEERED_PORTS, SteerKey, Steered};

/// The version of all layouts in this crate together. A map that has the same shape as in another version is taken over as
/// it is (so one whose entries come to mean something else needs another name); what one of another shape held is carried
/// over where it matters, for which the older layout stays here in a module of its own. Layout 2 had a `lb_traffic` without
/// [`lb::VipTraffic::unserved`], layout 3 one former owner of a slot less.
pub const LAYOUT: u32 = 4;

/// How many endpoints of each address family the cluster may have.
pub const MAX_ENDPOINTS: u32 = 1 << 17;

/// How many of them may be on this host, and so have counters.
pub const MAX_LOCAL_ENDPOINTS: u32 = 1 << 12;

/// How many pairs of a container of this host and a reason for drops are counted.
pub const MAX_CONTAINER_DROPS: u32 = 1 << 16;

/// How many hosts the cluster may have.
pub const MAX_HOSTS: u32 = 1 << 12;

/// How many addresses of hosts containers may be kept from.
pub const MAX_HOST_ADDRESSES: u32 = 1 << 13;

/// A flag in the map `host_addresses`: the address floats. Whoever has it now, all hosts balance what comes for it.
pub const FLOATING: u32 = 1 << 1;

/// How many identities may have a flag.
pub const MAX_IDENTITIES: u32 = 1 << 16;

/// How many pairs of identities may be linked.
pub const MAX_PAIRS: u32 = 1 << 18;

/// How many ports may be open, all containers of this host together.
pub const MAX_OPEN_PORTS: u32 = 1 << 16;

/// How many reasons for a drop there is room for.
pub const MAX_DROP_REASONS: u32 = 64;

/// The UDP port of VXLAN between hosts.
pub const VXLAN_PORT: u16 = 8472;
