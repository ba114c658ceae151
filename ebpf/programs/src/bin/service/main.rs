//! Virtual addresses of services, at the cgroup of all jobs: a socket that is told to go to a service goes to one of its
//! instances, and never learns. Nothing happens per packet.
//!
//! | program | when | what it does |
//! | --- | --- | --- |
//! | `connect4`, `connect6` | `connect` | chooses an instance, notes it with the socket |
//! | `getpeername4`, `getpeername6` | `getpeername` | names the virtual address again |
//! | `sendmsg4`, `sendmsg6` | a datagram of an unconnected socket | chooses an instance, and stays with it as long as it is there |
//! | `recvmsg4`, `recvmsg6` | the address of a received datagram | names the virtual address again |
//!
//! An IPv6 socket may use IPv4 addresses in their mapped form: then `connect6`, `getpeername6` and `recvmsg6` see that
//! form, while its datagrams come by `sendmsg4`. So all addresses are kept in 16 bytes, IPv4 mapped.
#![no_std]
#![no_main]

mod context;
mod datagrams;
mod maps;
mod streams;

use aya_ebpf::{helpers::bpf_set_retval, macros::cgroup_sock_addr, programs::SockAddrContext};
use flynn_abi::DropReason;

use context::{V4, V6};

flynn_programs::object!();

/// What may go on, or why not.
type Decision = Result<(), DropReason>;

const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

/// The kernel's action for a decision. What is refused is counted and fails like an address where nobody listens.
#[inline(always)]
fn verdict(decision: Decision) -> i32 {
    let Err(reason) = decision else { return 1 };
    flynn_programs::maps::count_drop(reason);
    let errno = match reason {
        DropReason::NoInstance => ECONNREFUSED,
        _ => EHOSTUNREACH,
    };
    // SAFETY: only sets what the system call returns; the hooks that come here may.
    unsafe { bpf_set_retval(-errno) };
    0
}

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    verdict(streams::connect::<V4>(&ctx))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    verdict(streams::connect::<V6>(&ctx))
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    streams::restore::<V4>(&ctx);
    1
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    streams::restore::<V6>(&ctx);
    1
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    verdict(datagrams::send::<V4>(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    verdict(datagrams::send::<V6>(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    datagrams::receive::<V4>(&ctx);
    1
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    datagrams::receive::<V6>(&ctx);
    1
}
