//! The address that a program has given to the kernel, or is about to be given.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use flynn_abi::DropReason;
use flynn_programs::services::{Address, MAPPED};

/// One of the two kinds of hooks: where its address is, in network byte order.
pub(crate) trait Family {
    /// The address; IPv4 mapped.
    fn get(ctx: &SockAddrContext) -> Address;
    /// Puts another in its place.
    fn set(ctx: &SockAddrContext, address: Address) -> Result<(), DropReason>;
}

pub(crate) enum V4 {}
pub(crate) enum V6 {}

/// The kernel lets a context be read and written by whole fields alone; volatile accesses are not merged or split.
macro_rules! read {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the kernel hands programs a valid context.
        unsafe { read_volatile(addr_of!((*context($ctx)).$($field)+)) }
    };
}

macro_rules! write {
    ($ctx:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as above.
        unsafe { write_volatile(addr_of_mut!((*context($ctx)).$($field)+), $value) }
    };
}

#[inline(always)]
fn context(ctx: &SockAddrContext) -> *mut bpf_sock_addr {
    ctx.sock_addr
}

/// The port, in network byte order.
#[inline(always)]
pub(crate) fn port(ctx: &SockAddrContext) -> [u8; 2] {
    let [a, b, ..] = read!(ctx, user_port).to_ne_bytes();
    [a, b]
}

impl Family for V4 {
    #[inline(always)]
    fn get(ctx: &SockAddrContext) -> Address {
        Address([0, 0, MAPPED, read!(ctx, user_ip4)])
    }

    #[inline(always)]
    fn set(ctx: &SockAddrContext, address: Address) -> Result<(), DropReason> {
        let address = address.v4().ok_or(DropReason::NoInstanceOfFamily)?;
        write!(ctx, address, user_ip4);
        Ok(())
    }
}

impl Family for V6 {
    #[inline(always)]
    fn get(ctx: &SockAddrContext) -> Address {
        Address([
            read!(ctx, user_ip6[0]),
            read!(ctx, user_ip6[1]),
            read!(ctx, user_ip6[2]),
            read!(ctx, user_ip6[3]),
        ])
    }

    #[inline(always)]
    fn set(ctx: &SockAddrContext, address: Address) -> Result<(), DropReason> {
        let [a, b, c, d] = address.0;
        write!(ctx, a, user_ip6[0]);
        write!(ctx, b, user_ip6[1]);
        write!(ctx, c, user_ip6[2]);
        write!(ctx, d, user_ip6[3]);
        Ok(())
    }
}
