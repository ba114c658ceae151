//! Into the tunnel and out of it: the outer headers, put on and taken off by hand.
//!
//! The VXLAN device can do the same, at a third of the speed. What is put on here it could take off, and the other way
//! round; it does so for packets which are not plain enough.

use core::mem;

use aya_ebpf::{
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_redir_neigh,
        bpf_redir_neigh__bindgen_ty_1,
    },
    helpers::{bpf_get_hash_recalc, bpf_redirect, bpf_redirect_neigh},
    programs::TcContext,
};
use flynn_abi::{Config, DropReason, Host, Ipv4, Mac, VXLAN_PORT, policy::Identity};

use crate::{
    Decision,
    packet::{self, Ethernet, Header, UdpHeader},
    room,
};

const AF_INET: u32 = 2;
const ETHERNET: u32 = size_of::<Ethernet>() as u32;

/// What the tunnel puts between a frame's Ethernet header and its IP header.
#[repr(C)]
struct Room {
    ip: OuterHeader,
    udp: UdpHeader,
    vxlan: Vxlan,
    ethernet: Ethernet,
}

/// The outer IPv4 header, which never has options.
#[repr(C)]
struct OuterHeader {
    version_and_length: u8,
    service: u8,
    total_length: [u8; 2],
    identification: [u8; 2],
    fragment: [u8; 2],
    time_to_live: u8,
    protocol: u8,
    checksum: [u8; 2],
    source: Ipv4,
    destination: Ipv4,
}

#[repr(C)]
pub(crate) struct Vxlan {
    flags: [u8; 4],
    identity: [u8; 3],
    reserved: u8,
}

/// A tunnelled frame up to the end of the inner IP header `H`.
#[repr(C)]
pub(crate) struct Tunnelled<H> {
    pub(crate) ethernet: Ethernet,
    pub(crate) outer: packet::Ipv4Header,
    pub(crate) udp: UdpHeader,
    pub(crate) vxlan: Vxlan,
    pub(crate) inner: Ethernet,
    pub(crate) ip: H,
}

/// The mark of a packet for this host that was taken out of the tunnel by hand, on its way to the overlay's device.
pub(crate) const TAKEN_OUT: u32 = 0x666c_796e;

/// The mark of a packet that was decrypted here and that the overlay's device is to take out of the tunnel.
pub(crate) const DECRYPTED: u32 = 0x666c_7977;

const ROOM: i32 = size_of::<Room>() as i32;
const _: () = assert!(ROOM == 50);

const DONT_FRAGMENT: [u8; 2] = [0x40, 0];
const TIME_TO_LIVE: u8 = 64;
const ENCAPSULATE: u64 = (BPF_F_ADJ_ROOM_FIXED_GSO
    | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
    | BPF_F_ADJ_ROOM_ENCAP_L4_UDP
    | BPF_F_ADJ_ROOM_ENCAP_L2_ETH) as u64
    | (ETHERNET as u64) << 56;

impl Vxlan {
    const FLAGS: [u8; 4] = [0x08, 0, 0, 0];

    #[inline(always)]
    fn new(identity: Identity) -> Self {
        let [_, a, b, c] = identity.to_be_bytes();
        Self {
            flags: Self::FLAGS,
            identity: [a, b, c],
            reserved: 0,
        }
    }

    /// Whose packet it is, if the header has what ours have.
    #[inline(always)]
    pub(crate) fn identity(&self) -> Result<Identity, DropReason> {
        if self.flags != Self::FLAGS || self.reserved != 0 {
            return Err(DropReason::Malformed);
        }
        let [a, b, c] = self.identity;
        Ok(u32::from_be_bytes([0, a, b, c]))
    }
}

/// Whether the packet as it is fits on the way to the host.
#[inline(always)]
pub(crate) fn fits<H: Header>(ctx: &TcContext, host: &Host, config: &Config) -> bool {
    is_direct::<H>(host) || packet::segment_size(ctx) != 0 || ctx.len() - ETHERNET <= config.tunnel_mtu
}

