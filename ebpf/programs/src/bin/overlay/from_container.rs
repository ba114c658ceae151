//! A packet that a container has sent.

use aya_ebpf::{bindings::TC_ACT_OK, helpers::bpf_redirect_peer, programs::TcContext};
use flynn_abi::{DropReason, Endpoint};

use crate::{
    Decision, maps,
    packet::{self, Header, Ipv4Header, Ipv6Header, Protocol},
    route::{self, Way},
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
    let destination = frame.ip.destination();

    // SAFETY: the kernel hands programs a valid context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let sender = match H::endpoint(frame.ip.source()) {
        Some(sender) if sender.flags & Endpoint::CONTAINER != 0 && sender.ifindex == ifindex => sender,
        _ => return Err(DropReason::SpoofedAddress),
    };
    if sender.mac != frame.ethernet.source {
        return Err(DropReason::SpoofedMac);
    }

    let way = route::find::<H>(destination, config)?;
    maps::count_sent(ctx, sender);
    match way {
        Way::Host => Ok(TC_ACT_OK),
        Way::Container(receiver) => {
            route::hand_over(ctx, receiver, config)?;
            // SAFETY: a helper that only notes where the packet goes; allowed here because this is an ingress hook.
            Ok(unsafe { bpf_redirect_peer(receiver.ifindex, 0) } as i32)
        }
    }
}
