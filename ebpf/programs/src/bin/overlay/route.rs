//! Where a packet goes.

use aya_ebpf::programs::TcContext;
use flynn_abi::{Config, DropReason, Endpoint};

use crate::{maps, packet, packet::Header};

/// What is behind a destination.
pub(crate) enum Way {
    /// A container on this host.
    Container(&'static Endpoint),
    /// This host's own stack, which has the packet or knows the way out.
    Host,
}

#[inline(always)]
pub(crate) fn find<H: Header>(destination: H::Address, config: &Config) -> Result<Way, DropReason> {
    match H::endpoint(destination) {
        Some(endpoint) if endpoint.flags & Endpoint::CONTAINER != 0 => Ok(Way::Container(endpoint)),
        Some(endpoint) if endpoint.flags & Endpoint::GATEWAY != 0 => Ok(Way::Host),
        _ if H::is_in_cluster(destination, config) => Err(DropReason::NoEndpoint),
        _ => Ok(Way::Host),
    }
}

/// Makes the frame one from the gateway to the container and counts it. What is left is to send it on.
#[inline(always)]
pub(crate) fn hand_over(ctx: &TcContext, endpoint: &Endpoint, config: &Config) -> Result<(), DropReason> {
    packet::address_to(ctx, endpoint.mac, config.gateway)?;
    maps::count_received(ctx, endpoint);
    Ok(())
}
