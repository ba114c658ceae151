//! A packet that came from outside. What is neither tunnelled to this host nor from an address of the cluster is none
//! of our business and goes on to programs behind this one, and to the host's stack.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_UNSPEC},
    helpers::{bpf_redirect, bpf_skb_ecn_set_ce},
    programs::TcContext,
};
use flynn_abi::{Config, DropReason, Endpoint, Host, Ipv4, Peer, VXLAN_PORT, policy::UNKNOWN};

use crate::{
    Decision, maps,
    packet::{self, Ethernet, Frame, Header, Ipv4Header, Ipv6Header, Protocol},
    policy::{Packet, Sender},
    rate, route,
    tunnel::{self, Tunnelled},
};

/// The congestion bits: of a packet on whose way there was congestion.
const CONGESTION: u8 = 0b11;

#[inline(always)]
pub(crate) fn decide(ctx: &TcContext) -> Decision {
    // Before there is a network, the host's own traffic is not to suffer.
    let Ok(config) = maps::config() else {
        return Ok(TC_ACT_UNSPEC);
    };
    let Ok(ethernet) = packet::read::<Ethernet>(ctx) else {
        return Ok(TC_ACT_UNSPEC);
    };
    match ethernet.carries() {
        Some(Protocol::Ipv4) => from_ipv4(ctx, config),
        Some(Protocol::Ipv6) => from_ipv6(ctx, config),
        None => Ok(TC_ACT_UNSPEC),
    }
}

#[inline(always)]
fn from_ipv4(ctx: &TcContext, config: &Config) -> Decision {
    let Ok(frame) = packet::read::<Frame<Ipv4Header>>(ctx) else {
        return Ok(TC_ACT_UNSPEC);
    };
    if frame.ip.is_plain_udp() && frame.ip.destination() == config.address {
        return from_host(ctx, config, false);
    }
    if Ipv4Header::is_in_cluster(frame.ip.source(), config) {
        return from_direct(ctx, &frame.ip, config);
    }
    Ok(TC_ACT_UNSPEC)
}

/// IPv6 is never sent without the tunnel.
#[inline(always)]
fn from_ipv6(ctx: &TcContext, config: &Config) -> Decision {
    match packet::read::<Frame<Ipv6Header>>(ctx) {
        Ok(frame) if Ipv6Header::is_in_cluster(frame.ip.source(), config) => Err(DropReason::NotTunnelled),
        _ => Ok(TC_ACT_UNSPEC),
    }
}

/// A datagram to this host's address, which came encrypted or not.
#[inline(always)]
pub(crate) fn from_host(ctx: &TcContext, config: &Config, encrypted: bool) -> Decision {
    let Ok(tunnelled) = packet::read::<Tunnelled<()>>(ctx) else {
        return Ok(TC_ACT_UNSPEC);
    };
    if tunnelled.udp.destination != VXLAN_PORT.to_be_bytes() {
        return Ok(TC_ACT_UNSPEC);
    }
    let peer = maps::peer(tunnelled.outer.source()).ok_or(DropReason::UnknownHost)?;
    if !encrypted && peer.flags & Peer::ENCRYPTED != 0 {
        return Err(DropReason::NotEncrypted);
    }
    let sender = Sender::remote(tunnelled.vxlan.identity()?);
    if tunnelled.udp.checksum != [0; 2] {
        // Not of our making, but right if the stack finds it so.
        return Ok(TC_ACT_UNSPEC);
    }
    match tunnelled.inner.carries() {
        Some(Protocol::Ipv4) => receive::<Ipv4Header>(ctx, peer, sender, config),
        Some(Protocol::Ipv6) => receive::<Ipv6Header>(ctx, peer, sender, config),
        None => Err(DropReason::NotIp),
    }
}

