//! The maps, all pinned by name, and the only ways in which the programs use them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, PerCpuArray},
    programs::TcContext,
};
use flynn_abi::{
    Config, Counters, DropReason, Endpoint, Ipv4, Ipv6, MAX_DROP_REASONS, MAX_ENDPOINTS, MAX_LOCAL_ENDPOINTS,
};

#[map(name = "config")]
static CONFIG: Array<Config> = Array::pinned(1, 0);

// Not preallocated: a value that user space removes is then freed after a grace period and not reused under a program
// that still reads it.
#[map(name = "endpoints4")]
static ENDPOINTS4: HashMap<Ipv4, Endpoint> = HashMap::pinned(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map(name = "endpoints6")]
static ENDPOINTS6: HashMap<Ipv6, Endpoint> = HashMap::pinned(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map(name = "counters")]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::pinned(MAX_LOCAL_ENDPOINTS, 0);

#[map(name = "drops")]
static DROPS: PerCpuArray<u64> = PerCpuArray::pinned(MAX_DROP_REASONS, 0);

#[inline(always)]
pub fn config() -> Result<&'static Config, DropReason> {
    match CONFIG.get(0) {
        Some(config) if config.flags & Config::READY != 0 => Ok(config),
        _ => Err(DropReason::NotReady),
    }
}

#[inline(always)]
pub fn endpoint4(address: Ipv4) -> Option<&'static Endpoint> {
    // SAFETY: the map is not preallocated, so the entry outlives this program run; user space replaces entries whole.
    unsafe { ENDPOINTS4.get(address) }
}

#[inline(always)]
pub fn endpoint6(address: Ipv6) -> Option<&'static Endpoint> {
    // SAFETY: as above.
    unsafe { ENDPOINTS6.get(address) }
}

#[inline(always)]
pub fn count_sent(ctx: &TcContext, endpoint: &Endpoint) {
    if let Some(counters) = COUNTERS.get_ptr_mut(endpoint.slot) {
        // SAFETY: this CPU's own slot, and programs are not preempted by one another on it.
        let counters = unsafe { &mut *counters };
        counters.sent_packets += packets(ctx);
        counters.sent_bytes += u64::from(ctx.len());
    }
}

#[inline(always)]
pub fn count_received(ctx: &TcContext, endpoint: &Endpoint) {
    if let Some(counters) = COUNTERS.get_ptr_mut(endpoint.slot) {
        // SAFETY: as above.
        let counters = unsafe { &mut *counters };
        counters.received_packets += packets(ctx);
        counters.received_bytes += u64::from(ctx.len());
    }
}

#[inline(always)]
pub fn count_drop(reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: as above.
        unsafe { *count += 1 };
    }
}

/// How many packets will be on the wire: the stack passes big ones on uncut.
#[inline(always)]
fn packets(ctx: &TcContext) -> u64 {
    // SAFETY: the kernel hands programs a valid context.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    if segments == 0 { 1 } else { u64::from(segments) }
}
