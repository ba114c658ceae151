//! A packet that a backend sends, behind the overlay's own program, which has seen that it may.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, programs::TcContext};
use flynn_abi::{
    DropReason, Host, Ipv4,
    lb::{Config, Event, Port, Translation, TranslationKey, Tunnelled},
};
use flynn_programs::{
    Decision,
    translate::{Checksum, address, two_bytes},
};

use crate::{
    context::{self, Context},
    family::{self, Family, V4, V6},
    headers::{ETHERNET, Ethernet, ICMP, Icmp, Ports, TCP, Tcp, UDP},
    maps, neighbour, translate, translations, tunnel,
};

#[inline(always)]
pub(crate) fn decide(ctx: &TcContext) -> Decision {
    let config = maps::config()?;
    context::gather(ctx);
    match ctx.at::<Ethernet>(0) {
        Some(ethernet) => match ethernet.kind {
            Ethernet::IPV4 => answer::<V4>(ctx, config),
            Ethernet::IPV6 => answer::<V6>(ctx, config),
            _ => Ok(TC_ACT_UNSPEC),
        },
        None => Ok(TC_ACT_UNSPEC),
    }
}

#[inline(always)]
fn answer<F: Family>(ctx: &TcContext, config: &Config) -> Decision {
    let Some(header) = ctx.at::<F::Header>(ETHERNET) else {
        return Ok(TC_ACT_UNSPEC);
    };
    if !F::is_plain(header) {
        return Ok(TC_ACT_UNSPEC);
    }
    let (container, client) = (F::source(header), F::destination(header));
    // Two ways to their ends, although they end alike: where they came together and the question was asked again, Linux
    // 6.1 took the one for the other.
    match F::protocol(header) {
        protocol @ (TCP | UDP) => reply::<F>(ctx, protocol, container, client, config),
        protocol if protocol == F::ICMP => refusal::<F>(ctx, container, client, config),
        _ => Ok(TC_ACT_UNSPEC),
    }
}

/// What the flow of a packet with these flags of TCP is outside.
#[inline(always)]
fn translation<F: Family>(
    protocol: u8,
    container: F::Address,
    port: Port,
    client: F::Address,
    client_port: Port,
    flags: u8,
) -> Option<Translation> {
    let key = TranslationKey {
        client: F::wide(client),
        container: F::wide(container).last(),
        client_port,
        port,
        protocol,
        version: F::VERSION,
        reserved: 0,
    };
    translations::answered(&key, flags)
}

#[inline(always)]
fn reply<F: Family>(
    ctx: &TcContext,
    protocol: u8,
    container: F::Address,
    client: F::Address,
    config: &Config,
) -> Decision {
    let Some(&Ports { source, destination }) = ctx.at::<Ports>(F::TRANSPORT) else {
        return Ok(TC_ACT_UNSPEC);
    };
    let flags = match ctx.at::<Tcp>(F::TRANSPORT) {
        Some(tcp) if protocol == TCP => tcp.flags,
        _ => 0,
    };
    let Some(outside) = translation::<F>(protocol, container, source, client, destination, flags) else {
        return Ok(TC_ACT_UNSPEC);
    };
    let checksum = Checksum::of(protocol, F::TRANSPORT);
    let accepts = flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN | Tcp::ACK;
    if accepts && outside.flags & Translation::TUNNELLED != 0 {
        translate::clamp::<F>(ctx, tunnel::room(config, true), checksum)?;
    }
    address(ctx, F::SOURCE, container, F::narrow(outside.vip), checksum)?;
    two_bytes(ctx, F::TRANSPORT, source, outside.port, checksum)?;
    two_bytes(ctx, F::TRANSPORT + 2, destination, outside.client_port, checksum)?;
    leave::<F>(ctx, container, client, &outside, config)
}

/// An ICMP error about a packet of the client's, which gets back the addresses and ports that the client sent it to.
#[inline(always)]
fn refusal<F: Family>(
    ctx: &TcContext,
    container: F::Address,
    client: F::Address,
    config: &Config,
) -> Decision {
    let about = F::TRANSPORT + ICMP;
    let (Some(icmp), Some(header)) = (ctx.at::<Icmp>(F::TRANSPORT), ctx.at::<F::Header>(about)) else {
        return Ok(TC_ACT_UNSPEC);
    };
    let protocol = F::protocol(header);
    if !F::is_error(icmp.kind)
        || !F::is_plain(header)
        || F::source(header) != client
        || F::destination(header) != container
    {
        return Ok(TC_ACT_UNSPEC);
    }
    let at = about + size_of::<F::Header>();
    let Some(&Ports { source, destination }) = ctx.at::<Ports>(at) else {
        return Ok(TC_ACT_UNSPEC);
    };
    let Some(outside) = translation::<F>(protocol, container, destination, client, source, 0) else {
        return Ok(TC_ACT_UNSPEC);
    };
    F::error_address(ctx, F::SOURCE, container, F::narrow(outside.vip))?;
    translate::error_port::<F>(ctx, at, source, outside.client_port)?;
    translate::error_port::<F>(ctx, at + 2, destination, outside.port)?;
    leave::<F>(ctx, container, client, &outside, config)
}

/// Sends it to the client, directly or through the host that the question came by.
#[inline(always)]
fn leave<F: Family>(
    ctx: &TcContext,
    container: F::Address,
    client: F::Address,
    outside: &Translation,
    config: &Config,
) -> Decision {
    maps::count(Event::Answered);
    if outside.via == Ipv4::new([0; 4]) {
        return Ok(neighbour::route(config.uplink));
    }
    let host = first_host(outside.via).ok_or(DropReason::NoRoute)?;
    let hash = family::hash::<F>(client, outside.client_port, outside.port);
    let tunnelled = Tunnelled {
        kind: Tunnelled::ANSWER,
        flags: 0,
        port: outside.port,
        address: F::wide(container).last(),
    };
    tunnel::send::<F>(ctx, host, hash, tunnelled, config)
}

#[inline(always)]
fn first_host(address: Ipv4) -> Option<&'static Host> {
    flynn_programs::maps::host4(flynn_programs::maps::peer(address)?.subnet)
}
