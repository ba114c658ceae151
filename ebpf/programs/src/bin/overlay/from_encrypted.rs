//! A packet that another host sent encrypted. WireGuard has decrypted it, and has made sure that its outer source is the
//! host whose key it was encrypted with: only the tunnel's packets are sent so.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, programs::TcContext};
use flynn_abi::DropReason;

use crate::{
    Decision, from_uplink, maps,
    packet::{self, Frame, Header, Ipv4Header, Protocol},
    tunnel,
};

#[inline(always)]
pub(crate) fn decide(ctx: &TcContext) -> Decision {
    let config = maps::config()?;
    packet::with_ethernet(ctx)?;
    let frame = packet::read::<Frame<Ipv4Header>>(ctx)?;
    let Some(Protocol::Ipv4) = frame.ethernet.carries() else {
        return Err(DropReason::NotTunnelled);
    };
    if !frame.ip.is_plain_udp() || frame.ip.destination() != config.address {
        return Err(DropReason::NotTunnelled);
    }
    let decision = from_uplink::from_host(ctx, config, true)?;
    if decision == TC_ACT_UNSPEC {
        ctx.set_mark(tunnel::DECRYPTED);
    }
    Ok(decision)
}