/// Sends the packet to another host, through the tunnel or without it.
#[inline(always)]
pub(crate) fn send<H: Header>(ctx: &TcContext, host: &Host, service: u8, identity: Identity) -> Decision {
    let encrypted = host.flags & Host::ENCRYPTED != 0;
    if host.ifindex == 0 {
        return Err(if encrypted {
            DropReason::NotEncrypted
        } else {
            DropReason::NoRoute
        });
    }
    if !is_direct::<H>(host) {
        encapsulate::<H>(ctx, host, service, identity)?;
    }
    if encrypted {
        // The device takes IP packets: the helper takes the Ethernet header off for it.
        // SAFETY: a helper that only notes where the packet goes.
        return Ok(unsafe { bpf_redirect(host.ifindex, 0) } as i32);
    }
    let mut next_hop = bpf_redir_neigh {
        nh_family: AF_INET,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [0; 4] },
    };
    next_hop.__bindgen_anon_1.ipv4_nh = u32::from_ne_bytes(host.next_hop.octets());
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: the helper copies what it is pointed to.
    Ok(unsafe { bpf_redirect_neigh(host.ifindex, &raw mut next_hop, size, 0) } as i32)
}

/// IPv6 always goes through the tunnel: the next hop is an IPv4 address.
#[inline(always)]
fn is_direct<H: Header>(host: &Host) -> bool {
    H::IS_IPV4 && host.flags & Host::DIRECT != 0
}

#[inline(always)]
fn encapsulate<H: Header>(
    ctx: &TcContext,
    host: &Host,
    service: u8,
    identity: Identity,
) -> Result<(), DropReason> {
    // SAFETY: the kernel hands programs a valid context.
    let hash = unsafe { bpf_get_hash_recalc(ctx.skb.skb) };
    // A packet that is still to be cut may be longer than any; its parts are told their own lengths.
    let length = (ctx.len() - ETHERNET + ROOM as u32).min(0xffff) as u16;
    ctx.adjust_room(ROOM, BPF_ADJ_ROOM_MAC, ENCAPSULATE)
        .map_err(|_| DropReason::RewriteFailed)?;
    let mut ip = OuterHeader {
        version_and_length: 0x45,
        service,
        total_length: length.to_be_bytes(),
        identification: [0; 2],
        fragment: DONT_FRAGMENT,
        time_to_live: TIME_TO_LIVE,
        protocol: packet::UDP,
        checksum: [0; 2],
        source: host.source,
        destination: host.address,
    };
    ip.checksum = checksum(&ip);
    let room = Room {
        ip,
        udp: UdpHeader {
            // Receivers spread flows over their CPUs by this.
            source: (((hash ^ hash >> 16) as u16) | 0xc000).to_be_bytes(),
            destination: VXLAN_PORT.to_be_bytes(),
            length: (length - size_of::<OuterHeader>() as u16).to_be_bytes(),
            checksum: [0; 2],
        },
        vxlan: Vxlan::new(identity),
        ethernet: Ethernet::new(mac(host.address), mac(host.source), H::ETHERTYPE),
    };
    ctx.store(size_of::<Ethernet>(), &room, 0)
        .map_err(|_| DropReason::RewriteFailed)
}

/// Takes the outer headers off. What is left begins with the outer Ethernet header, which was this host's.
#[inline(always)]
pub(crate) fn decapsulate<H: Header>(ctx: &TcContext) -> Result<(), DropReason> {
    room::decapsulate(ctx, ROOM, H::IS_IPV4)
}

/// An Ethernet address for a host: in the tunnel nobody has one, and nobody's is this.
#[inline(always)]
fn mac(address: Ipv4) -> Mac {
    let [a, b, c, d] = address.octets();
    Mac::new([0x02, 0x67, a, b, c, d])
}

/// The Internet checksum of the header, whose own field is zero.
#[inline(always)]
fn checksum(ip: &OuterHeader) -> [u8; 2] {
    let word = |[a, b]: [u8; 2]| u32::from(u16::from_be_bytes([a, b]));
    let words = |address: Ipv4| {
        let [a, b, c, d] = address.octets();
        word([a, b]) + word([c, d])
    };
    let sum = word([ip.version_and_length, ip.service])
        + word(ip.total_length)
        + word(ip.identification)
        + word(ip.fragment)
        + word([ip.time_to_live, ip.protocol])
        + words(ip.source)
        + words(ip.destination);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_be_bytes()
}

pub(crate) const INNER_IP: usize = mem::offset_of!(Tunnelled<packet::Ipv4Header>, ip);
const _: () = assert!(INNER_IP == 64);
