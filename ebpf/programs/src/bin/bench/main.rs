//! A benchmark's packets. `generate` is run over live frames and writes each of them anew, because the kernel does not:
//! what a program under test has done to a frame is still in it when it comes round again. `sink` counts what comes back,
//! by whether it has the length that it should. `bounce` is the least that a program under test can do.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action,
    macros::{map, xdp},
    maps::{Array, PerCpuArray},
    programs::XdpContext,
};
use flynn_abi::{
    Ipv4, Mac,
    bench::{FRAME, Plan, Seen},
};

flynn_programs::object!();

#[map(name = "bench_plan")]
static PLAN: Array<Plan> = Array::with_max_entries(1, 0);

#[map(name = "bench_seen")]
static SEEN: PerCpuArray<Seen> = PerCpuArray::with_max_entries(1, 0);

#[repr(C)]
struct Frame {
    to: Mac,
    from: Mac,
    kind: [u8; 2],
    version_and_length: u8,
    service: u8,
    total_length: [u8; 2],
    identification: [u8; 4],
    time_to_live: u8,
    protocol: u8,
    checksum: [u8; 2],
    source: Ipv4,
    destination: Ipv4,
    source_port: [u8; 2],
    port: [u8; 2],
    sequence: [u8; 8],
    offset: u8,
    flags: u8,
    rest: [u8; 16],
}

const _: () = assert!(size_of::<Frame>() == FRAME);

/// Makes a frame and sends it.
#[xdp]
fn generate(ctx: XdpContext) -> u32 {
    let (Some(plan), Some(seen)) = (PLAN.get(0), SEEN.get_ptr_mut(0)) else {
        return xdp_action::XDP_ABORTED;
    };
    let at = ctx.data();
    if at + FRAME > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: this CPU's own slot, and programs are not preempted by one another on it.
    let number = unsafe {
        (*seen).made += 1;
        (*seen).made
    };
    let flow = if plan.flows == 0 {
        (number as u32).wrapping_mul(0x9e37_79b1)
    } else {
        (number.wrapping_mul(7919) % u64::from(plan.flows)) as u32
    };
    let [a, b, c, d] = flow.to_be_bytes();
    let frame = Frame {
        to: plan.to,
        from: plan.from,
        kind: [0x08, 0x00],
        version_and_length: 0x45,
        service: 0,
        total_length: ((FRAME - 14) as u16).to_be_bytes(),
        identification: [0, 0, 0x40, 0],
        time_to_live: 64,
        protocol: if plan.flags == 0 { 17 } else { 6 },
        checksum: [0; 2],
        source: Ipv4::new([198, 18 | a & 1, b, c]),
        destination: plan.address,
        source_port: [4 | a >> 1, d],
        port: plan.port,
        sequence: [0; 8],
        offset: 0x50,
        flags: plan.flags,
        rest: [0; 16],
    };
    // SAFETY: the kernel lends the bytes up to `data_end`, which were just seen to be enough, for writing as well.
    unsafe { (at as *mut Frame).write(frame) };
    xdp_action::XDP_TX
}

/// Sends everything back.
#[xdp]
fn bounce(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// Counts everything and drops it.
#[xdp]
fn sink(ctx: XdpContext) -> u32 {
    if let (Some(plan), Some(seen)) = (PLAN.get(0), SEEN.get_ptr_mut(0)) {
        let length = (ctx.data_end() - ctx.data()) as u32;
        // SAFETY: as above.
        let seen = unsafe { &mut *seen };
        if length == plan.length {
            seen.right += 1;
        } else {
            seen.wrong += 1;
        }
    }
    xdp_action::XDP_DROP
}
