//! Packets between two hosts: a packet to a VIP on the way to its backend's host, or an answer on the way to the host
//! that the question came by. What they carry is unchanged; whom it is for stands in the tunnel's header.

use aya_ebpf::{
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, TC_ACT_UNSPEC, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::bpf_redirect,
    programs::TcContext,
};
use flynn_abi::{
    DropReason, Host, Ipv4, Peer, VXLAN_PORT,
    lb::{Config, Event, Tunnelled},
};
use flynn_programs::{Decision, room};

use crate::{
    context::Context,
    deliver,
    family::{Family, V4, V6},
    headers::{ETHERNET, Ethernet, Ip4, OVERHEAD, Outer, Ports, TCP, UDP, Udp},
    maps, neighbour, seek, too_big, uplink,
};

const BPF_F_ADJ_ROOM_ENCAP_L2: u64 = (ETHERNET as u64) << 56;
const ENCAPSULATE: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64
    | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64
    | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
    | BPF_F_ADJ_ROOM_ENCAP_L2_ETH as u64
    | BPF_F_ADJ_ROOM_ENCAP_L2;

/// The headers in front of a frame of this length between these hosts. The flow's hash becomes the source port, so that
/// the receiver spreads flows over its queues.
#[inline(always)]
pub(crate) fn outer(source: Ipv4, destination: Ipv4, frame: u32, hash: u32, tunnelled: Tunnelled) -> Outer {
    // A packet that is still to be cut gets its lengths then.
    let udp_length = (frame as usize + size_of::<Udp>() + size_of::<Tunnelled>()) as u16;
    let total_length = udp_length.wrapping_add(size_of::<Ip4>() as u16);
    let source_port = 0xc000 | hash as u16 & 0x3fff;
    Outer {
        ip: Ip4 {
            version_and_length: 0x45,
            service: 0,
            total_length: total_length.to_be_bytes(),
            identification: [0; 2],
            fragment: [0x40, 0],
            time_to_live: 64,
            protocol: UDP,
            checksum: checksum(source, destination, total_length).to_be_bytes(),
            source,
            destination,
        },
        udp: Udp {
            ports: Ports {
                source: source_port.to_be_bytes(),
                destination: VXLAN_PORT.to_be_bytes(),
            },
            length: udp_length.to_be_bytes(),
            checksum: [0; 2],
        },
        tunnelled,
    }
}

