//! The cluster network. Each program is a classifier on a network device and decides about one packet at a time:
//!
//! | program | where | what it does |
//! | --- | --- | --- |
//! | `from_container` | ingress of the host's end of a container's veth | lets only the container's own addresses pass, and finds the way |
//! | `to_overlay` | egress of `flynn0` | the host's own way to a container |
//! | `from_tunnel` | ingress of `flynn0` | what another host sent through the tunnel |
//! | `from_uplink` | ingress of interfaces to other hosts | takes the tunnel from what other hosts sent |
//! | `from_encrypted` | ingress of the device that decrypts | the same with what they sent encrypted |
#![no_std]
#![no_main]

mod blame;
mod bypass;
mod from_container;
mod from_encrypted;
mod from_tunnel;
mod from_uplink;
mod policy;
mod refuse;
mod route;
mod to_overlay;
mod tunnel;

use aya_ebpf::{macros::classifier, programs::TcContext};
use flynn_programs::{Decision, maps, packet, rate, room, verdict};

use blame::Where;

flynn_programs::object!();

/// Host's end of a container's veth, ingress.
#[classifier]
fn from_container(ctx: TcContext) -> i32 {
    verdict(blame::noted(&ctx, Where::Frame, from_container::decide(&ctx)))
}

/// `flynn0`, egress.
#[classifier]
fn to_overlay(ctx: TcContext) -> i32 {
    verdict(blame::noted(&ctx, Where::Frame, to_overlay::decide(&ctx)))
}

/// `flynn0`, ingress.
#[classifier]
fn from_tunnel(ctx: TcContext) -> i32 {
    verdict(blame::noted(&ctx, Where::Frame, from_tunnel::decide(&ctx)))
}

/// The uplink, ingress.
#[classifier]
fn from_uplink(ctx: TcContext) -> i32 {
    verdict(blame::noted(&ctx, Where::Tunnel, from_uplink::decide(&ctx)))
}

/// The device that decrypts, ingress.
#[classifier]
fn from_encrypted(ctx: TcContext) -> i32 {
    verdict(blame::noted(&ctx, Where::Tunnel, from_encrypted::decide(&ctx)))
}