#[inline(always)]
fn receive<H: Header>(ctx: &TcContext, peer: &Peer, sender: Sender, config: &Config) -> Decision {
    let tunnelled = packet::read::<Tunnelled<H>>(ctx)?;
    let ip = &tunnelled.ip;
    if !ip.is_sound() {
        return Err(DropReason::Malformed);
    }
    let receiver = H::endpoint(ip.destination()).ok_or(DropReason::NoEndpoint)?;
    if packet::segment_size(ctx) != 0 && !ip.is_tcp() {
        // The kernel would cut it in the wrong places, if it were taken out of the tunnel here.
        return Ok(TC_ACT_UNSPEC);
    }
    let subnet = packet::masked(H::ipv4(ip.source()), config.subnet_mask4);
    if subnet != u32::from_ne_bytes(peer.subnet.octets()) {
        return Err(DropReason::ForeignSubnet);
    }
    let packet = Packet {
        ctx,
        ip,
        at: tunnel::INNER_IP,
    };
    let congested = tunnelled.outer.service() & CONGESTION == CONGESTION;
    if receiver.flags & Endpoint::CONTAINER != 0 {
        packet.to_container(sender, receiver, config)?;
        rate::limit_received(ctx, receiver)?;
        take_out::<H>(ctx, congested)?;
        return route::hand_over::<H>(ctx, receiver);
    }
    if receiver.flags & Endpoint::GATEWAY == 0 {
        return Err(DropReason::NoEndpoint);
    }
    packet.to_host(sender, config)?;
    if receiver.ifindex == 0 {
        return Ok(TC_ACT_UNSPEC);
    }
    take_out::<H>(ctx, congested)?;
    to_device::<H>(ctx, receiver, config)
}

/// Gives a packet for this host to the overlay's device, as if that had taken it out of the tunnel: it is where the
/// host's stack expects packets of the cluster.
#[inline(always)]
fn to_device<H: Header>(ctx: &TcContext, gateway: &Endpoint, config: &Config) -> Decision {
    packet::set_ethernet(ctx, &Ethernet::new(config.gateway, config.gateway, H::ETHERTYPE))?;
    ctx.set_mark(tunnel::TAKEN_OUT);
    // SAFETY: a helper that only notes where the packet goes.
    Ok(unsafe { bpf_redirect(gateway.ifindex, u64::from(BPF_F_INGRESS)) } as i32)
}

/// Takes a packet out of the tunnel, and tells it what the tunnel was told of congestion.
#[inline(always)]
fn take_out<H: Header>(ctx: &TcContext, congested: bool) -> Result<(), DropReason> {
    tunnel::decapsulate::<H>(ctx)?;
    // SAFETY: the kernel hands programs a valid context.
    if congested && unsafe { bpf_skb_ecn_set_ce(ctx.skb.skb) } == 0 {
        return Err(DropReason::Congested);
    }
    Ok(())
}

/// A packet from an address of the cluster, without a tunnel.
#[inline(always)]
fn from_direct(ctx: &TcContext, ip: &Ipv4Header, config: &Config) -> Decision {
    let subnet = packet::masked(ip.source(), config.subnet_mask4);
    match maps::host4(Ipv4::new(subnet.to_ne_bytes())) {
        Some(host) if host.flags & Host::DIRECT != 0 => {}
        _ => return Err(DropReason::NotTunnelled),
    }
    if !ip.is_sound() {
        return Err(DropReason::Malformed);
    }
    let packet = Packet {
        ctx,
        ip,
        at: packet::IP,
    };
    let gateway = packet::masked(ip.source(), config.subnet_mask4) | route::GATEWAY;
    let sender = if u32::from_ne_bytes(ip.source().octets()) == gateway {
        flynn_abi::policy::HOST
    } else {
        maps::endpoint4(ip.source()).map_or(UNKNOWN, |sender| sender.identity)
    };
    let sender = Sender::remote(sender);
    match maps::endpoint4(ip.destination()) {
        Some(receiver) if receiver.flags & Endpoint::CONTAINER != 0 => {
            packet.to_container(sender, receiver, config)?;
            rate::limit_received(ctx, receiver)?;
            route::hand_over::<Ipv4Header>(ctx, receiver)
        }
        Some(receiver) if receiver.flags & Endpoint::GATEWAY != 0 => {
            packet.to_host(sender, config)?;
            if receiver.ifindex == 0 {
                return Ok(TC_ACT_UNSPEC);
            }
            to_device::<Ipv4Header>(ctx, receiver, config)
        }
        _ => Err(DropReason::NoEndpoint),
    }
}
