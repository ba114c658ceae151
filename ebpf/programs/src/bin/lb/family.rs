//! The two IP versions: where things are in a packet, and which maps are theirs.

use aya_ebpf::{bindings::BPF_F_PSEUDO_HDR, helpers::bpf_csum_diff, programs::TcContext};
use flynn_abi::{
    Config, DropReason, Ipv4, Ipv6,
    lb::{Flow4, Flow6, Pick, Port, Vip, VipKey4, VipKey6},
};

use crate::{
    context::Context,
    headers::{ETHERNET, Ethernet, ICMP, Icmp, Ip4, Ip6},
    maps,
};

pub(crate) trait Family {
    type Address: Copy + PartialEq;
    type Header;
    const VERSION: u8;
    const KIND: [u8; 2];
    /// ICMP of this version.
    const ICMP: u8;
    /// Where the IP header's source address is, and in front of the destination address.
    const SOURCE: usize;
    /// Where the destination address is.
    const DESTINATION: usize;
    /// Where TCP or UDP begins.
    const TRANSPORT: usize = ETHERNET + size_of::<Self::Header>();

    /// Whether what the header is in front of begins where it usually does: IPv4 without options, and no fragment. (IPv6
    /// says both by another protocol.)
    fn is_plain(header: &Self::Header) -> bool;
    fn protocol(header: &Self::Header) -> u8;
    fn source(header: &Self::Header) -> Self::Address;
    fn destination(header: &Self::Header) -> Self::Address;
    fn vip(address: Self::Address, port: Port, protocol: u8) -> Option<&'static Vip>;
    fn flow(client: Self::Address, port: Port, vip: u16) -> Option<Pick>;
    fn remember(client: Self::Address, port: Port, vip: u16, pick: Pick);
    /// The address in one number that tells clients apart well enough to spread them.
    fn fold(address: Self::Address) -> u32;
    /// The address in 16 bytes.
    fn wide(address: Self::Address) -> Ipv6;
    /// The same backwards.
    fn narrow(address: Ipv6) -> Self::Address;
    /// The address of the container with this IPv4 address.
    fn container(address: Ipv4, network: &Config) -> Option<Self::Address>;
    /// Whether an ICMP message of this kind is about another packet.
    fn is_error(kind: u8) -> bool;
    /// Makes an ICMP error to one address, about a packet from it, one for another; or where `at` is not where the
    /// destination address is but the source, one from an address, about a packet to it.
    fn error_address(
        ctx: &TcContext,
        at: usize,
        old: Self::Address,
        new: Self::Address,
    ) -> Result<(), DropReason>;
    /// Where the other of the two addresses is in the packet that an ICMP error is about.
    #[inline(always)]
    fn about(at: usize) -> usize {
        let other = Self::SOURCE + Self::DESTINATION - at;
        Self::TRANSPORT + ICMP + other - ETHERNET
    }
    /// Whether a sender wants to know that its packet is too big.
    fn may_be_told(ctx: &TcContext) -> bool;
    /// Writes an answer in front of the packet that it is about, for which there is room: so much would fit.
    fn write_too_big(ctx: &TcContext, room: u32) -> Result<(), DropReason>;
}

pub(crate) enum V4 {}
pub(crate) enum V6 {}

impl Family for V4 {
    type Address = Ipv4;
    type Header = Ip4;
    const VERSION: u8 = 4;
    const KIND: [u8; 2] = Ethernet::IPV4;
    const ICMP: u8 = 1;
    const SOURCE: usize = ETHERNET + 12;
    const DESTINATION: usize = ETHERNET + 16;

    #[inline(always)]
    fn is_plain(header: &Ip4) -> bool {
        header.version_and_length == 0x45 && u16::from_be_bytes(header.fragment) & 0x3fff == 0
    }

    #[inline(always)]
    fn protocol(header: &Ip4) -> u8 {
        header.protocol
    }

    #[inline(always)]
    fn source(header: &Ip4) -> Ipv4 {
        header.source
    }

    #[inline(always)]
    fn destination(header: &Ip4) -> Ipv4 {
        header.destination
    }

