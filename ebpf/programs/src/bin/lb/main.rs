//! The load balancer for TCP and UDP routes. Each packet to a VIP goes to one of its service's backends:
//!
//! | program | where | what it does |
//! | --- | --- | --- |
//! | `lb_xdp` | the uplink, before the network stack | sends packets whose backend is on another host on to it; leaves the others to the next |
//! | `lb_uplink` | the uplink's ingress | the same with all the rest: backends on this host, packets and answers from other hosts, packets too big |
//! | `lb_encrypted` | ingress of the device that decrypts | packets and answers from other hosts |
//! | `lb_answer` | ingress of the host's end of a backend's veth, behind `from_container` | gives answers the VIP's address, and sends them out |
//!
//! The first two are one source ([`select`]): what a packet needs is decided over a [`context::Context`], which both
//! kinds of packets have. Which backend a flow has is decided in this order, as Katran does it: VIP, flow table (not
//! for the first packet of a TCP connection), ring. All hosts have the same rings and so decide the same.
#![no_std]
#![no_main]

mod answer;
mod context;
mod deliver;
mod family;
mod headers;
mod maps;
mod neighbour;
mod seek;
mod select;
mod too_big;
mod translate;
mod translations;
mod tunnel;
mod uplink;
mod xdp;

use aya_ebpf::{
    bindings::xdp_action,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use flynn_programs::verdict;

flynn_programs::object!();

/// The uplink, as early as packets can be seen.
#[xdp]
fn lb_xdp(ctx: XdpContext) -> u32 {
    xdp::decide(&ctx).unwrap_or_else(|reason| {
        flynn_programs::maps::count_drop(reason);
        xdp_action::XDP_DROP
    })
}

/// The uplink, ingress.
#[classifier]
// Each call takes of the 512 bytes of stack that a program has, and this one has none to spare.
#[inline(always)]
fn lb_uplink(ctx: TcContext) -> i32 {
    verdict(uplink::decide(&ctx))
}

/// The device that decrypts, ingress.
#[classifier]
fn lb_encrypted(ctx: TcContext) -> i32 {
    verdict(uplink::decide_encrypted(&ctx))
}

/// Host's end of a backend's veth, ingress.
#[classifier]
fn lb_answer(ctx: TcContext) -> i32 {
    verdict(answer::decide(&ctx))
}
