//! The programs that run in the kernel.
//!
//! Each is a classifier on a network device and decides about one packet at a time:
//!
//! | program | where | what it does |
//! | --- | --- | --- |
//! | `from_container` | ingress of the host's end of a container's veth | lets only the container's own addresses pass, and finds the way |
//! | `to_overlay` | egress of `flynn0` | the host's own way to a container |
//! | `from_tunnel` | ingress of `flynn0` | what another host sent through the tunnel |
//!
//! A decision is an `Ok` with the kernel's action or an `Err` with the reason to drop, and [`verdict`] is the one place
//! where the second becomes the first and is counted. Nothing else is counted or logged per packet.
#![no_std]
#![no_main]

mod from_container;
mod from_tunnel;
mod maps;
mod packet;
mod route;
mod to_overlay;

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use flynn_abi::DropReason;

/// What a program decides.
type Decision = Result<i32, DropReason>;

/// Host's end of a container's veth, ingress.
#[classifier]
fn from_container(ctx: TcContext) -> i32 {
    verdict(from_container::decide(&ctx))
}

/// `flynn0`, egress.
#[classifier]
fn to_overlay(ctx: TcContext) -> i32 {
    verdict(to_overlay::decide(&ctx))
}

/// `flynn0`, ingress.
#[classifier]
fn from_tunnel(_ctx: TcContext) -> i32 {
    verdict(from_tunnel::decide())
}

#[inline(always)]
fn verdict(decision: Decision) -> i32 {
    match decision {
        Ok(action) => action,
        Err(reason) => {
            maps::count_drop(reason);
            TC_ACT_SHOT
        }
    }
}

/// Some helpers are only for programs under a licence that is compatible with the kernel's.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
