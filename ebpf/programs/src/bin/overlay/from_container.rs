//! A packet that a container has sent.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, programs::TcContext};
use flynn_abi::{Config, DropReason, Endpoint};

use flynn_programs::services;

use crate::{
    Decision, bypass, maps,
    packet::{self, Header, Ipv4Header, Ipv6Header, Protocol},
    policy::{Packet, Sender},
    rate,
    refuse::refuse,
    route::{self, Way},
    tunnel,
};

#[inline(always)]
pub(crate) fn decide(ctx: &TcContext) -> Decision {
    match packet::protocol(ctx)? {
        Protocol::Ipv4 => forward::<Ipv4Header>(ctx),
        Protocol::Ipv6 => forward::<Ipv6Header>(ctx),
    }
}

#[inline(always)]
fn forward<H: Header>(ctx: &TcContext) -> Decision {
    let config = maps::config()?;
    let frame = packet::frame::<H>(ctx)?;

    // SAFETY: the kernel hands programs a valid context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let endpoint = match H::endpoint(frame.ip.source()) {
        Some(sender) if sender.flags & Endpoint::CONTAINER != 0 && sender.ifindex == ifindex => sender,
        _ => return Err(DropReason::SpoofedAddress),
    };
    if endpoint.mac != frame.ethernet.source {
        return Err(DropReason::SpoofedMac);
    }

    let mut ip = &frame.ip;
    let mut way = route::find::<H>(ip.destination(), config)?;
    if matches!(way, Way::Outside) && services::find(H::ipv6(ip.destination()).into()).is_some() {
        match bypass::send::<H>(ctx.skb.skb) {
            Err(reason @ (DropReason::NoInstance | DropReason::UnknownConnection)) => {
                return refuse::<H>(ctx, reason);
            }
            sent => sent?,
        }
        // From here on as if it had been sent to the instance.
        ip = &packet::frame::<H>(ctx)?.ip;
        way = route::find::<H>(ip.destination(), config)?;
    } else if endpoint.translates != 0 {
        bypass::send_straight::<H>(ctx.skb.skb)?;
        ip = &packet::frame::<H>(ctx)?.ip;
    }

    let sender = Sender::local(endpoint);
    let packet = Packet {
        ctx,
        ip,
        at: packet::IP,
    };
    match &way {
        Way::Container(receiver) => packet.to_container(sender, receiver, config)?,
        Way::Remote(_, Some(receiver)) => packet.to_container(sender, receiver, config)?,
        Way::Remote(_, None) => {}
        Way::Gateway | Way::RemoteGateway(_) => packet.to_host(sender, config)?,
        Way::Outside if is_host::<H>(ip.destination(), config) => packet.to_host(sender, config)?,
        Way::Outside => {}
    }
    let service = ip.service();
    rate::limit_sent(ctx, endpoint)?;
    match way {
        Way::Container(receiver) => {
            rate::limit_received(ctx, receiver)?;
            maps::count_sent(ctx, endpoint);
            route::hand_over::<H>(ctx, receiver)
        }
        Way::Remote(host, _) | Way::RemoteGateway(host) => {
            maps::count_sent(ctx, endpoint);
            if tunnel::fits::<H>(ctx, host, config) {
                tunnel::send::<H>(ctx, host, service, endpoint.identity)
            } else {
                // The stack cuts it or tells the sender that it is too big.
                Ok(TC_ACT_UNSPEC)
            }
        }
        Way::Gateway | Way::Outside => {
            maps::count_sent(ctx, endpoint);
            // Behind this program may be one that knows it for an answer of the load balancer's; then comes the stack.
            Ok(TC_ACT_UNSPEC)
        }
    }
}

/// Whether a destination out of the cluster's network is a host's own. Asked only where it matters.
#[inline(always)]
fn is_host<H: Header>(destination: H::Address, config: &Config) -> bool {
    config.flags & Config::HOST_PORTS != 0 && maps::is_host_address(H::ipv6(destination))
}
