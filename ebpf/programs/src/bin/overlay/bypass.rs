//! Services' virtual addresses in packets. Sockets of jobs never send any: they are told of an instance when they connect
//! (object `service`). What comes here has gone past those programs: raw sockets, virtual machines, what a container
//! forwards.
//!
//! A flow has two entries in the map `service_packets`, one for either way. As answers are told by the instance's address
//! and the ports alone, a container's port can reach an instance only once: by one virtual address, or straight.
//!
//! None of this is inlined: other packets are not to pay for it.

use core::ptr;

use aya_ebpf::{
    bindings::__sk_buff, helpers::bpf_ktime_get_coarse_ns, macros::map, maps::LruHashMap, programs::TcContext,
};
use flynn_abi::{DropReason, MAX_PACKET_PEERS, PacketFlow, PacketPeer};
use flynn_programs::{
    packet::{self, Header, IP, TCP, Transport, UDP, tcp},
    services::{self, Address},
    translate::{self, Checksum},
};

/// Each CPU takes from one list: a flow's packets come by any of them.
#[map(name = "service_packets")]
static PACKETS: LruHashMap<PacketPeer, PacketFlow> = LruHashMap::pinned(MAX_PACKET_PEERS, 0);

/// What an ICMP message begins with, before what it is about.
const ICMP: usize = 8;

const SECOND: u64 = 1_000_000_000;

/// When a flow of which nobody has seen the end gives its port up to another one.
const fn idle(protocol: u8) -> u64 {
    if protocol == TCP {
        3600 * SECOND
    } else {
        30 * SECOND
    }
}

/// What is known of a packet beside its peer.
#[derive(Clone, Copy)]
struct Segment {
    /// Where TCP or UDP begins.
    at: usize,
    /// TCP's flags.
    flags: u8,
}

impl Segment {
    #[inline(always)]
    fn opens_connection(self) -> bool {
        self.flags & (tcp::SYN | tcp::ACK) == tcp::SYN
    }

    /// Whether it may be the first of a flow.
    #[inline(always)]
    fn may_begin(self, peer: &PacketPeer) -> bool {
        peer.protocol == UDP || self.opens_connection()
    }

    #[inline(always)]
    fn ends(self) -> bool {
        self.flags & (tcp::FIN | tcp::RST) != 0
    }
}

/// Says in `peer` whom a container sends to, or is sent a packet by. Fragments and other protocols have nothing to say.
#[inline(always)]
fn read<H: Header>(
    skb: *mut __sk_buff,
    is_sent: bool,
    peer: &mut PacketPeer,
) -> Result<Option<Segment>, DropReason> {
    let ctx = &TcContext::new(skb);
    let ip = &packet::frame::<H>(ctx)?.ip;
    let (source, destination) = (H::ipv6(ip.source()), H::ipv6(ip.destination()));
    (peer.container, peer.address) = if is_sent {
        (source, destination)
    } else {
        (destination, source)
    };
    if ip.is_fragment() {
        return Ok(None);
    }
    let at;
    (peer.protocol, at) = match ip.transport(ctx, IP) {
        Transport::Tcp { at } => (TCP, at),
        Transport::Udp { at } => (UDP, at),
        _ => return Ok(None),
    };
    let ports: [[u8; 2]; 2] = ctx.load(at).map_err(|_| DropReason::Truncated)?;
    [peer.container_port, peer.port] = if is_sent { ports } else { [ports[1], ports[0]] };
    let flags = if peer.protocol == TCP {
        ctx.load(at + tcp::FLAGS).map_err(|_| DropReason::Truncated)?
    } else {
        0
    };
    Ok(Some(Segment { at, flags }))
}

/// Makes a container's packet to a virtual address one to an instance.
#[inline(never)]
pub(crate) fn send<H: Header>(skb: *mut __sk_buff) -> Result<(), DropReason> {
    let mut peer = PacketPeer::default();
    let segment = read::<H>(skb, true, &mut peer)?.ok_or(DropReason::NotTranslatable)?;
    if !follow(&mut peer, segment.flags) {
        if !segment.may_begin(&peer) {
            return Err(DropReason::UnknownConnection);
        }
        begin(&mut peer)?;
    }
    // Each packet says so anew: what user space writes may be older than the first.
    if let Some(entry) = H::entry(H::from_ipv6(peer.container)) {
        // SAFETY: the entry outlives this program run; the field is one word, and nobody but programs changes it.
        unsafe { ptr::write_volatile(&raw mut (*entry).translates, 1) };
    }
    rewrite::<H>(skb, H::DESTINATION, &peer, segment.at)
}