    #[inline(always)]
    fn vip(address: Ipv4, port: Port, protocol: u8) -> Option<&'static Vip> {
        maps::vip4(&VipKey4 {
            address,
            port,
            protocol,
            reserved: 0,
        })
    }

    #[inline(always)]
    fn flow(client: Ipv4, port: Port, vip: u16) -> Option<Pick> {
        maps::flow4(&Flow4 { client, port, vip })
    }

    #[inline(always)]
    fn remember(client: Ipv4, port: Port, vip: u16, pick: Pick) {
        maps::remember4(&Flow4 { client, port, vip }, pick);
    }

    #[inline(always)]
    fn fold(address: Ipv4) -> u32 {
        u32::from_be_bytes(address.octets())
    }

    #[inline(always)]
    fn wide(address: Ipv4) -> Ipv6 {
        Ipv6::mapped(address)
    }

    #[inline(always)]
    fn narrow(address: Ipv6) -> Ipv4 {
        address.last()
    }

    #[inline(always)]
    fn container(address: Ipv4, _network: &Config) -> Option<Ipv4> {
        Some(address)
    }

    #[inline(always)]
    fn error_address(ctx: &TcContext, at: usize, old: Ipv4, new: Ipv4) -> Result<(), DropReason> {
        let failed = |_| DropReason::RewriteFailed;
        let word = |address: Ipv4| u64::from(u32::from_ne_bytes(address.octets()));
        // ICMP's checksum does not cover the first header, and the second has a checksum that makes up for the change.
        for (header, at) in [(ETHERNET, at), (Self::TRANSPORT + ICMP, Self::about(at))] {
            ctx.l3_csum_replace(header + 10, word(old), word(new), 4)
                .map_err(failed)?;
            ctx.store(at, &new, 0).map_err(failed)?;
        }
        Ok(())
    }

    /// It does where routers must not cut the packet for it.
    #[inline(always)]
    fn may_be_told(ctx: &TcContext) -> bool {
        ctx.at::<Ip4>(ETHERNET)
            .is_some_and(|header| header.fragment[0] & 0x40 != 0)
    }

    #[inline(always)]
    fn write_too_big(ctx: &TcContext, room: u32) -> Result<(), DropReason> {
        #[repr(C)]
        struct Message {
            icmp: Icmp,
            about: Ip4,
            ports: [u8; 8],
        }
        const TOTAL: u16 = (size_of::<Ip4>() + size_of::<Message>()) as u16;
        let [.., high, low] = room.to_be_bytes();
        let mut message = Message {
            icmp: Icmp {
                kind: 3,
                code: 4,
                checksum: [0; 2],
                rest: [0, 0, high, low],
            },
            about: ctx
                .load(Self::TRANSPORT + ICMP)
                .map_err(|_| DropReason::Truncated)?,
            ports: ctx
                .load(Self::TRANSPORT + ICMP + size_of::<Ip4>())
                .map_err(|_| DropReason::Truncated)?,
        };
        message.icmp.checksum = checksum(&mut message, 0);
        let mut header = Ip4 {
            version_and_length: 0x45,
            service: 0,
            total_length: TOTAL.to_be_bytes(),
            identification: [0; 2],
            fragment: [0; 2],
            time_to_live: 64,
            protocol: Self::ICMP,
            checksum: [0; 2],
            source: message.about.destination,
            destination: message.about.source,
        };
        header.checksum = checksum(&mut header, 0);
        ctx.store(ETHERNET, &header, 0)
            .map_err(|_| DropReason::RewriteFailed)?;
        ctx.store(Self::TRANSPORT, &message, 0)
            .map_err(|_| DropReason::RewriteFailed)
    }

    /// Destination unreachable (too big among them), time exceeded, parameter problem.
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 3 | 11 | 12)
    }
}

impl Family for V6 {
    type Address = Ipv6;
    type Header = Ip6;
    const VERSION: u8 = 6;
    const KIND: [u8; 2] = Ethernet::IPV6;
    const ICMP: u8 = 58;
    const SOURCE: usize = ETHERNET + 8;
    const DESTINATION: usize = ETHERNET + 24;

    #[inline(always)]
    fn is_plain(_header: &Ip6) -> bool {
        true
    }

    #[inline(always)]
    fn protocol(header: &Ip6) -> u8 {
        header.next_header
    }

    #[inline(always)]
    fn source(header: &Ip6) -> Ipv6 {
        header.source
    }

    #[inline(always)]
    fn destination(header: &Ip6) -> Ipv6 {
        header.destination
    }

