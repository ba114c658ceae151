//! Room taken out of the middle of a packet.

use aya_ebpf::{
    bindings::{BPF_F_ADJ_ROOM_DECAP_L3_IPV6, BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    programs::TcContext,
};
use flynn_abi::DropReason;

use crate::packet::{Header as _, Ipv6Header};

const EINVAL: i64 = -22;
/// By how much an IPv6 header is longer than an IPv4 header.
const LONGER: i32 = 20;

/// Takes `size` bytes out behind the Ethernet header of an IPv4 packet: the outer headers of what is IPv4 too, or IPv6.
/// What the Ethernet header says it carries is left as it was.
#[inline(always)]
pub fn decapsulate(ctx: &TcContext, size: i32, is_ipv4: bool) -> Result<(), DropReason> {
    let shrink = |by: i32, flags: u32| {
        let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | flags);
        ctx.adjust_room(-by, BPF_ADJ_ROOM_MAC, flags)
    };
    let shrunk = if is_ipv4 {
        shrink(size, 0)
    } else {
        match shrink(size, BPF_F_ADJ_ROOM_DECAP_L3_IPV6) {
            // Before 6.3, the kernel cannot be told that what is left is IPv6; but it can make room for an IPv6 header
            // instead of the outer IPv4 header, and then takes the packet for one.
            Err(EINVAL) => ctx
                .change_proto(u16::from_ne_bytes(Ipv6Header::ETHERTYPE), 0)
                .and_then(|()| shrink(size + LONGER, 0)),
            other => other,
        }
    };
    shrunk.map_err(|_| DropReason::RewriteFailed)
}
