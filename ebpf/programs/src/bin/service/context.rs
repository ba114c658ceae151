//! The address that a program has given to the kernel, or is about to be given.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use flynn_abi::{DropReason, Ipv6};

/// One of the two kinds of hooks: where its address is, in network byte order.
pub(crate) trait Family {
    /// The address; IPv4 mapped.
    fn get(ctx: &SockAddrContext) -> Address;
    /// Puts another in its place.
    fn set(ctx: &SockAddrContext, address: Address) -> Result<(), DropReason>;
}

/// The four words of an address as the kernel has them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) [u32; 4]);

/// What comes before an IPv4 address in its mapped form.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Address {
    /// The IPv4 address, if it is one.
    #[inline(always)]
    pub(crate) fn v4(self) -> Option<u32> {
        let [a, b, c, d] = self.0;
        (a == 0 && b == 0 && c == MAPPED).then_some(d)
    }

    #[inline(always)]
    pub(crate) fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.0;
        a | b | c | d == 0
    }
}

impl From<Ipv6> for Address {
    #[inline(always)]
    fn from(address: Ipv6) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address.octets();
        Self([
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ])
    }
}

impl From<Address> for Ipv6 {
    #[inline(always)]
    fn from(address: Address) -> Self {
        let [a, b, c, d] = address.0.map(u32::to_ne_bytes);
        Self::new([
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3],
        ])
    }
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