    #[inline(always)]
    fn vip(address: Ipv6, port: Port, protocol: u8) -> Option<&'static Vip> {
        maps::vip6(&VipKey6 {
            address,
            port,
            protocol,
            reserved: 0,
        })
    }

    #[inline(always)]
    fn flow(client: Ipv6, port: Port, vip: u16) -> Option<Pick> {
        maps::flow6(&Flow6 { client, port, vip })
    }

    #[inline(always)]
    fn remember(client: Ipv6, port: Port, vip: u16, pick: Pick) {
        maps::remember6(&Flow6 { client, port, vip }, pick);
    }

    #[inline(always)]
    fn fold(address: Ipv6) -> u32 {
        let [a, b, c, d] = address.words();
        let mixed = (a ^ c.rotate_left(7)).wrapping_mul(0x9e37_79b1)
            ^ (b ^ d.rotate_left(13)).wrapping_mul(0x85eb_ca77);
        mixed ^ mixed >> 15
    }

    #[inline(always)]
    fn wide(address: Ipv6) -> Ipv6 {
        address
    }

    #[inline(always)]
    fn narrow(address: Ipv6) -> Ipv6 {
        address
    }

    #[inline(always)]
    fn container(address: Ipv4, network: &Config) -> Option<Ipv6> {
        if network.mask6.octets()[0] == 0 {
            return None;
        }
        let [a, b, c, d] = address.octets();
        let mut octets = network.network6.octets();
        octets[12] |= a;
        octets[13] |= b;
        octets[14] |= c;
        octets[15] |= d;
        Some(Ipv6::new(octets))
    }

    #[inline(always)]
    fn error_address(ctx: &TcContext, at: usize, old: Ipv6, new: Ipv6) -> Result<(), DropReason> {
        let failed = |_| DropReason::RewriteFailed;
        let (mut before, mut after) = (old, new);
        // SAFETY: both are 16 bytes.
        let difference =
            unsafe { bpf_csum_diff((&raw mut before).cast(), 16, (&raw mut after).cast(), 16, 0) } as u64;
        // ICMP's checksum covers both headers, one of them by its addresses only.
        let checksum = Self::TRANSPORT + 2;
        ctx.l4_csum_replace(checksum, 0, difference, u64::from(BPF_F_PSEUDO_HDR))
            .map_err(failed)?;
        ctx.store(at, &new, 0).map_err(failed)?;
        ctx.l4_csum_replace(checksum, 0, difference, 0).map_err(failed)?;
        ctx.store(Self::about(at), &new, 0).map_err(failed)
    }

    #[inline(always)]
    fn may_be_told(_ctx: &TcContext) -> bool {
        true
    }

    #[inline(always)]
    fn write_too_big(ctx: &TcContext, room: u32) -> Result<(), DropReason> {
        #[repr(C)]
        struct Message {
            icmp: Icmp,
            about: Ip6,
            ports: [u8; 8],
        }
        const LENGTH: u16 = size_of::<Message>() as u16;
        #[repr(C)]
        struct Pseudo {
            source: Ipv6,
            destination: Ipv6,
            length: [u8; 4],
            protocol: [u8; 4],
        }
        let mut message = Message {
            icmp: Icmp {
                kind: 2,
                code: 0,
                checksum: [0; 2],
                rest: room.to_be_bytes(),
            },
            about: ctx
                .load(Self::TRANSPORT + ICMP)
                .map_err(|_| DropReason::Truncated)?,
            ports: ctx
                .load(Self::TRANSPORT + ICMP + size_of::<Ip6>())
                .map_err(|_| DropReason::Truncated)?,
        };
        let (source, destination) = (message.about.destination, message.about.source);
        let mut pseudo = Pseudo {
            source,
            destination,
            length: u32::from(LENGTH).to_be_bytes(),
            protocol: [0, 0, 0, Self::ICMP],
        };
        message.icmp.checksum = checksum(&mut message, sum(&mut pseudo, 0));
        let header = Ip6 {
            version_and_class: [0x60, 0, 0, 0],
            payload_length: LENGTH.to_be_bytes(),
            next_header: Self::ICMP,
            hop_limit: 64,
            source,
            destination,
        };
        ctx.store(ETHERNET, &header, 0)
            .map_err(|_| DropReason::RewriteFailed)?;
        ctx.store(Self::TRANSPORT, &message, 0)
            .map_err(|_| DropReason::RewriteFailed)
    }

    /// The errors are those below 128.
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }
}

/// The first port that a flow's hash is made of is the client's, or zeros where the client counts as a whole.
#[inline(always)]
pub(crate) fn hash<F: Family>(client: F::Address, port: Port, vip_port: Port) -> u32 {
    let ports = u32::from(u16::from_be_bytes(port)) << 16 | u32::from(u16::from_be_bytes(vip_port));
    let mixed = (u64::from(F::fold(client)) << 32 | u64::from(ports)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (mixed >> 32) as u32
}

/// The ones' complement sum of something that is as long as a multiple of four bytes, onto another sum.
#[inline(always)]
fn sum<T>(of: &mut T, seed: u32) -> u32 {
    const { assert!(size_of::<T>() % 4 == 0) };
    // SAFETY: it is as long as is said.
    (unsafe {
        bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            (&raw mut *of).cast(),
            size_of::<T>() as u32,
            seed,
        )
    }) as u32
}

#[inline(always)]
fn checksum<T>(of: &mut T, seed: u32) -> [u8; 2] {
    let sum = sum(of, seed);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}
