//! Reading and rewriting the packet at hand.

use core::mem;

use aya_ebpf::{helpers::bpf_skb_change_head, programs::TcContext};
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

impl Ethernet {
    #[inline(always)]
    pub fn new(destination: Mac, source: Mac, protocol: [u8; 2]) -> Self {
        Self {
            destination,
            source,
            protocol,
        }
    }

    /// What follows, if it is IP.
    #[inline(always)]
    pub fn carries(&self) -> Option<Protocol> {
        match self.protocol {
            Ipv4Header::ETHERTYPE => Some(Protocol::Ipv4),
            Ipv6Header::ETHERTYPE => Some(Protocol::Ipv6),
            _ => None,
        }
    }
}

/// Gives a packet that came by a device without Ethernet headers one, with nobody's addresses, unless a program before
/// this one has: programs then find everything where it always is.
#[inline(always)]
pub fn with_ethernet(ctx: &TcContext) -> Result<(), DropReason> {
    // No Ethernet address that we write begins like an IP header.
    let protocol = match ctx.load::<u8>(0).map_err(|_| DropReason::Truncated)? >> 4 {
        4 => Ipv4Header::ETHERTYPE,
        6 => Ipv6Header::ETHERTYPE,
        0 => return Ok(()),
        _ => return Err(DropReason::NotIp),
    };
    // SAFETY: the kernel hands programs a valid context.
    if unsafe { bpf_skb_change_head(ctx.skb.skb, size_of::<Ethernet>() as u32, 0) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    ctx.store(mem::offset_of!(Ethernet, protocol), &protocol, 0)
        .map_err(|_| DropReason::RewriteFailed)
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
    service: u8,
    _total_length: [u8; 2],
    _identification: [u8; 2],
    fragment: [u8; 2],
    _time_to_live: u8,
    protocol: u8,
    _checksum: [u8; 2],
    source: Ipv4,
    destination: Ipv4,
}

#[repr(C)]
pub struct Ipv6Header {
    version_and_class: u8,
    class_and_flow: u8,
    _flow: [u8; 2],
    _payload_length: [u8; 2],
    next_header: u8,
    _hop_limit: u8,
    source: Ipv6,
    destination: Ipv6,
}

#[repr(C)]
pub struct UdpHeader {
    pub source: [u8; 2],
    pub destination: [u8; 2],
    pub length: [u8; 2],
    pub checksum: [u8; 2],
}

/// Where the IP header of a frame is.
pub const IP: usize = mem::offset_of!(Frame<Ipv4Header>, ip);

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Bits of TCP's flags.
pub mod tcp {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
    /// Where they are in the header.
    pub const FLAGS: usize = 13;
}

pub const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const IPV6_FRAGMENT: u8 = 44;

/// What is behind an IP header.
pub enum Transport {
    Tcp {
        at: usize,
    },
    Udp {
        at: usize,
    },
    Icmp {
        at: usize,
    },
    /// Any but the first: it is nothing without that.
    LaterFragment,
    Other,
}

/// One of the two IP versions: where its addresses are in a packet, and who is behind them.
pub trait Header {
    type Address: Copy;

    /// The number in Ethernet headers.
    const ETHERTYPE: [u8; 2];
    const IS_IPV4: bool;
    /// Where the addresses are, in the header.
    const SOURCE: usize;
    const DESTINATION: usize;
    /// Where the length is.
    const LENGTH: usize;

    fn is_sound(&self) -> bool;
    fn source(&self) -> Self::Address;
    fn destination(&self) -> Self::Address;
    /// The byte with the class of service and the congestion bits.
    fn service(&self) -> u8;
    /// Whether TCP follows at once.
    fn is_tcp(&self) -> bool;
    /// Whether ICMP follows at once.
    fn is_icmp(&self) -> bool;
    /// Whether it is a part of a packet, the first one or a later.
    fn is_fragment(&self) -> bool;
    /// Whether an ICMP message of this kind is about another packet.
    fn is_icmp_error(kind: u8) -> bool;
    /// What follows this header, which is at an offset of the packet.
    fn transport(&self, ctx: &TcContext, at: usize) -> Transport;
    /// The entry of who is behind an address.
    fn entry(address: Self::Address) -> Option<*mut Endpoint>;
    /// Who is behind an address.
    #[inline(always)]
    fn endpoint(address: Self::Address) -> Option<&'static Endpoint> {
        // SAFETY: as in `maps::endpoint4`.
        Self::entry(address).map(|endpoint| unsafe { &*endpoint })
    }
    fn is_in_cluster(address: Self::Address, config: &Config) -> bool;
    /// The IPv4 address that goes with an address of the cluster.
    fn ipv4(address: Self::Address) -> Ipv4;
    /// The address as IPv6, an IPv4 address mapped.
    fn ipv6(address: Self::Address) -> Ipv6;
    /// The same backwards.
    fn from_ipv6(address: Ipv6) -> Self::Address;
}

