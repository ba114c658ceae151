//! Changing addresses and ports, with the checksums that cover them.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_csum_diff, bpf_l4_csum_replace},
    programs::TcContext,
};
use flynn_abi::{DropReason, lb::Port};

use crate::{
    context::Context,
    family::Family,
    headers::{ETHERNET, TCP, Tcp, Udp},
};

/// Where a packet's transport checksum is, and how it may be changed.
#[derive(Clone, Copy)]
pub(crate) struct Checksum {
    at: usize,
    flags: u64,
}

impl Checksum {
    #[inline(always)]
    pub(crate) fn of<F: Family>(protocol: u8) -> Self {
        if protocol == TCP {
            Self {
                at: F::TRANSPORT + Tcp::CHECKSUM,
                flags: 0,
            }
        } else {
            // Over IPv4, UDP may do without.
            Self {
                at: F::TRANSPORT + Udp::CHECKSUM,
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
pub(crate) fn address<F: Family>(
    ctx: &TcContext,
    at: usize,
    mut old: F::Address,
    mut new: F::Address,
    checksum: Checksum,
) -> Result<(), DropReason> {
    let size = size_of::<F::Address>() as u32;
    // SAFETY: both are as long as is said, a multiple of four bytes.
    let difference =
        unsafe { bpf_csum_diff((&raw mut old).cast(), size, (&raw mut new).cast(), size, 0) } as u64;
    if F::VERSION == 4 {
        ctx.l3_csum_replace(ETHERNET + 10, 0, difference, 0)
            .map_err(|_| DropReason::RewriteFailed)?;
    }
    checksum.replace(ctx, 0, difference, u64::from(BPF_F_PSEUDO_HDR))?;
    ctx.store(at, &new, 0).map_err(|_| DropReason::RewriteFailed)
}

/// Puts two bytes of TCP or UDP, a port or another field, in the place of others.
#[inline(always)]
pub(crate) fn two_bytes(
    ctx: &TcContext,
    at: usize,
    old: Port,
    new: Port,
    checksum: Checksum,
) -> Result<(), DropReason> {
    if old == new {
        return Ok(());
    }
    let word = |bytes| u64::from(u16::from_ne_bytes(bytes));
    checksum.replace(ctx, word(old), word(new), 2)?;
    ctx.store(at, &new, 0).map_err(|_| DropReason::RewriteFailed)
}

/// Puts a port in the place of another in the packet that an ICMP error is about. It counts in ICMP's checksum; its own
/// is not looked at.
#[inline(always)]
pub(crate) fn error_port<F: Family>(
    ctx: &TcContext,
    at: usize,
    old: Port,
    new: Port,
) -> Result<(), DropReason> {
    let failed = |_| DropReason::RewriteFailed;
    let word = |bytes| u64::from(u16::from_ne_bytes(bytes));
    ctx.l4_csum_replace(F::TRANSPORT + 2, word(old), word(new), 2)
        .map_err(failed)?;
    ctx.store(at, &new, 0).map_err(failed)
}

/// Lets the sender of a SYN be sent segments only that fit into packets of `room` bytes. TCP says that in its first
/// option wherever it says it at all; where it does not, too big packets are answered with what fits.
#[inline(always)]
pub(crate) fn clamp<F: Family>(ctx: &TcContext, room: u32, checksum: Checksum) -> Result<(), DropReason> {
    let at = F::TRANSPORT + Tcp::OPTIONS;
    let Some(&[kind, length, high, low]) = ctx.at::<[u8; 4]>(at) else {
        return Ok(());
    };
    let most = room.saturating_sub((size_of::<F::Header>() + Tcp::OPTIONS) as u32) as u16;
    if kind != 2 || length != 4 || u16::from_be_bytes([high, low]) <= most {
        return Ok(());
    }
    two_bytes(ctx, at + 2, [high, low], most.to_be_bytes(), checksum)
}
