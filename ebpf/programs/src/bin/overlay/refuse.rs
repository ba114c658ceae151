//! Telling a container that there is nobody to talk to: its TCP packet is turned into the answer and given back to it.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_csum_diff, bpf_redirect_peer, bpf_skb_change_tail},
    programs::TcContext,
};
use flynn_abi::DropReason;
use flynn_programs::{
    packet::{self, Header, IP, Transport, tcp},
    translate,
};

use crate::{Decision, blame, maps};

#[repr(C)]
struct Tcp {
    source: [u8; 2],
    destination: [u8; 2],
    sequence: [u8; 4],
    acknowledgement: [u8; 4],
    offset: u8,
    flags: u8,
    window: [u8; 2],
    checksum: [u8; 2],
    urgent: [u8; 2],
}

const SIZE: usize = size_of::<Tcp>();
const _: () = assert!(SIZE == 20);

/// What TCP's checksum is about.
#[repr(C)]
struct Covered<A> {
    source: A,
    destination: A,
    length: [u8; 4],
    protocol: [u8; 4],
    tcp: Tcp,
}

/// Drops a packet, for a reason that is counted. A sender that speaks TCP is told so by a reset.
#[inline(always)]
pub(crate) fn refuse<H: Header>(ctx: &TcContext, reason: DropReason) -> Decision {
    if !matches!(reset::<H>(ctx.skb.skb), Ok(true)) {
        return Err(reason);
    }
    maps::count_drop(reason);
    blame::sent(ctx.skb.skb, reason as u32);
    // SAFETY: the kernel hands programs a valid context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: a helper that only notes where the packet goes.
    Ok(unsafe { bpf_redirect_peer(ifindex, 0) } as i32)
}

/// Makes the packet a reset from whom it was meant for: whether it is one now. Resets are not answered, nor is what comes
/// behind IPv4 options.
#[inline(never)]
fn reset<H: Header>(skb: *mut __sk_buff) -> Result<bool, DropReason> {
    let ctx = &TcContext::new(skb);
    let failed = |_| DropReason::RewriteFailed;
    let ip = &packet::frame::<H>(ctx)?.ip;
    let (source, destination) = (ip.source(), ip.destination());
    let at = IP + size_of::<H>();
    match ip.transport(ctx, IP) {
        Transport::Tcp { at: found } if found == at && !ip.is_fragment() => {}
        _ => return Ok(false),
    }
    let sent: Tcp = ctx.load(at).map_err(|_| DropReason::Truncated)?;
    let (sequence, acknowledgement, flags) = match sent.flags & (tcp::RST | tcp::ACK | tcp::SYN) {
        tcp::SYN => {
            let next = u32::from_be_bytes(sent.sequence).wrapping_add(1);
            ([0; 4], next.to_be_bytes(), tcp::RST | tcp::ACK)
        }
        flags if flags & (tcp::RST | tcp::ACK) == tcp::ACK => (sent.acknowledgement, [0; 4], tcp::RST),
        _ => return Ok(false),
    };
    // SAFETY: the helper takes the context that the program was given.
    if unsafe { bpf_skb_change_tail(skb, (at + SIZE) as u32, 0) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    translate::set_length::<H>(ctx, SIZE as u16)?;
    let mut covered = Covered {
        source: destination,
        destination: source,
        length: (SIZE as u32).to_be_bytes(),
        protocol: u32::from(packet::TCP).to_be_bytes(),
        tcp: Tcp {
            source: sent.destination,
            destination: sent.source,
            sequence,
            acknowledgement,
            offset: (SIZE as u8 / 4) << 4,
            flags,
            window: [0; 2],
            checksum: [0; 2],
            urgent: [0; 2],
        },
    };
    let size = size_of::<Covered<H::Address>>() as u32;
    // SAFETY: as long as is said, a multiple of four bytes.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, (&raw mut covered).cast(), size, 0) } as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    // Complete, also where the container's kernel has left the packet's to an interface: then nobody looks at it.
    covered.tcp.checksum = (!(sum as u16)).to_ne_bytes();
    ctx.store(IP + H::SOURCE, &covered.source, 0).map_err(failed)?;
    ctx.store(IP + H::DESTINATION, &covered.destination, 0)
        .map_err(failed)?;
    ctx.store(at, &covered.tcp, 0).map_err(failed)?;
    Ok(true)
}
