//! Changing addresses and ports, with the checksums that cover them. One that is still to be completed (by the interface
//! that the packet leaves by) is changed as such.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_csum_diff, bpf_csum_update, bpf_l4_csum_replace},
    programs::TcContext,
};
use flynn_abi::{DropReason, Ipv4};

use crate::packet::{Header, IP, TCP};

/// Where in an IPv4 header its checksum is.
const HEADER_CHECKSUM: usize = IP + 10;

/// Where a packet's transport checksum is, and how it may be changed.
#[derive(Clone, Copy)]
pub struct Checksum {
    at: usize,
    flags: u64,
}

impl Checksum {
    /// That of TCP or UDP beginning at an offset of the packet.
    #[inline(always)]
    pub fn of(protocol: u8, transport: usize) -> Self {
        if protocol == TCP {
            Self {
                at: transport + 16,
                flags: 0,
            }
        } else {
            // Over IPv4, UDP may do without.
            Self {
                at: transport + 6,
                flags: u64::from(BPF_F_MARK_MANGLED_0),
            }
        }
    }

    #[inline(always)]
    fn replace(self, ctx: &TcContext, old: u64, new: u64, flags: u64) -> Result<(), DropReason> {
        let skb: *mut __sk_buff = ctx.skb.skb;
        // SAFETY: the helper takes the context that the program was given.
        match unsafe { bpf_l4_csum_replace(skb, self.at as u32, old, new, self.flags | flags) } {
            0 => Ok(()),
            _ => Err(DropReason::RewriteFailed),
        }
    }
}

/// Puts an address in the place of another in the IP header.
#[inline(always)]
pub fn address<A: Copy>(
    ctx: &TcContext,
    at: usize,
    mut old: A,
    mut new: A,
    checksum: Checksum,
) -> Result<(), DropReason> {
    let difference = difference(&mut old, &mut new);
    if is_ipv4::<A>() {
        ctx.l3_csum_replace(HEADER_CHECKSUM, 0, difference, 0)
            .map_err(|_| DropReason::RewriteFailed)?;
    }
    checksum.replace(ctx, 0, difference, u64::from(BPF_F_PSEUDO_HDR))?;
    if !is_ipv4::<A>() {
        // Of a packet that the interface has summed up as a whole, the kernel now takes the sum for another by this much,
        // as it would be if there were a header's checksum to make up for it.
        // SAFETY: the helper takes the context that the program was given, and refuses packets without such a sum.
        unsafe { bpf_csum_update(ctx.skb.skb, difference as u32) };
    }
    ctx.store(at, &new, 0).map_err(|_| DropReason::RewriteFailed)
}

/// Puts an address in the place of another in an IP header without a checksum over what follows it, or in one that an ICMP
/// error carries, whose own checksum is at an offset as well.
#[inline(always)]
pub fn carried_address<A: Copy>(
    ctx: &TcContext,
    header: usize,
    at: usize,
    mut old: A,
    mut new: A,
    icmp_checksum: usize,
) -> Result<(), DropReason> {
    let difference = difference(&mut old, &mut new);
    let replaced = if is_ipv4::<A>() {
        // That of the header makes up for the address in any that covers both.
        ctx.l3_csum_replace(header + HEADER_CHECKSUM - IP, 0, difference, 0)
    } else {
        ctx.l4_csum_replace(icmp_checksum, 0, difference, 0)
    };
    replaced
        .and_then(|()| ctx.store(at, &new, 0))
        .map_err(|_| DropReason::RewriteFailed)
}

#[inline(always)]
fn difference<A>(old: &mut A, new: &mut A) -> u64 {
    let size = size_of::<A>() as u32;
    // SAFETY: both are as long as is said, a multiple of four bytes.
    unsafe {
        bpf_csum_diff(
            ptr::from_mut(old).cast(),
            size,
            ptr::from_mut(new).cast(),
            size,
            0,
        ) as u64
    }
}

const fn is_ipv4<A>() -> bool {
    size_of::<A>() == size_of::<Ipv4>()
}

/// Puts two bytes of TCP or UDP, a port or another field, in the place of others.
#[inline(always)]
pub fn two_bytes(
    ctx: &TcContext,
    at: usize,
    old: [u8; 2],
    new: [u8; 2],
    checksum: Checksum,
) -> Result<(), DropReason> {
    if old == new {
        return Ok(());
    }
    let word = |bytes| u64::from(u16::from_ne_bytes(bytes));
    checksum.replace(ctx, word(old), word(new), 2)?;
    ctx.store(at, &new, 0).map_err(|_| DropReason::RewriteFailed)
}

/// Says in an IP header without options how much follows it.
#[inline(always)]
pub fn set_length<H: Header>(ctx: &TcContext, payload: u16) -> Result<(), DropReason> {
    let failed = |_| DropReason::RewriteFailed;
    let at = IP + H::LENGTH;
    let length = if H::IS_IPV4 {
        payload + size_of::<H>() as u16
    } else {
        payload
    };
    if H::IS_IPV4 {
        let old: [u8; 2] = ctx.load(at).map_err(failed)?;
        let new = u64::from(length.to_be());
        ctx.l3_csum_replace(HEADER_CHECKSUM, u64::from(u16::from_ne_bytes(old)), new, 2)
            .map_err(failed)?;
    }
    ctx.store(at, &length.to_be_bytes(), 0).map_err(failed)
}
