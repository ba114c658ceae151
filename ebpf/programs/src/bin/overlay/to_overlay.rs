//! A packet that the host sends to the cluster network: its own, or an answer from outside.

use aya_ebpf::{helpers::bpf_redirect, programs::TcContext};
use flynn_abi::DropReason;

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
    let destination = packet::frame::<H>(ctx)?.ip.destination();
    match route::find::<H>(destination, config)? {
        Way::Container(receiver) => {
            route::hand_over(ctx, receiver, config)?;
            // Out of the host's end of the veth. The shorter way, into its peer, is closed to egress hooks.
            // SAFETY: a helper that only notes where the packet goes.
            Ok(unsafe { bpf_redirect(receiver.ifindex, 0) } as i32)
        }
        // Only an operator's own route leads here; behind the device there is no host to send it to.
        Way::Host => Err(DropReason::NoEndpoint),
    }
}
