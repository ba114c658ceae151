//! Virtual addresses of services.
//!
//! A service has a number from which its addresses follow: twice the number beyond the first address of the network is
//! the service itself, one more is its leader. So the programs find a service without a search, and addresses that are
//! no services' are told apart by one comparison.

use crate::{Ipv4, Ipv6};

/// Numbers of services are below this; 0 is nobody's.
pub const MAX_SERVICES: u32 = 1 << 15;

/// How many instances all services may have together, each leader counted once more.
pub const MAX_BACKENDS: u32 = 1 << 18;

/// How many peers of unconnected sockets are remembered.
pub const MAX_DATAGRAM_PEERS: u32 = 1 << 16;

/// How many entries there are for flows whose packets are translated one by one; each flow has two.
pub const MAX_PACKET_PEERS: u32 = 1 << 16;

/// The value of the one entry of the map `service_config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceConfig {
    /// The first address of the IPv6 network, which is 64 bits long.
    pub network6: Ipv6,
    /// The first address of the IPv4 network.
    pub network4: Ipv4,
    /// How many addresses the IPv4 network has; 0 until user space has told.
    pub size4: u32,
}

/// A key of the map `service_backends`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct BackendKey {
    /// The service's number.
    pub service: u32,
    /// From 0 to the service's entry in the map `service_counts`, or [`BackendKey::LEADER`].
    pub index: u32,
}

impl BackendKey {
    /// The place of a service's leader.
    pub const LEADER: u32 = u32::MAX;
}

/// A value of the map `service_backends`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// Where the instance is; an IPv4 address in its mapped form.
    pub address: Ipv6,
    /// The same container's IPv6 address, for sockets that cannot speak IPv4; unspecified where it is not known.
    pub address6: Ipv6,
    /// Which registration it is: never the same again.
    pub instance: u64,
}

/// A value of the map `service_flows`, which hangs on connected sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceFlow {
    /// Where the program connected to; IPv4 in its mapped form.
    pub virtual_address: Ipv6,
    /// Where the connection really goes.
    pub backend: Ipv6,
    /// The instance that was chosen.
    pub instance: u64,
    /// The service's number.
    pub service: u32,
    /// [`ServiceFlow::LEADER`], or 0.
    pub flags: u32,
}

impl ServiceFlow {
    /// It was the leader that was asked for.
    pub const LEADER: u32 = 1;
}

/// A key of the map `service_peers`: a peer of an unconnected socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct DatagramPeer {
    /// The socket.
    pub cookie: u64,
    /// The peer's address: virtual in an entry for sending, real in one for receiving. IPv4 in its mapped form.
    pub address: Ipv6,
    /// The peer's port, in network byte order.
    pub port: [u8; 2],
    /// [`DatagramPeer::SEND`] or [`DatagramPeer::RECEIVE`].
    pub way: u16,
    /// Zero.
    pub reserved: u32,
}

impl DatagramPeer {
    /// From virtual to real.
    pub const SEND: u16 = 0;
    /// From real to virtual.
    pub const RECEIVE: u16 = 1;
}

/// A value of the map `service_peers`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DatagramFlow {
    /// The address on the other side: real in an entry for sending, virtual in one for receiving.
    pub address: Ipv6,
    /// The instance that was chosen.
    pub instance: u64,
    /// Where it was found; what is there now says whether it still is there.
    pub place: BackendKey,
}

/// A key of the map `service_packets`: a flow of packets that no socket's program has seen, from the view of the container
/// that sends them. Aligned, so that programs read addresses by words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct PacketPeer {
    /// The container's address; IPv4 in its mapped form.
    pub container: Ipv6,
    /// The peer's address: virtual in an entry for sending, real in one for receiving. IPv4 in its mapped form.
    pub address: Ipv6,
    /// The container's port, in network byte order.
    pub container_port: [u8; 2],
    /// The peer's port, in network byte order.
    pub port: [u8; 2],
    /// The protocol's number in IP headers.
    pub protocol: u8,
    /// [`PacketPeer::SEND`] or [`PacketPeer::RECEIVE`].
    pub way: u8,
    /// Zeros.
    pub reserved: u16,
}

impl PacketPeer {
    /// From virtual to real.
    pub const SEND: u8 = 0;
    /// From real to virtual.
    pub const RECEIVE: u8 = 1;
}

/// A value of the map `service_packets`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PacketFlow {
    /// The address on the other side: real in an entry for sending, virtual in one for receiving.
    pub address: Ipv6,
    /// The instance that was chosen.
    pub instance: u64,
    /// Where it was found; what is there now says whether it still is there.
    pub place: BackendKey,
    /// When the last packet went by, either way, on the coarse monotonic clock. Kept in the entry for receiving alone.
    pub seen: u64,
    /// Not 0 once an end of it has closed or reset it. Kept in the entry for receiving alone.
    pub ended: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<ServiceConfig>() == 24);
const _: () = assert!(size_of::<BackendKey>() == 8);
const _: () = assert!(size_of::<Backend>() == 40);
const _: () = assert!(size_of::<ServiceFlow>() == 48);
const _: () = assert!(size_of::<DatagramPeer>() == 32);
const _: () = assert!(size_of::<DatagramFlow>() == 32);
const _: () = assert!(size_of::<PacketPeer>() == 40);
const _: () = assert!(size_of::<PacketFlow>() == 48);
