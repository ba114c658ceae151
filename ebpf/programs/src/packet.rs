//! Reading and rewriting the packet at hand.

use core::mem;

use aya_ebpf::programs::TcContext;
use flynn_abi::{Config, DropReason, Endpoint, Ipv4, Ipv6, Mac};

use crate::maps;

/// What a frame carries, by the number in its header.
pub enum Protocol {
    Ipv4,
    Ipv6,
}

#[repr(C)]
pub struct Ethernet {
    destination: Mac,
    pub source: Mac,
    protocol: [u8; 2],
}

/// A frame from its first byte on to the end of the fixed part of its IP header `H`.
#[repr(C)]
pub struct Frame<H> {
    pub ethernet: Ethernet,
    pub ip: H,
}

#[repr(C)]
pub struct Ipv4Header {
    version_and_length: u8,
    _service: u8,
    _total_length: [u8; 2],
    _fragment: [u8; 4],
    _time_to_live: u8,
    _protocol: u8,
    _checksum: [u8; 2],
    source: Ipv4,
    destination: Ipv4,
}

#[repr(C)]
pub struct Ipv6Header {
    version_and_class: u8,
    _flow: [u8; 3],
    _payload_length: [u8; 2],
    _next_header: u8,
    _hop_limit: u8,
    source: Ipv6,
    destination: Ipv6,
}

/// One of the two IP versions: where its addresses are in a packet, and who is behind them.
pub trait Header {
    type Address: Copy;

    fn is_sound(&self) -> bool;
    fn source(&self) -> Self::Address;
    fn destination(&self) -> Self::Address;
    fn endpoint(address: Self::Address) -> Option<&'static Endpoint>;
    fn is_in_cluster(address: Self::Address, config: &Config) -> bool;
}

impl Header for Ipv4Header {
    type Address = Ipv4;

    #[inline(always)]
    fn is_sound(&self) -> bool {
        self.version_and_length >> 4 == 4 && self.version_and_length & 0xf >= 5
    }

    #[inline(always)]
    fn source(&self) -> Ipv4 {
        self.source
    }

    #[inline(always)]
    fn destination(&self) -> Ipv4 {
        self.destination
    }

    #[inline(always)]
    fn endpoint(address: Ipv4) -> Option<&'static Endpoint> {
        maps::endpoint4(address)
    }

    #[inline(always)]
    fn is_in_cluster(address: Ipv4, config: &Config) -> bool {
        let mask = u32::from_ne_bytes(config.mask4.octets());
        mask != 0
            && u32::from_ne_bytes(address.octets()) & mask == u32::from_ne_bytes(config.network4.octets())
    }
}

impl Header for Ipv6Header {
    type Address = Ipv6;

    #[inline(always)]
    fn is_sound(&self) -> bool {
        self.version_and_class >> 4 == 6
    }

    #[inline(always)]
    fn source(&self) -> Ipv6 {
        self.source
    }

    #[inline(always)]
    fn destination(&self) -> Ipv6 {
        self.destination
    }

    #[inline(always)]
    fn endpoint(address: Ipv6) -> Option<&'static Endpoint> {
        maps::endpoint6(address)
    }

    #[inline(always)]
    fn is_in_cluster(address: Ipv6, config: &Config) -> bool {
        let address = halves(address);
        let network = halves(config.network6);
        let mask = halves(config.mask6);
        mask[0] | mask[1] != 0 && address[0] & mask[0] == network[0] && address[1] & mask[1] == network[1]
    }
}

#[inline(always)]
fn halves(address: Ipv6) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address.octets();
    [
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
    ]
}

/// What the frame carries, if it is something that the overlay takes at all.
#[inline(always)]
pub fn protocol(ctx: &TcContext) -> Result<Protocol, DropReason> {
    // SAFETY: the kernel hands programs a valid context.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return Err(DropReason::VlanTagged);
    }
    let ethernet = read::<Ethernet>(ctx)?;
    if ethernet.destination.octets()[0] & 1 != 0 {
        return Err(DropReason::Multicast);
    }
    match u16::from_be_bytes(ethernet.protocol) {
        0x0800 => Ok(Protocol::Ipv4),
        0x86dd => Ok(Protocol::Ipv6),
        _ => Err(DropReason::NotIp),
    }
}

/// The frame's headers, sound by themselves.
#[inline(always)]
pub fn frame<H: Header>(ctx: &TcContext) -> Result<&Frame<H>, DropReason> {
    let frame = read::<Frame<H>>(ctx)?;
    if frame.ip.is_sound() {
        Ok(frame)
    } else {
        Err(DropReason::Malformed)
    }
}

/// The packet's first bytes as a `T`, which must be made of bytes. The verifier lets nobody use it once the packet has
/// been changed.
#[inline(always)]
fn read<T>(ctx: &TcContext) -> Result<&T, DropReason> {
    const { assert!(align_of::<T>() == 1, "packets are not aligned") };
    if let Some(header) = linear(ctx) {
        return Ok(header);
    }
    // The headers may be in the packet's pages.
    if ctx.len() < size_of::<T>() as u32 || ctx.pull_data(size_of::<T>() as u32).is_err() {
        return Err(DropReason::Truncated);
    }
    linear(ctx).ok_or(DropReason::Truncated)
}

#[inline(always)]
fn linear<T>(ctx: &TcContext) -> Option<&T> {
    let start = ctx.data();
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the kernel lends the bytes from `data` to `data_end`, which were just seen to be enough; `T` is made of
    // bytes alone, so that it needs no alignment and any bytes are a value of it.
    Some(unsafe { &*(start as *const T) })
}

/// Gives the frame the addresses that its receiver expects.
#[inline(always)]
pub fn address_to(ctx: &TcContext, destination: Mac, source: Mac) -> Result<(), DropReason> {
    let [a, b, c, d, e, f] = destination.octets();
    let [g, h, i, j, k, l] = source.octets();
    let addresses = [a, b, c, d, e, f, g, h, i, j, k, l];
    ctx.store(mem::offset_of!(Ethernet, destination), &addresses, 0)
        .map_err(|_| DropReason::RewriteFailed)
}
