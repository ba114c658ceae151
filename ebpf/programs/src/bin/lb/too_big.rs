//! Telling a sender that its packet is too big for the tunnel: by a packet from whom it meant to reach, back out of the
//! interface that it came by.

use aya_ebpf::{
    helpers::{bpf_redirect, bpf_skb_change_tail},
    programs::TcContext,
};
use flynn_abi::{DropReason, lb::Event};
use flynn_programs::Decision;

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;

use crate::{
    context::Context,
    family::Family,
    headers::{Ethernet, ICMP},
    maps,
};

/// Turns the packet into an ICMP error that says how much fits.
#[inline(always)]
pub(crate) fn reply<F: Family>(ctx: &TcContext, room: u32) -> Decision {
    if !F::may_be_told(ctx) {
        return Err(DropReason::TooBig);
    }
    let failed = |_| DropReason::RewriteFailed;
    let ethernet = ctx.at::<Ethernet>(0).ok_or(DropReason::Truncated)?;
    let back = Ethernet {
        to: ethernet.from,
        from: ethernet.to,
        kind: F::KIND,
    };
    // Of the packet, its IP header and the ports.
    let kept = F::TRANSPORT + 8;
    // SAFETY: the helper takes the context that the program was given.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, kept as u32, 0) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    let added = size_of::<F::Header>() + ICMP;
    ctx.adjust_room(added as i32, BPF_ADJ_ROOM_MAC, 0)
        .map_err(failed)?;
    ctx.store(0, &back, 0).map_err(failed)?;
    F::write_too_big(ctx, room)?;
    maps::count(Event::TooBigSent);
    // SAFETY: the kernel hands programs a valid context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: a helper that only notes where the packet goes.
    Ok(unsafe { bpf_redirect(ifindex, 0) } as i32)
}
