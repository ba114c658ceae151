//! Connected sockets, TCP and UDP.

use aya_ebpf::programs::SockAddrContext;
use flynn_abi::ServiceFlow;
use flynn_programs::services::{self, Address};

use crate::{Decision, context::Family, maps};

/// A socket connects.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> Decision {
    let address = F::get(ctx);
    let Some(wanted) = services::find(address) else {
        return Ok(());
    };
    let (_, backend) = services::choose(wanted)?;
    F::set(ctx, backend.address.into())?;
    let mut flow = ServiceFlow {
        virtual_address: address.into(),
        backend: backend.address,
        instance: backend.instance,
        service: wanted.service,
        flags: if wanted.leader { ServiceFlow::LEADER } else { 0 },
    };
    // SAFETY: the kernel hands programs a valid context. Without memory for the note the connection works all the same
    // and is only not told of its instance's end.
    unsafe {
        let noted = maps::service_flows.get_or_insert_ptr_mut(ctx, Some(&mut flow));
        if !noted.is_null() {
            // A socket that connects anew has the note of the time before.
            *noted = flow;
        }
    }
    Ok(())
}

/// A socket's peer is named: whether it was one of ours.
#[inline(always)]
pub(crate) fn restore<F: Family>(ctx: &SockAddrContext) -> bool {
    // SAFETY: as above; the note stays as long as the socket, which is being used.
    let flow = unsafe {
        let noted = maps::service_flows.get_ptr_mut(ctx);
        if noted.is_null() {
            return false;
        }
        &*noted
    };
    // The socket may have been connected elsewhere since.
    Address::from(flow.backend) == F::get(ctx) && F::set(ctx, flow.virtual_address.into()).is_ok()
}
