//! Where a packet goes.

use aya_ebpf::{helpers::bpf_redirect_peer, programs::TcContext};
use flynn_abi::{Config, DropReason, Endpoint, Host, Ipv4};

use crate::{
    Decision, bypass, maps,
    packet::{self, Header},
};

/// What is behind a destination.
pub(crate) enum Way {
    /// A container on this host.
    Container(&'static Endpoint),
    /// A container on another host, with what is known of it.
    Remote(&'static Host, Option<&'static Endpoint>),
    /// Another host's gateway address.
    RemoteGateway(&'static Host),
    /// This host itself, at its gateway address.
    Gateway,
    /// This host's own stack, which knows the way out of the cluster.
    Outside,
}

#[inline(always)]
pub(crate) fn find<H: Header>(destination: H::Address, config: &Config) -> Result<Way, DropReason> {
    let endpoint = H::endpoint(destination);
    match endpoint {
        Some(endpoint) if endpoint.flags & Endpoint::CONTAINER != 0 => return Ok(Way::Container(endpoint)),
        Some(endpoint) if endpoint.flags & Endpoint::GATEWAY != 0 => return Ok(Way::Gateway),
        _ if H::is_in_cluster(destination, config) => {}
        _ => return Ok(Way::Outside),
    }
    let address = H::ipv4(destination);
    let subnet = packet::masked(address, config.subnet_mask4);
    let host = maps::host4(Ipv4::new(subnet.to_ne_bytes())).ok_or(DropReason::NoEndpoint)?;
    if u32::from_ne_bytes(address.octets()) == subnet | GATEWAY {
        Ok(Way::RemoteGateway(host))
    } else {
        Ok(Way::Remote(host, endpoint))
    }
}

/// The host part of gateway addresses.
pub(crate) const GATEWAY: u32 = u32::to_be(1);

/// Makes the frame one from the gateway to the container and counts it. What is left is to send it on.
#[inline(always)]
pub(crate) fn address_to<H: Header>(
    ctx: &TcContext,
    endpoint: &Endpoint,
    config: &Config,
) -> Result<(), DropReason> {
    receive::<H>(ctx, endpoint)?;
    packet::address_to(ctx, endpoint.mac, config.gateway)
}

/// Puts the packet straight into the container's namespace, from an ingress hook. Its Ethernet addresses stay what they
/// were: the kernel has looked at them where the packet came in, and nobody does again.
#[inline(always)]
pub(crate) fn hand_over<H: Header>(ctx: &TcContext, endpoint: &Endpoint) -> Decision {
    receive::<H>(ctx, endpoint)?;
    // SAFETY: a helper that only notes where the packet goes.
    Ok(unsafe { bpf_redirect_peer(endpoint.ifindex, 0) } as i32)
}

/// What every packet to a container passes last.
#[inline(always)]
fn receive<H: Header>(ctx: &TcContext, endpoint: &Endpoint) -> Result<(), DropReason> {
    if endpoint.translates != 0 {
        bypass::receive::<H>(ctx)?;
    }
    maps::count_received(ctx, endpoint);
    Ok(())
}
