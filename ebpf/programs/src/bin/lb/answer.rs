//! A packet that a backend sends, behind the overlay's own program, which has seen that it may.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, programs::TcContext};
use flynn_abi::{
    DropReason, Host, Ipv4,
    lb::{Config, Event, Translation, TranslationKey, Tunnelled},
};
use flynn_programs::Decision;

use crate::{
    context::{self, Context},
    family::{self, Family, V4, V6},
    headers::{ETHERNET, Ethernet, Ip4, Ports, TCP, Tcp, UDP},
    maps, neighbour,
    translate::{self, Checksum},
    tunnel,
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
    let (protocol, container, client) = (F::protocol(header), F::source(header), F::destination(header));
    if F::VERSION == 4 {
        match ctx.at::<Ip4>(ETHERNET) {
            Some(header)
                if header.version_and_length == 0x45 && u16::from_be_bytes(header.fragment) & 0x3fff == 0 => {
            }
            _ => return Ok(TC_ACT_UNSPEC),
        }
    }
    if protocol != TCP && protocol != UDP {
        return Ok(TC_ACT_UNSPEC);
    }
    let Some(&ports) = ctx.at::<Ports>(F::TRANSPORT) else {
        return Ok(TC_ACT_UNSPEC);
    };
    let key = TranslationKey {
        client: F::wide(client),
        container: F::wide(container).last(),
        client_port: ports.destination,
        port: ports.source,
        protocol,
        version: F::VERSION,
        reserved: 0,
    };
    let Some(found) = maps::established(&key).or_else(|| maps::open(&key)) else {
        return Ok(TC_ACT_UNSPEC);
    };
    // SAFETY: should the entry be given to another flow while it is read, this packet gets that flow's address, and
    // nobody takes it.
    let Translation {
        vip,
        via,
        port,
        client_port,
        flags,
    } = unsafe { *found };

    let checksum = Checksum::of::<F>(protocol);
    let accepts = protocol == TCP
        && ctx
            .at::<Tcp>(F::TRANSPORT)
            .is_some_and(|tcp| tcp.flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN | Tcp::ACK);
    if accepts && flags & Translation::TUNNELLED != 0 {
        translate::clamp::<F>(ctx, tunnel::room(config, true), checksum)?;
    }
    translate::address::<F>(ctx, F::SOURCE, container, F::narrow(vip), checksum)?;
    translate::two_bytes(ctx, F::TRANSPORT, ports.source, port, checksum)?;
    translate::two_bytes(ctx, F::TRANSPORT + 2, ports.destination, client_port, checksum)?;
    maps::count(Event::Answered);
    if via == Ipv4::new([0; 4]) {
        return Ok(neighbour::route(config.uplink));
    }
    let host = first_host(via).ok_or(DropReason::NoRoute)?;
    let hash = family::hash::<F>(client, client_port, port);
    let tunnelled = Tunnelled {
        kind: Tunnelled::ANSWER,
        flags: 0,
        port,
        address: key.container,
    };
    tunnel::send::<F>(ctx, host, hash, tunnelled, config)
}

#[inline(always)]
fn first_host(address: Ipv4) -> Option<&'static Host> {
    flynn_programs::maps::host4(flynn_programs::maps::peer(address)?.subnet)
}
