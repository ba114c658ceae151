//! A packet that the host sends to the cluster network: its own, an answer from outside, or one of a container's that
//! it had to cut.

use aya_ebpf::{helpers::bpf_redirect, programs::TcContext};
use flynn_abi::{DropReason, Endpoint};

use crate::{
    Decision, maps,
    packet::{self, Header, Ipv4Header, Ipv6Header, Protocol},
    rate,
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
    match route::find::<H>(frame.ip.destination(), config)? {
        Way::Container(receiver) => {
            rate::limit_received(ctx, receiver)?;
            route::address_to::<H>(ctx, receiver, config)?;
            // Out of the host's end of the veth. The shorter way, into its peer, is closed to egress hooks.
            // SAFETY: a helper that only notes where the packet goes.
            Ok(unsafe { bpf_redirect(receiver.ifindex, 0) } as i32)
        }
        Way::Remote(host, _) | Way::RemoteGateway(host) => {
            let identity = match H::endpoint(frame.ip.source()) {
                Some(sender) if sender.flags & (Endpoint::GATEWAY | Endpoint::CONTAINER) != 0 => {
                    sender.identity
                }
                // The other host would not take it from us.
                _ => return Err(DropReason::ForeignSubnet),
            };
            if !tunnel::fits::<H>(ctx, host, config) {
                return Err(DropReason::TooBig);
            }
            tunnel::send::<H>(ctx, host, frame.ip.service(), identity)
        }
        // Only an operator's own route leads here; behind the device there is no host to send it to.
        Way::Gateway | Way::Outside => Err(DropReason::NoEndpoint),
    }
}