/// Of the IP header above.
#[inline(always)]
fn checksum(source: Ipv4, destination: Ipv4, total_length: u16) -> u16 {
    let (source, destination) = (
        u32::from_be_bytes(source.octets()),
        u32::from_be_bytes(destination.octets()),
    );
    let sum = 0x4500 + 0x4000 + (64 << 8 | UDP as u32) + u32::from(total_length);
    let sum = sum + (source >> 16) + (source & 0xffff) + (destination >> 16) + (destination & 0xffff);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Sends the frame to another host, or tells its sender that it is too big for that.
#[inline(always)]
pub(crate) fn send<F: Family>(
    ctx: &TcContext,
    host: &Host,
    hash: u32,
    tunnelled: Tunnelled,
    config: &Config,
) -> Decision {
    let room = room(config, host.flags & Host::ENCRYPTED != 0);
    if largest::<F>(ctx) > room {
        return too_big::reply::<F>(ctx, room);
    }
    is_reached(host)?;
    #[repr(C)]
    struct Headers {
        outer: Outer,
        inner: Ethernet,
    }
    let headers = Headers {
        outer: outer(host.source, host.address, ctx.length(), hash, tunnelled),
        inner: Ethernet {
            to: [0; 6],
            from: [0; 6],
            kind: F::KIND,
        },
    };
    ctx.adjust_room(OVERHEAD as i32, BPF_ADJ_ROOM_MAC, ENCAPSULATE)
        .map_err(|_| DropReason::RewriteFailed)?;
    ctx.store(ETHERNET, &headers, 0)
        .map_err(|_| DropReason::RewriteFailed)?;
    ctx.store(ETHERNET - 2, &Ethernet::IPV4, 0)
        .map_err(|_| DropReason::RewriteFailed)?;
    Ok(leave(host))
}

/// Sends what came by a tunnel on to another host: only its outer headers change. (They cannot be taken off and put on
/// again: where no wire was between, or packets were merged, the kernel has noted that there is a tunnel, and makes no
/// second one.)
#[inline(always)]
fn send_on(ctx: &TcContext, host: &Host, tunnelled: Tunnelled, config: &Config) -> Decision {
    is_reached(host)?;
    // Only where the one tunnel is encrypted and the other is not can it be.
    if segment(ctx) == 0
        && ctx.length() > room(config, host.flags & Host::ENCRYPTED != 0) + (OVERHEAD + ETHERNET) as u32
    {
        return Err(DropReason::TooBig);
    }
    let carried = ctx.length() - OVERHEAD as u32;
    // It is the flow's already.
    let before = ctx.at::<Outer>(ETHERNET).ok_or(DropReason::Truncated)?;
    let hash = u16::from_be_bytes(before.udp.ports.source).into();
    let outer = outer(host.source, host.address, carried, hash, tunnelled);
    ctx.store(ETHERNET, &outer, 0)
        .map_err(|_| DropReason::RewriteFailed)?;
    Ok(leave(host))
}

#[inline(always)]
fn is_reached(host: &Host) -> Result<(), DropReason> {
    match host.ifindex {
        0 if host.flags & Host::ENCRYPTED != 0 => Err(DropReason::NotEncrypted),
        0 => Err(DropReason::NoRoute),
        _ => Ok(()),
    }
}

/// Out to the host, with outer headers: the kernel's action.
#[inline(always)]
fn leave(host: &Host) -> i32 {
    maps::count(Event::Encapsulated);
    if host.flags & Host::ENCRYPTED != 0 {
        // The device takes IP packets: the helper takes the Ethernet header off for it.
        // SAFETY: a helper that only notes where the packet goes.
        return unsafe { bpf_redirect(host.ifindex, 0) } as i32;
    }
    neighbour::send(host.ifindex, host.next_hop)
}

/// The largest packet that fits into the tunnel.
#[inline(always)]
pub(crate) fn room(config: &Config, encrypted: bool) -> u32 {
    let room = config.mtu.saturating_sub(OVERHEAD as u32);
    match flynn_programs::maps::config() {
        Ok(network) if encrypted => room.min(network.tunnel_mtu),
        _ => room,
    }
}

/// The largest IP packet that the frame will be on the wire.
#[inline(always)]
fn largest<F: Family>(ctx: &TcContext) -> u32 {
    let segment = segment(ctx);
    if segment == 0 {
        return ctx.length() - ETHERNET as u32;
    }
    let header = match ctx.at::<F::Header>(ETHERNET) {
        // The length of TCP's header, in words, is in the upper half of this byte.
        Some(header) if F::protocol(header) == TCP => match ctx.at::<u8>(F::TRANSPORT + 12) {
            Some(offset) => u32::from(offset >> 4) * 4,
            None => 60,
        },
        _ => size_of::<Udp>() as u32,
    };
    size_of::<F::Header>() as u32 + header + segment
}

/// How much of what it carries goes into each packet that the frame is still to be cut into: 0 if it is one packet.
#[inline(always)]
fn segment(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel hands programs a valid context.
    unsafe { (*ctx.skb.skb).gso_size }
}

/// Whether it looks like a packet for [`receive`].
#[inline(always)]
pub(crate) fn is_tunnelled(ctx: &TcContext) -> bool {
    match ctx.at::<Outer>(ETHERNET) {
        Some(outer) => {
            outer.udp.ports.destination == VXLAN_PORT.to_be_bytes()
                && outer.ip.version_and_length == 0x45
                && u16::from_be_bytes(outer.ip.fragment) & 0x3fff == 0
                && matches!(outer.tunnelled.kind, Tunnelled::FORWARD | Tunnelled::ANSWER)
        }
        None => false,
    }
}

/// Takes a packet from another host, which came encrypted or not, and sends on what it carries.
#[inline(always)]
pub(crate) fn receive(ctx: &TcContext, config: &Config, encrypted: bool) -> Decision {
    let network = flynn_programs::maps::config()?;
    let Some(outer) = ctx.at::<Outer>(ETHERNET) else {
        return Ok(TC_ACT_UNSPEC);
    };
    if outer.ip.destination != network.address {
        return Ok(TC_ACT_UNSPEC);
    }
    let (peer, tunnelled) = (outer.ip.source, outer.tunnelled);
    let known = flynn_programs::maps::peer(peer).ok_or(DropReason::UnknownHost)?;
    if !encrypted && known.flags & Peer::ENCRYPTED != 0 {
        return Err(DropReason::NotEncrypted);
    }
    let inner = ctx
        .at::<Ethernet>(ETHERNET + size_of::<Outer>())
        .ok_or(DropReason::Truncated)?;
    match inner.kind {
        Ethernet::IPV4 => arrived::<V4>(ctx, peer, tunnelled, config),
        Ethernet::IPV6 => arrived::<V6>(ctx, peer, tunnelled, config),
        _ => Err(DropReason::NotIp),
    }
}

#[inline(always)]
fn arrived<F: Family>(ctx: &TcContext, peer: Ipv4, mut tunnelled: Tunnelled, config: &Config) -> Decision {
    let is_answer = tunnelled.kind == Tunnelled::ANSWER;
    if !is_answer && let Some(next) = seek::elsewhere::<F>(ctx, OVERHEAD, tunnelled)? {
        maps::count(Event::Sought);
        tunnelled = next.tunnelled();
        if !seek::is_here(tunnelled.address) {
            let host = uplink::host_of(tunnelled.address).ok_or(DropReason::NoRoute)?;
            return send_on(ctx, host, tunnelled, config);
        }
    }
    room::decapsulate(ctx, OVERHEAD as i32, F::VERSION == 4)?;
    ctx.store(ETHERNET - 2, &F::KIND, 0)
        .map_err(|_| DropReason::RewriteFailed)?;
    if is_answer {
        maps::count(Event::Answered);
        return Ok(neighbour::route(config.uplink));
    }
    deliver::hand_over::<F>(ctx, peer, tunnelled, config)
}
