//! What the load balancer's programs know. Its maps' names begin with `lb_`.
//!
//! A VIP (an address, a port and a protocol) belongs to a service; a service has a ring, whose slots name backends; a
//! backend is a container's address and port. VIPs, services and backends have numbers, which mean something on this
//! host only: between hosts a packet says itself whom it is for ([`Tunnelled`]).

use crate::{Ipv4, Ipv6, Mac};

/// A port in network byte order.
pub type Port = [u8; 2];

/// How many slots a service's ring has: a prime, for Maglev's permutations.
pub const RING_SLOTS: u32 = 65_537;

/// How many of a ring's slots one value of the map `lb_rings` holds: a ring is made of several.
pub const CHUNK_SLOTS: u32 = 2048;

/// How many values make a ring.
pub const RING_CHUNKS: u32 = RING_SLOTS.div_ceil(CHUNK_SLOTS);

/// How many VIPs of each address family there may be.
pub const MAX_VIPS: u32 = 1 << 12;

/// How many services.
pub const MAX_SERVICES: u32 = 1 << 10;

/// How many backends, all services together. Number 0 is nobody.
pub const MAX_BACKENDS: u32 = 1 << 15;

/// How many flows are remembered where user space does not say otherwise.
pub const FLOWS: u32 = 1 << 16;

/// How many translated flows are remembered where user space does not say otherwise.
pub const TRANSLATIONS: u32 = 1 << 17;

/// New flows a second and CPU from which on they are not remembered any more, where the configuration does not say
/// otherwise: a flood must not push out of the table who is in it.
pub const FLOOD: u32 = 125_000;

/// A key of the map `lb_vips4`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct VipKey4 {
    /// The address.
    pub address: Ipv4,
    /// The port.
    pub port: Port,
    /// The protocol's number in the IP header.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// A key of the map `lb_vips6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct VipKey6 {
    /// The address.
    pub address: Ipv6,
    /// The port.
    pub port: Port,
    /// The protocol's number in the IP header.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// A value of the maps `lb_vips4` and `lb_vips6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Vip {
    /// Its number: its place in `lb_traffic` and its name in flows.
    pub number: u16,
    /// The number of its service.
    pub service: u16,
    /// Bits of this type's constants.
    pub flags: u16,
    /// Zero.
    pub reserved: u16,
}

impl Vip {
    /// All flows of a client's address go to one backend.
    pub const AFFINITY: u16 = 1;
    /// Answers go through the host that received the question, not directly out of the backend's.
    pub const FIRST_HOST: u16 = 2;
}

/// A key of the map `lb_flows4`: a client's port on a VIP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Flow4 {
    /// The client's address.
    pub client: Ipv4,
    /// Its port, or zeros: the client as a whole, where a VIP has [`Vip::AFFINITY`].
    pub port: Port,
    /// The VIP's number.
    pub vip: u16,
}

/// A key of the map `lb_flows6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Flow6 {
    /// The client's address.
    pub client: Ipv6,
    /// Its port, or zeros, as in [`Flow4`].
    pub port: Port,
    /// The VIP's number.
    pub vip: u16,
}

/// Which backend a flow has: a value of the maps `lb_flows4` and `lb_flows6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pick {
    /// The backend's number.
    pub backend: u16,
    /// Whom the number meant at that time.
    pub generation: u16,
}

/// A part of a ring: a value of the map `lb_rings`, whose keys are [`Chunk::key`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Chunk {
    /// Backends' numbers.
    pub slots: [u16; CHUNK_SLOTS as usize],
}

impl Chunk {
    /// The key of a service's nth chunk.
    #[inline]
    pub const fn key(service: u16, chunk: u32) -> u32 {
        (service as u32) << 8 | chunk
    }
}

/// Who had slots before, as far as they may still have flows of them: a value of the map `lb_formers`, whose keys are
/// those of `lb_rings`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Formers {
    /// Backends' numbers, the latest first; 0 = nobody.
    pub slots: [Former; CHUNK_SLOTS as usize],
}

/// How many of those who had a slot before are known: as many as [`Tunnelled::TRIED`] can count.
pub const FORMERS: u32 = 3;

