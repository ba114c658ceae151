//! A packet to a VIP whose backend is a container of this host.

use aya_ebpf::{helpers::bpf_redirect_peer, programs::TcContext};
use flynn_abi::{
    DropReason, Endpoint, Ipv4,
    lb::{Config, Event, Port, Translation, TranslationKey, Tunnelled, Vip},
};
use flynn_programs::{Decision, rate};

use crate::{
    context::Context,
    family::Family,
    headers::{ETHERNET, Ethernet, ICMP, Ports, TCP, Tcp},
    maps, seek,
    translate::{self, Checksum},
    tunnel, uplink,
};

/// How many ports are tried for a client's port that another flow has already.
const TRIES: u16 = 4;

/// Hands the packet over to the container that has its connection, or to that which it is said to be for. `peer` is the
/// host that it came through, zeros if none.
#[inline(always)]
pub(crate) fn deliver<F: Family>(
    ctx: &TcContext,
    peer: Ipv4,
    mut to: Tunnelled,
    config: &Config,
) -> Decision {
    if let Some(next) = seek::elsewhere::<F>(ctx, to)? {
        maps::count(Event::Sought);
        to = next.tunnelled();
        if !seek::is_here(to.address) {
            let host = uplink::host_of(to.address).ok_or(DropReason::NoRoute)?;
            return tunnel::send::<F>(ctx, host, next.hash, to, config);
        }
    }
    hand_over::<F>(ctx, peer, to, config)
}

#[inline(always)]
fn hand_over<F: Family>(ctx: &TcContext, peer: Ipv4, to: Tunnelled, config: &Config) -> Decision {
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
            Some(tcp) if protocol == TCP => tcp.flags & (Tcp::SYN | Tcp::ACK),
            _ => 0,
        };
        let back = to.flags & Vip::FIRST_HOST as u8 != 0;
        let nobody = Ipv4::new([0; 4]);
        let translation = Translation {
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
        record(&mut key, &translation, flags == Tcp::SYN, config)?;

        let checksum = Checksum::of::<F>(protocol);
        if flags == Tcp::SYN && translation.via != nobody {
            translate::clamp::<F>(ctx, tunnel::room(config, true), checksum)?;
        }
        translate::address::<F>(ctx, F::DESTINATION, vip, container, checksum)?;
        translate::two_bytes(ctx, F::TRANSPORT, ports.source, key.client_port, checksum)?;
        translate::two_bytes(ctx, F::TRANSPORT + 2, ports.destination, to.port, checksum)?;
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

/// Notes what the flow is outside, for answers. Where another flow has the client's port at this backend already,
/// because the client uses the port for two VIPs, it finds another port, the same one each time.
#[inline(always)]
fn record(
    key: &mut TranslationKey,
    wanted: &Translation,
    opens: bool,
    config: &Config,
) -> Result<(), DropReason> {
    for attempt in 0..TRIES {
        key.client_port = nth_port(wanted.client_port, attempt);
        if let Some(found) = maps::established(key) {
            // SAFETY: should the entry be given to another flow while it is looked at, it does not look the same, or is
            // the same.
            let found = unsafe { &mut *found };
            if is_same(found, wanted) {
                if found.via != wanted.via {
                    found.via = wanted.via;
                }
                return Ok(());
            }
        } else if let Some(found) = maps::open(key) {
            // SAFETY: as above.
            if is_same(unsafe { &*found }, wanted) {
                let noted = opens || maps::established_insert(key, wanted);
                return if noted {
                    Ok(())
                } else {
                    Err(DropReason::TooManyFlows)
                };
            }
        } else {
            let noted = if opens {
                maps::open_insert(key, wanted)
            } else {
                // Nobody has seen it begin. A flood of such must not push out those who were.
                maps::admits(config) && maps::established_insert(key, wanted)
            };
            return if noted {
                Ok(())
            } else {
                Err(DropReason::TooManyFlows)
            };
        }
        if attempt == 0 {
            maps::count(Event::PortTranslated);
        }
    }
    Err(DropReason::PortsTaken)
}

#[inline(always)]
fn is_same(found: &Translation, wanted: &Translation) -> bool {
    found.vip == wanted.vip && found.port == wanted.port && found.client_port == wanted.client_port
}

/// The first is the port itself.
#[inline(always)]
fn nth_port(port: Port, attempt: u16) -> Port {
    let port = u16::from_be_bytes(port);
    match attempt {
        0 => port,
        _ => 0x8000 | port.wrapping_add(attempt * 9973),
    }
    .to_be_bytes()
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
