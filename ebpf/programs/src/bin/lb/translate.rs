//! What only the balancer changes in packets.

use aya_ebpf::programs::TcContext;
use flynn_abi::{DropReason, lb::Port};
use flynn_programs::translate::{Checksum, two_bytes};

use crate::{context::Context, family::Family, headers::Tcp};

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
