//! Unconnected sockets, whose datagrams each have an address of their own.

use aya_ebpf::{EbpfContext as _, helpers::bpf_get_socket_cookie, programs::SockAddrContext};
use flynn_abi::{DatagramFlow, DatagramPeer, DropReason};
use flynn_programs::services::{self, Address};

use crate::{
    Decision,
    context::{self, Family},
    maps::PEERS,
    streams,
};

/// A datagram is sent.
#[inline(always)]
pub(crate) fn send<F: Family>(ctx: &SockAddrContext) -> Decision {
    let address = F::get(ctx);
    let Some(wanted) = services::find(address) else {
        return Ok(());
    };
    let outward = peer(ctx, address, DatagramPeer::SEND);
    // SAFETY: read at once; an entry that is evicted and reused meanwhile names another instance, which is checked to
    // be there as well.
    let known = unsafe { PEERS.get(outward) };
    let known = known.and_then(|flow| services::still_there(flow.place, flow.instance));
    let (place, backend) = match known {
        Some(found) => found,
        None => services::choose(wanted)?,
    };
    let target = services::reachable(address, backend)?;
    let inward = peer(ctx, target, DatagramPeer::RECEIVE);
    // The way back may be another service's, behind the same instance: who was asked last has answered.
    // SAFETY: read at once.
    let answers = unsafe { PEERS.get(inward) }.is_some_and(|flow| Address::from(flow.address) == address);
    if known.is_none() || !answers {
        let flow = |address: Address| DatagramFlow {
            address: address.into(),
            instance: backend.instance,
            place,
        };
        // Without room for the answer's way back the datagram would go out for nothing.
        if PEERS.insert(inward, flow(address), 0).is_err() || PEERS.insert(outward, flow(target), 0).is_err()
        {
            return Err(DropReason::RewriteFailed);
        }
    }
    F::set(ctx, target)
}

/// A received datagram's sender is named.
#[inline(always)]
pub(crate) fn receive<F: Family>(ctx: &SockAddrContext) {
    if streams::restore::<F>(ctx) {
        return;
    }
    let inward = peer(ctx, F::get(ctx), DatagramPeer::RECEIVE);
    // SAFETY: as above: read at once.
    if let Some(flow) = unsafe { PEERS.get(inward) } {
        // Both are of the same family, as they were when the entry was made.
        let _ = F::set(ctx, flow.address.into());
    }
}

#[inline(always)]
fn peer(ctx: &SockAddrContext, address: Address, way: u16) -> DatagramPeer {
    DatagramPeer {
        // SAFETY: the kernel hands programs a valid context.
        cookie: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        address: address.into(),
        port: context::port(ctx),
        way,
        reserved: 0,
    }
}