/// Of one slot.
pub type Former = [u16; FORMERS as usize];

/// A value of the array `lb_backends`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// The container's address; its IPv6 address follows from it.
    pub address: Ipv4,
    /// The port that it listens on.
    pub port: Port,
    /// Whom the number means: each time that it is given out again, one more.
    pub generation: u16,
    /// Bits of this type's constants.
    pub flags: u16,
    /// The number of its service.
    pub service: u16,
    /// Written by the XDP program: in which second (of 2^30 ns, since boot) it looked up what follows. 0 = never.
    pub looked_up: u32,
    /// The host's address, in network byte order; 0 where XDP cannot send there.
    pub host: u32,
    /// This host's address on the way there.
    pub source: u32,
    /// The Ethernet address to send to, in the first six bytes.
    pub to: u64,
    /// The Ethernet address to send from.
    pub from: u64,
}

impl Backend {
    /// There is such a backend.
    pub const USED: u16 = 1;
    /// It takes no new flows.
    pub const DRAINING: u16 = 2;
}

/// The one entry of the map `lb_config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    /// The interface by which answers leave.
    pub uplink: u32,
    /// Its MTU.
    pub mtu: u32,
    /// New flows a second and CPU from which on they are not remembered.
    pub flood: u32,
    /// Its Ethernet address: frames for others, which a switch may flood, are not ours to send on.
    pub mac: Mac,
    /// Zero.
    pub reserved: u16,
}

/// A key of the maps `lb_open` and `lb_established`: a flow as the backend's container sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct TranslationKey {
    /// The client's address; an IPv4 address is in the last four bytes, behind zeros.
    pub client: Ipv6,
    /// The container's address, which for IPv6 stands for the one that follows from it.
    pub container: Ipv4,
    /// The client's port as the container sees it.
    pub client_port: Port,
    /// The container's port.
    pub port: Port,
    /// The protocol's number in the IP header.
    pub protocol: u8,
    /// 4 or 6.
    pub version: u8,
    /// Zero.
    pub reserved: u16,
}

/// What the same flow is outside: a value of the maps `lb_open` and `lb_established`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Translation {
    /// The VIP's address, as the client's in the key.
    pub vip: Ipv6,
    /// The host that answers go through; zeros where they leave directly.
    pub via: Ipv4,
    /// The VIP's port.
    pub port: Port,
    /// The client's port as the client knows it. It differs from the key's where the same port of the client reaches
    /// the same backend through two VIPs.
    pub client_port: Port,
    /// Bits of this type's constants; above [`Translation::SEEN`], for datagrams, the second (of 2^30 ns, since boot) in
    /// which there was one.
    pub flags: u32,
}

impl Translation {
    /// What the client sends comes through a tunnel, and must leave room for it.
    pub const TUNNELLED: u32 = 1;
    /// The client sends no more.
    pub const CLIENT_ENDED: u32 = 2;
    /// The backend sends no more.
    pub const BACKEND_ENDED: u32 = 4;
    /// How many bits are flags.
    pub const SEEN: u32 = 8;
    /// Seconds without a datagram after which the flow counts as over.
    pub const SILENCE: u32 = 60;

    /// Whether nobody needs it any more: another flow may have its place.
    pub const fn is_over(&self, protocol: u8, now: u32) -> bool {
        const ENDED: u32 = Translation::CLIENT_ENDED | Translation::BACKEND_ENDED;
        const UDP: u8 = 17;
        if protocol == UDP {
            let since = now.wrapping_sub(self.flags >> Self::SEEN) << Self::SEEN >> Self::SEEN;
            since > Self::SILENCE
        } else {
            self.flags & ENDED == ENDED
        }
    }
}

/// What went to a VIP: a value of the per-CPU array `lb_traffic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VipTraffic {
    /// Packets for it that were sent on. Segments that the network stack has not cut yet count as one.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Flows that were not in the table.
    pub flows: u64,
    /// Packets for it that were dropped, since it has no backend.
    pub unserved: u64,
}

/// The one entry of the per-CPU map `lb_cpu`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Cpu {
    /// The second (of 2^30 ns, since boot) that `new` is about.
    pub second: u32,
    /// New flows in it.
    pub new: u32,
    /// What has happened, by [`Event`].
    pub events: [u64; MAX_EVENTS],
}