impl Ipv4Header {
    /// Whether a UDP header follows at once, and all of the datagram with it.
    #[inline(always)]
    pub fn is_plain_udp(&self) -> bool {
        self.version_and_length == 0x45 && self.protocol == UDP && !self.is_fragment()
    }

    #[inline(always)]
    fn fragment_offset(&self) -> u16 {
        u16::from_be_bytes(self.fragment) & 0x1fff
    }
}

impl Header for Ipv4Header {
    type Address = Ipv4;

    const ETHERTYPE: [u8; 2] = 0x0800_u16.to_be_bytes();
    const IS_IPV4: bool = true;
    const LENGTH: usize = mem::offset_of!(Self, _total_length);
    const SOURCE: usize = mem::offset_of!(Self, source);
    const DESTINATION: usize = mem::offset_of!(Self, destination);

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
    fn service(&self) -> u8 {
        self.service
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    #[inline(always)]
    fn is_icmp(&self) -> bool {
        self.protocol == ICMP
    }

    #[inline(always)]
    fn is_fragment(&self) -> bool {
        // The bit for more fragments as well.
        u16::from_be_bytes(self.fragment) & 0x3fff != 0
    }

    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        // Unreachable, too long on the way, a bad header.
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn transport(&self, _ctx: &TcContext, at: usize) -> Transport {
        if self.fragment_offset() != 0 {
            return Transport::LaterFragment;
        }
        let at = at + usize::from(self.version_and_length & 0xf) * 4;
        match self.protocol {
            TCP => Transport::Tcp { at },
            UDP => Transport::Udp { at },
            ICMP => Transport::Icmp { at },
            _ => Transport::Other,
        }
    }

    #[inline(always)]
    fn ipv4(address: Ipv4) -> Ipv4 {
        address
    }

    #[inline(always)]
    fn ipv6(address: Ipv4) -> Ipv6 {
        let [a, b, c, d] = address.octets();
        Ipv6::new([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    #[inline(always)]
    fn from_ipv6(address: Ipv6) -> Ipv4 {
        address.last()
    }

    #[inline(always)]
    fn entry(address: Ipv4) -> Option<*mut Endpoint> {
        maps::entry4(address)
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

    const ETHERTYPE: [u8; 2] = 0x86dd_u16.to_be_bytes();
    const IS_IPV4: bool = false;
    const LENGTH: usize = mem::offset_of!(Self, _payload_length);
    const SOURCE: usize = mem::offset_of!(Self, source);
    const DESTINATION: usize = mem::offset_of!(Self, destination);

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
    fn service(&self) -> u8 {
        self.version_and_class << 4 | self.class_and_flow >> 4
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        self.next_header == TCP
    }

    #[inline(always)]
    fn is_icmp(&self) -> bool {
        self.next_header == ICMPV6
    }

    #[inline(always)]
    fn is_fragment(&self) -> bool {
        self.next_header == IPV6_FRAGMENT
    }

    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        // The same, and too big.
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn transport(&self, ctx: &TcContext, at: usize) -> Transport {
        let (mut protocol, mut at) = (self.next_header, at + size_of::<Self>());
        if protocol == IPV6_FRAGMENT {
            let Ok([next, _, high, low, ..]) = ctx.load::<[u8; 8]>(at) else {
                return Transport::Other;
            };
            if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                return Transport::LaterFragment;
            }
            (protocol, at) = (next, at + 8);
        }
        match protocol {
            TCP => Transport::Tcp { at },
            UDP => Transport::Udp { at },
            ICMPV6 => Transport::Icmp { at },
            _ => Transport::Other,
        }
    }

    #[inline(always)]
    fn ipv4(address: Ipv6) -> Ipv4 {
        let [.., a, b, c, d] = address.octets();
        Ipv4::new([a, b, c, d])
    }

    #[inline(always)]
    fn ipv6(address: Ipv6) -> Ipv6 {
        address
    }

    #[inline(always)]
    fn from_ipv6(address: Ipv6) -> Ipv6 {
        address
    }

    #[inline(always)]
    fn entry(address: Ipv6) -> Option<*mut Endpoint> {
        maps::entry6(address)
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
pub fn masked(address: Ipv4, mask: Ipv4) -> u32 {
    u32::from_ne_bytes(address.octets()) & u32::from_ne_bytes(mask.octets())
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
    ethernet.carries().ok_or(DropReason::NotIp)
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
pub fn read<T>(ctx: &TcContext) -> Result<&T, DropReason> {
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

/// Gives the frame a new Ethernet header.
#[inline(always)]
pub fn set_ethernet(ctx: &TcContext, ethernet: &Ethernet) -> Result<(), DropReason> {
    ctx.store(0, ethernet, 0).map_err(|_| DropReason::RewriteFailed)
}

/// The size of the parts that the packet is to be cut into; zero where it is not to be cut.
#[inline(always)]
pub fn segment_size(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel hands programs a valid context.
    unsafe { (*ctx.skb.skb).gso_size }
}