/// Whether the packet's flow is known and may go on. Then the peer's address is the instance's, else what it was.
#[inline(never)]
fn follow(peer: &mut PacketPeer, flags: u8) -> bool {
    let segment = Segment { at: 0, flags };
    // SAFETY: read at once. An entry that is evicted and given to another flow meanwhile leads astray one packet, which
    // whoever gets it knows nothing of.
    let Some(flow) = (unsafe { PACKETS.get(&*peer) }) else {
        return false;
    };
    // What has begun is ended by user space, where it knows that the instance is gone; nothing begins there.
    if segment.may_begin(peer) && services::still_there(flow.place, flow.instance).is_none() {
        return false;
    }
    let address = Address::from(peer.address);
    (peer.address, peer.way) = (flow.address, PacketPeer::RECEIVE);
    if let Some(back) = PACKETS.get_ptr_mut(&*peer) {
        // SAFETY: an entry of this map is memory for ever, if not for the same flow; of another's no more is written than
        // that it was seen or has ended.
        let back = unsafe { &mut *back };
        if Address::from(back.address) == address && !(segment.opens_connection() && back.ended != 0) {
            touch(back, segment);
            return true;
        }
    }
    (peer.address, peer.way) = (address.into(), PacketPeer::SEND);
    false
}

/// Chooses an instance for a flow to a virtual address and notes it. Then the peer's address is the instance's.
#[inline(never)]
fn begin(peer: &mut PacketPeer) -> Result<(), DropReason> {
    let address = Address::from(peer.address);
    let wanted = services::find(address).ok_or(DropReason::NoInstance)?;
    let (place, backend) = services::choose(wanted)?;
    let target = services::reachable(address, backend)?;
    // A packet that comes back to its sender is refused there; and whoever registers a virtual address as an instance's is
    // not to have packets leave to it.
    if target == Address::from(peer.container) || services::find(target).is_some() {
        return Err(DropReason::NoInstance);
    }
    let mut flow = PacketFlow {
        address: target.into(),
        instance: backend.instance,
        place,
        seen: now(),
        ended: 0,
        reserved: 0,
    };
    note(peer, &mut flow)
}

/// Notes a flow, both ways, unless answers could be taken for those of another one.
#[inline(never)]
fn note(peer: &mut PacketPeer, flow: &mut PacketFlow) -> Result<(), DropReason> {
    let (address, target) = (Address::from(peer.address), Address::from(flow.address));
    (peer.address, peer.way) = (target.into(), PacketPeer::RECEIVE);
    // SAFETY: read at once; see above.
    if let Some(back) = unsafe { PACKETS.get(&*peer) }
        && back.ended == 0
        && flow.seen.wrapping_sub(back.seen) < idle(peer.protocol)
        && Address::from(back.address) != address
    {
        return Err(DropReason::PortInUse);
    }
    flow.address = address.into();
    let received = PACKETS.insert(&*peer, &*flow, 0);
    flow.address = target.into();
    (peer.address, peer.way) = (address.into(), PacketPeer::SEND);
    let sent = PACKETS.insert(&*peer, &*flow, 0);
    peer.address = target.into();
    // Without room for the answer's way back the packet would go out for nothing.
    received.and(sent).map_err(|_| DropReason::RewriteFailed)
}

/// What a container sends straight to an instance takes the port from a flow of before.
#[inline(never)]
pub(crate) fn send_straight<H: Header>(skb: *mut __sk_buff) -> Result<(), DropReason> {
    let mut peer = PacketPeer::default();
    match read::<H>(skb, true, &mut peer)? {
        Some(segment) if segment.may_begin(&peer) => {}
        _ => return Ok(()),
    }
    peer.way = PacketPeer::RECEIVE;
    // SAFETY: read at once; see above.
    if let Some(back) = unsafe { PACKETS.get(&peer) } {
        let address = back.address;
        // Whichever of the two is not there any more need not be removed.
        let _ = PACKETS.remove(&peer);
        (peer.address, peer.way) = (address, PacketPeer::SEND);
        let _ = PACKETS.remove(&peer);
    }
    Ok(())
}

/// Gives what an instance answers the virtual address. Two functions beside one another: Linux 6.1 has no stack for one
/// below the other.
#[inline(always)]
pub(crate) fn receive<H: Header>(ctx: &TcContext) -> Result<(), DropReason> {
    if packet::frame::<H>(ctx)?.ip.is_icmp() {
        receive_error::<H>(ctx.skb.skb)
    } else {
        receive_segment::<H>(ctx.skb.skb)
    }
}