/// How many kinds of events there is room for.
pub const MAX_EVENTS: usize = 16;

macro_rules! events {
    ($($(#[doc = $doc:literal])+ $variant:ident => $name:literal,)+) => {
        /// What the balancer counts besides traffic and drops. Kinds are only ever added at the end.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Event {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Event {
            /// All kinds, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in metrics.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

events! {
    /// A TCP connection begins.
    Syn => "syn",
    /// A flow under way that is not in the table: it came from another host or CPU, or was pushed out.
    Miss => "miss",
    /// A flow's backend is gone, and it got another.
    BackendGone => "backend_gone",
    /// A new flow was not remembered because of too many.
    Flood => "flood",
    /// A port of a client reached one backend through two VIPs and was translated.
    PortTranslated => "port_translated",
    /// An ICMP error was brought to the backend that it is about.
    IcmpRouted => "icmp_routed",
    /// A sender was told that its packet is too big.
    TooBigSent => "too_big_sent",
    /// A packet to a VIP was left to the network stack because it has IP options.
    Options => "options",
    /// A fragment that may have been for a VIP was left to the network stack.
    Fragment => "fragment",
    /// A packet went on without a tunnel.
    Direct => "direct",
    /// A packet went on through a tunnel.
    Encapsulated => "encapsulated",
    /// A packet went to a container of this host.
    Delivered => "delivered",
    /// An answer left.
    Answered => "answered",
    /// A packet of a flow that its backend has never seen went on to who had the flow's slot before.
    Sought => "sought",
}

/// What stands in place of the VXLAN header of a packet for a VIP, or of an answer, between two hosts. VXLAN itself
/// would have the bit 0x08 in the first byte: without it, other receivers drop the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tunnelled {
    /// One of this type's constants.
    pub kind: u8,
    /// Bits of [`Vip`]'s flags, and of this type's constants.
    pub flags: u8,
    /// The backend's port.
    pub port: Port,
    /// The backend's address.
    pub address: Ipv4,
}

impl Tunnelled {
    /// To a backend.
    pub const FORWARD: u8 = 0x81;
    /// From a backend, to leave for the client.
    pub const ANSWER: u8 = 0x82;
    /// In the flags, from this bit on: how many backends have said that the flow is none of theirs.
    pub const TRIED: u32 = 6;
}

const _: () = assert!(size_of::<VipKey4>() == 8 && size_of::<VipKey6>() == 20);
const _: () = assert!(size_of::<Vip>() == 8);
const _: () = assert!(size_of::<Flow4>() == 8 && size_of::<Flow6>() == 20);
const _: () = assert!(size_of::<Pick>() == 4);
const _: () = assert!(size_of::<Chunk>() == 2 * CHUNK_SLOTS as usize && RING_CHUNKS < 1 << 8);
const _: () = assert!(size_of::<Formers>() == (2 * FORMERS * CHUNK_SLOTS) as usize);
const _: () = assert!(size_of::<Backend>() == 40);
const _: () = assert!(size_of::<Config>() == 20);
const _: () = assert!(size_of::<TranslationKey>() == 28);
const _: () = assert!(size_of::<Translation>() == 28);
const _: () = assert!(size_of::<VipTraffic>() == 32);
const _: () = assert!(size_of::<Cpu>() == 8 + 8 * MAX_EVENTS);
const _: () = assert!(size_of::<Tunnelled>() == 8);
const _: () = assert!(Event::ALL.len() <= MAX_EVENTS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_are_over_after_a_silence() {
        const UDP: u8 = 17;
        // The clock's upper bits do not count.
        for second in [100, 0x00ff_fff0, 0x1234_5678] {
            let flow = Translation {
                flags: second << Translation::SEEN | Translation::TUNNELLED,
                ..Translation::default()
            };
            assert!(!flow.is_over(UDP, second));
            assert!(!flow.is_over(UDP, second + Translation::SILENCE));
            assert!(flow.is_over(UDP, second + Translation::SILENCE + 1));
        }
    }
}
