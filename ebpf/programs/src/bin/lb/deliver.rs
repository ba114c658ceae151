//! A packet to a VIP whose backend is a container of this host.

use aya_ebpf::{helpers::bpf_redirect_peer, programs::TcContext};
use flynn_abi::{
    DropReason, Endpoint, Ipv4,
    lb::{Config, Event, Port, Translation, TranslationKey, Tunnelled, Vip},
};
use flynn_programs::{
    Decision, rate,
    translate::{Checksum, address, two_bytes},
};

use crate::{
    context::Context,
    family::Family,
    headers::{ETHERNET, Ethernet, ICMP, Ports, TCP, Tcp},
    maps, seek, translate, translations, tunnel, uplink,
};

/// Hands a packet that came by no tunnel over to the container that has its connection, or to that which it is said to be
/// for.
#[inline(always)]
pub(crate) fn deliver<F: Family>(ctx: &TcContext, mut to: Tunnelled, config: &Config) -> Decision {
    if let Some(next) = seek::elsewhere::<F>(ctx, 0, to)? {
        maps::count(Event::Sought);
        to = next.tunnelled();
        if !seek::is_here(to.address) {
            let host = uplink::host_of(to.address).ok_or(DropReason::NoRoute)?;
            return tunnel::send::<F>(ctx, host, next.hash, to, config);
        }
    }
    hand_over::<F>(ctx, Ipv4::new([0; 4]), to, config)
}

/// Hands the packet over to a container. `peer` is the host that it came through, zeros if none.
#[inline(always)]
pub(crate) fn hand_over<F: Family>(ctx: &TcContext, peer: Ipv4, to: Tunnelled, config: &Config) -> Decision {
    let network = flynn_programs::maps::config()?;
    let endpoint = match flynn_programs::maps::endpoint4(to.address) {
        Some(endpoint) if endpoint.flags & Endpoint::CONTAINER != 0 => endpoint,
        _ => return Err(DropReason::NoEndpoint),
    };
    rate::limit_received(ctx, endpoint)?;
    let header = ctx.at::<F::Header>(ETHERNET).ok_or(DropReason::Truncated)?;
    let (protocol, client, vip) = (F::protocol(header), F::source(header), F::destination(header));
    let container = F::container(to.address, network).ok_or(DropReason::NoEndpoint)?;
    if protocol == F::ICMP {
        error::<F>(ctx, vip, container, to.port)?;
    } else {
        let ports = *ctx.at::<Ports>(F::TRANSPORT).ok_or(DropReason::Truncated)?;
        let flags = match ctx.at::<Tcp>(F::TRANSPORT) {
            Some(tcp) if protocol == TCP => tcp.flags,
            _ => 0,
        };
        let back = to.flags & Vip::FIRST_HOST as u8 != 0;
        let nobody = Ipv4::new([0; 4]);
        let mut translation = Translation {
            vip: F::wide(vip),
            via: if back { peer } else { nobody },
            port: ports.destination,
            client_port: ports.source,
            flags: if peer == nobody { 0 } else { Translation::TUNNELLED },
        };
        let mut key = TranslationKey {
            client: F::wide(client),
            container: to.address,
            client_port: ports.source,
            port: to.port,
            protocol,
            version: F::VERSION,
            reserved: 0,
        };
        translations::record(&mut key, &mut translation, flags, config)?;

        let checksum = Checksum::of(protocol, F::TRANSPORT);
        if flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN && translation.via != nobody {
            translate::clamp::<F>(ctx, tunnel::room(config, true), checksum)?;
        }
        address(ctx, F::DESTINATION, vip, container, checksum)?;
        two_bytes(ctx, F::TRANSPORT, ports.source, key.client_port, checksum)?;
        two_bytes(ctx, F::TRANSPORT + 2, ports.destination, to.port, checksum)?;
    }
    let ethernet = Ethernet {
        to: endpoint.mac.octets(),
        from: network.gateway.octets(),
        kind: F::KIND,
    };
    ctx.store(0, &ethernet, 0)
        .map_err(|_| DropReason::RewriteFailed)?;
    flynn_programs::maps::count_received(ctx, endpoint);
    maps::count(Event::Delivered);
    // SAFETY: a helper that only notes where the packet goes; allowed here because this is an ingress hook.
    Ok(unsafe { bpf_redirect_peer(endpoint.ifindex, 0) } as i32)
}

/// An ICMP error about an answer: both it and the beginning of the answer in it get the container's address and port.
#[inline(always)]
fn error<F: Family>(
    ctx: &TcContext,
    vip: F::Address,
    container: F::Address,
    port: Port,
) -> Result<(), DropReason> {
    let at = F::TRANSPORT + ICMP + size_of::<F::Header>();
    let ports = *ctx.at::<Ports>(at).ok_or(DropReason::Truncated)?;
    F::error_address(ctx, F::DESTINATION, vip, container)?;
    translate::error_port::<F>(ctx, at, ports.source, port)
}
