//! The router's ports. One program at the host's network namespace, which the kernel runs when it looks for the socket
//! of a packet that is for the host and belongs to no connection: a new TCP connection, or a datagram.
//!
//! A port in the map `steer_ports` leads to the router's socket of that protocol; everything else goes where it would
//! have gone. There is nothing to drop: without a router, a port is as open or closed as it is without this program.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, sk_action::SK_PASS},
    macros::{map, sk_lookup},
    maps::{HashMap, PerCpuArray, SockHash},
    programs::SkLookupContext,
};
use flynn_abi::{MAX_STEER_SOCKETS, MAX_STEERED_PORTS, SteerKey, Steered};

flynn_programs::object!();

#[map(name = "steer_ports")]
static PORTS: HashMap<SteerKey, u32> = HashMap::pinned(MAX_STEERED_PORTS, BPF_F_NO_PREALLOC);

/// The router's sockets by protocol. A socket that is closed leaves by itself.
#[map(name = "steer_sockets")]
static SOCKETS: SockHash<u32> = SockHash::pinned(MAX_STEER_SOCKETS, 0);

#[map(name = "steer_counts")]
static COUNTS: PerCpuArray<u64> = PerCpuArray::pinned(Steered::ALL.len() as u32, 0);

/// The host's network namespace.
#[sk_lookup]
fn steer(ctx: SkLookupContext) -> u32 {
    if let Some(outcome) = decide(&ctx) {
        count(outcome);
    }
    SK_PASS
}

/// Nothing for what is not routed.
#[inline(always)]
fn decide(ctx: &SkLookupContext) -> Option<Steered> {
    const NO_SUCH_KEY: i32 = -2;
    // SAFETY: the kernel hands programs a valid context.
    let (protocol, port) = unsafe { ((*ctx.lookup).protocol, (*ctx.lookup).local_port) };
    let key = SteerKey::new(protocol as u8, port as u16);
    // SAFETY: what is behind it is not read.
    unsafe { PORTS.get(key) }?;
    Some(match SOCKETS.redirect_sk_lookup(ctx, protocol, 0) {
        Ok(()) => Steered::Taken,
        Err(NO_SUCH_KEY) => Steered::NoRouter,
        Err(_) => Steered::Unfit,
    })
}

#[inline(always)]
fn count(outcome: Steered) {
    if let Some(count) = COUNTS.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's own slot, and programs are not preempted by one another on it.
        unsafe { *count += 1 };
    }
}
