//! Handing packets to neighbours on the uplink.

use aya_ebpf::{bindings::bpf_redir_neigh, helpers::bpf_redirect_neigh};
use flynn_abi::Ipv4;

const AF_INET: u32 = 2;

/// Out of an interface to the neighbour with this address: the kernel's action.
#[inline(always)]
pub(crate) fn send(ifindex: u32, next_hop: Ipv4) -> i32 {
    // SAFETY: it is integers, of which all zeros are a value.
    let mut to: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    to.nh_family = AF_INET;
    to.__bindgen_anon_1.ipv4_nh = u32::from_ne_bytes(next_hop.octets());
    // SAFETY: the helper reads the struct that it is given with its size.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut to, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

/// Out of an interface to where the kernel's routes say.
#[inline(always)]
pub(crate) fn route(ifindex: u32) -> i32 {
    // SAFETY: a helper that only notes where the packet goes.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}
