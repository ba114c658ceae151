//! Whose packets are dropped: asked once one is, so that those which pass pay nothing for it.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use flynn_abi::{ContainerDrop, DropReason, Endpoint, VXLAN_PORT};

use crate::{
    Decision, maps,
    packet::{self, Ethernet, Frame, Header, Ipv4Header, Ipv6Header, Protocol},
    tunnel::Tunnelled,
};

/// Where in a packet that is dropped stands whom it was for.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Where {
    /// In its IP header.
    Frame,
    /// In the one inside the tunnel, if it is tunnelled.
    Tunnel,
}

/// The decision, after a drop was noted with the containers of this host that it concerns.
#[inline(always)]
pub(crate) fn noted(ctx: &TcContext, at: Where, decision: Decision) -> Decision {
    if let Err(reason) = decision {
        note(ctx.skb.skb, at == Where::Tunnel, reason as u32);
    }
    decision
}

#[inline(never)]
fn note(skb: *mut __sk_buff, tunnelled: bool, reason: u32) {
    sent(skb, reason);
    if let Some(slot) = receiver(&TcContext::new(skb), tunnelled) {
        count(slot, reason, ContainerDrop::FOR_IT);
    }
}

/// Notes a drop with the container that sent the packet, if one of this host did.
#[inline(always)]
pub(crate) fn sent(skb: *mut __sk_buff, reason: u32) {
    // SAFETY: the kernel hands programs a valid context.
    if let Some(slot) = maps::slot_behind(unsafe { (*skb).ifindex }) {
        count(slot, reason, ContainerDrop::SENT);
    }
}

#[inline(always)]
fn count(slot: u32, reason: u32, side: u16) {
    let reason = reason as u16;
    maps::count_container_drop(ContainerDrop { slot, reason, side });
}

/// The slot of the container that the packet was for.
#[inline(always)]
fn receiver(ctx: &TcContext, tunnelled: bool) -> Option<u32> {
    let outer = packet::read::<Ethernet>(ctx).ok()?.carries()?;
    if tunnelled && let Some(inner) = carried(ctx) {
        return match inner {
            Protocol::Ipv4 => slot::<Ipv4Header>(&packet::read::<Tunnelled<Ipv4Header>>(ctx).ok()?.ip),
            Protocol::Ipv6 => slot::<Ipv6Header>(&packet::read::<Tunnelled<Ipv6Header>>(ctx).ok()?.ip),
        };
    }
    match outer {
        Protocol::Ipv4 => slot::<Ipv4Header>(&packet::read::<Frame<Ipv4Header>>(ctx).ok()?.ip),
        Protocol::Ipv6 => slot::<Ipv6Header>(&packet::read::<Frame<Ipv6Header>>(ctx).ok()?.ip),
    }
}

/// What is in the tunnel, if the packet is tunnelled.
#[inline(always)]
fn carried(ctx: &TcContext) -> Option<Protocol> {
    let tunnelled = packet::read::<Tunnelled<()>>(ctx).ok()?;
    let is_tunnelled = matches!(tunnelled.ethernet.carries(), Some(Protocol::Ipv4))
        && tunnelled.outer.is_plain_udp()
        && tunnelled.udp.destination == VXLAN_PORT.to_be_bytes();
    if is_tunnelled {
        tunnelled.inner.carries()
    } else {
        None
    }
}

#[inline(always)]
fn slot<H: Header>(ip: &H) -> Option<u32> {
    let endpoint = H::endpoint(ip.destination())?;
    (endpoint.flags & Endpoint::CONTAINER != 0).then_some(endpoint.slot)
}