#[inline(never)]
fn receive_segment<H: Header>(skb: *mut __sk_buff) -> Result<(), DropReason> {
    let mut peer = PacketPeer::default();
    let Some(segment) = read::<H>(skb, false, &mut peer)? else {
        return Ok(());
    };
    peer.way = PacketPeer::RECEIVE;
    let Some(back) = PACKETS.get_ptr_mut(&peer) else {
        return Ok(());
    };
    // SAFETY: as above.
    let back = unsafe { &mut *back };
    touch(back, segment);
    peer.address = back.address;
    rewrite::<H>(skb, H::SOURCE, &peer, segment.at)
}

/// Has an ICMP error about a packet that was translated be about the one that the container has sent.
#[inline(never)]
fn receive_error<H: Header>(skb: *mut __sk_buff) -> Result<(), DropReason> {
    let ctx = &TcContext::new(skb);
    let mut error = PacketPeer::default();
    let icmp = read_header::<H>(skb, IP, &mut error);
    if error.protocol != packet::ICMP || !ctx.load(icmp).is_ok_and(H::is_icmp_error) {
        return Ok(());
    }
    let header = icmp + ICMP;
    let mut peer = PacketPeer::default();
    let at = read_header::<H>(skb, header, &mut peer);
    if peer.protocol != TCP && peer.protocol != UDP || Address::from(error.address) != peer.container.into() {
        return Ok(());
    }
    [peer.container_port, peer.port] = ctx.load(at).map_err(|_| DropReason::Truncated)?;
    peer.way = PacketPeer::RECEIVE;
    // Else it is a router's on the way.
    let is_instance_s = Address::from(error.container) == peer.address.into();
    // SAFETY: read at once; see above.
    let Some(back) = (unsafe { PACKETS.get(&peer) }) else {
        return Ok(());
    };
    peer.address = back.address;
    rewrite_carried::<H>(skb, header, H::DESTINATION, &peer, icmp)?;
    if is_instance_s {
        rewrite_carried::<H>(skb, IP, H::SOURCE, &peer, icmp)?;
    }
    Ok(())
}

/// Says in `peer` who sends to whom by the IP header at an offset, the sender being the container, and where what follows
/// begins. No protocol is said of what is none, or a fragment.
#[inline(never)]
fn read_header<H: Header>(skb: *mut __sk_buff, header: usize, peer: &mut PacketPeer) -> usize {
    let ctx = &TcContext::new(skb);
    let Ok(ip) = ctx.load::<H>(header) else {
        return 0;
    };
    if !ip.is_sound() || ip.is_fragment() {
        return 0;
    }
    peer.container = H::ipv6(ip.source());
    peer.address = H::ipv6(ip.destination());
    let at;
    (peer.protocol, at) = match ip.transport(ctx, header) {
        Transport::Tcp { at } => (TCP, at),
        Transport::Udp { at } => (UDP, at),
        Transport::Icmp { at } => (packet::ICMP, at),
        _ => return 0,
    };
    at
}

/// Puts the peer's address into the IP header at an offset, at an offset of that, in an ICMP message.
#[inline(never)]
fn rewrite_carried<H: Header>(
    skb: *mut __sk_buff,
    header: usize,
    at: usize,
    peer: &PacketPeer,
    icmp: usize,
) -> Result<(), DropReason> {
    let ctx = &TcContext::new(skb);
    let new = H::from_ipv6(peer.address);
    let old: H::Address = ctx.load(header + at).map_err(|_| DropReason::Truncated)?;
    translate::carried_address(ctx, header, header + at, old, new, icmp + 2)
}

/// Puts the peer's address in the place of the packet's, which is at an offset of the IP header.
#[inline(never)]
fn rewrite<H: Header>(
    skb: *mut __sk_buff,
    at: usize,
    peer: &PacketPeer,
    transport: usize,
) -> Result<(), DropReason> {
    let ctx = &TcContext::new(skb);
    let new = H::from_ipv6(peer.address);
    let old: H::Address = ctx.load(IP + at).map_err(|_| DropReason::Truncated)?;
    let checksum = Checksum::of(peer.protocol, transport);
    translate::address(ctx, IP + at, old, new, checksum)
}

/// Notes that a packet of the flow has gone by.
#[inline(always)]
fn touch(back: &mut PacketFlow, segment: Segment) {
    back.seen = now();
    if segment.ends() {
        back.ended = 1;
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}
