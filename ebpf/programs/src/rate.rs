//! How fast containers may be.

use core::ptr;

use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::TcContext};
use flynn_abi::{DropReason, Endpoint, Limit};

use crate::maps;

#[inline(always)]
pub fn limit_sent(ctx: &TcContext, sender: &Endpoint) -> Result<(), DropReason> {
    limit(ctx, sender, 0, DropReason::SentTooFast)
}

#[inline(always)]
pub fn limit_received(ctx: &TcContext, receiver: &Endpoint) -> Result<(), DropReason> {
    limit(ctx, receiver, 1, DropReason::ReceivedTooFast)
}

#[inline(always)]
fn limit(
    ctx: &TcContext,
    endpoint: &Endpoint,
    direction: usize,
    reason: DropReason,
) -> Result<(), DropReason> {
    if endpoint.flags & Endpoint::LIMITED == 0 {
        return Ok(());
    }
    let Some(limits) = maps::limits(endpoint.slot) else {
        return Ok(());
    };
    // SAFETY: an entry of an array map, which is there for ever; `Limits` is two of these.
    let limit = unsafe { limits.cast::<Limit>().add(direction) };
    // SAFETY: as above. Nobody but programs writes what is read here twice.
    let (cost, burst) = unsafe { ((*limit).cost, (*limit).burst) };
    if cost == 0 {
        return Ok(());
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() } as i64;
    // SAFETY: as above. Two CPUs at once may take one another's packets for free: less than a burst.
    let due = unsafe { ptr::read_volatile(&raw const (*limit).due) };
    let earliest = now - burst as i64;
    let due = if due == 0 { earliest } else { due.max(earliest) };
    if due > now {
        return Err(reason);
    }
    let due = due + (u64::from(ctx.len()) * cost >> Limit::SHIFT) as i64;
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*limit).due, due) };
    Ok(())
}
