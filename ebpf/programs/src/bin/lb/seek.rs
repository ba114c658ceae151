//! A TCP connection whose backend the ring does not name any more, and which no flow table here knows, because its
//! packets came by another host until now.
//!
//! The backend that the ring names has never seen the connection. Its host looks for those who had the slot before, as
//! each host knows by itself, and sends the packet on to them, the latest first, until one knows the connection. What
//! nobody knows stays with the last and is answered by a reset. A packet says how many have been tried: it goes on as
//! often as there are those who are tried.

use aya_ebpf::programs::TcContext;
use flynn_abi::{
    DropReason, Endpoint, Ipv4,
    lb::{Backend, FORMERS, Port, TranslationKey, Tunnelled, Vip},
};

use crate::{
    context::Context,
    family::Family,
    headers::{ETHERNET, TCP, Tcp},
    maps, select, translations,
};

/// Where a connection is looked for next.
#[derive(Clone, Copy)]
pub(crate) struct Next {
    backend: *mut Backend,
    /// Of the flow.
    pub(crate) hash: u32,
    flags: u32,
}

impl Next {
    /// What is said to whom it goes to.
    #[inline(always)]
    pub(crate) fn tunnelled(self) -> Tunnelled {
        // SAFETY: the entry of an array, which is there for ever.
        let (address, port) = unsafe { ((*self.backend).address, (*self.backend).port) };
        Tunnelled {
            kind: Tunnelled::FORWARD,
            flags: self.flags as u8,
            port,
            address,
        }
    }
}

/// Whether the address is that of a container of this host.
#[inline(always)]
pub(crate) fn is_here(address: Ipv4) -> bool {
    flynn_programs::maps::endpoint4(address).is_some_and(|endpoint| endpoint.flags & Endpoint::CONTAINER != 0)
}

/// Where else a packet may belong: one of a TCP connection that the container has not seen begin. In front of its Ethernet
/// header are `outer` bytes.
#[inline(always)]
pub(crate) fn elsewhere<F: Family>(
    ctx: &TcContext,
    outer: usize,
    at: Tunnelled,
) -> Result<Option<Next>, DropReason> {
    let header = ctx
        .at::<F::Header>(outer + ETHERNET)
        .ok_or(DropReason::Truncated)?;
    if F::protocol(header) != TCP {
        return Ok(None);
    }
    let (client, address) = (F::source(header), F::destination(header));
    let tcp = ctx.at::<Tcp>(outer + F::TRANSPORT).ok_or(DropReason::Truncated)?;
    let (flags, client_port, port) = (tcp.flags, tcp.ports.source, tcp.ports.destination);
    let is_known =
        |container: Ipv4, at: Port| is_known::<F>((client, client_port), (address, port), container, at);
    if flags & Tcp::SYN != 0 || is_known(at.address, at.port) {
        return Ok(None);
    }
    let Some(vip) = F::vip(address, port, TCP) else {
        return Ok(None);
    };
    let hash = select::hash::<F>(vip, client, client_port, port);
    let Some(formers) = maps::formers(vip.service, maps::slot(hash)) else {
        return Ok(None);
    };
    let tried = u32::from(at.flags >> Tunnelled::TRIED);
    let first_host = u32::from(vip.flags & Vip::FIRST_HOST);
    for nth in 0..FORMERS {
        if nth < tried {
            continue;
        }
        let Some(backend) = maps::backend(formers[nth as usize]) else {
            continue;
        };
        // SAFETY: as above.
        let Backend {
            address,
            port,
            flags: used,
            service,
            ..
        } = unsafe { *backend };
        // Nobody, somebody who is gone (whose number may be another service's by now), or one who is here and does not
        // know of it either.
        if used & Backend::USED == 0 || service != vip.service || is_here(address) && !is_known(address, port)
        {
            continue;
        }
        let flags = first_host | (nth + 1) << Tunnelled::TRIED;
        return Ok(Some(Next { backend, hash, flags }));
    }
    Ok(None)
}

/// Whether a container of this host has the connection, by whichever port.
#[inline(always)]
fn is_known<F: Family>(
    client: (F::Address, Port),
    vip: (F::Address, Port),
    container: Ipv4,
    port: Port,
) -> bool {
    let mut key = TranslationKey {
        client: F::wide(client.0),
        container,
        client_port: client.1,
        port,
        protocol: TCP,
        version: F::VERSION,
        reserved: 0,
    };
    for attempt in 0..translations::TRIES {
        key.client_port = translations::nth_port(client.1, attempt);
        let Some(found) = maps::established(&key).or_else(|| maps::open(&key)) else {
            continue;
        };
        // SAFETY: should the entry be given to another flow while it is looked at, the packet goes where that one is.
        let found = unsafe { &*found };
        if found.port == vip.1 && found.client_port == client.1 && F::narrow(found.vip) == vip.0 {
            return true;
        }
    }
    false
}
