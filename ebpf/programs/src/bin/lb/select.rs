//! Which backend a packet goes to.

use flynn_abi::{
    DropReason,
    lb::{Backend, Config, Event, Pick, Port, Vip},
};

use crate::{
    context::Context,
    family::{self, Family},
    headers::{ETHERNET, Ethernet, ICMP, Icmp, Ip4, Ports, TCP, Tcp, UDP},
    maps,
};

/// What was decided for a packet to a VIP.
pub(crate) struct Choice {
    pub(crate) vip: &'static Vip,
    pub(crate) backend: *mut Backend,
    /// Of the flow; the bits that chose the slot are the upper ones.
    pub(crate) hash: u32,
}

/// A flow, and what a packet says about it.
struct Flow<A> {
    client: A,
    port: Port,
    vip_port: Port,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// The first packet of a TCP connection.
    Opens,
    /// Any other, which a flow may begin with all the same.
    Goes,
    /// UDP, which has no beginning.
    Datagram,
    /// Somebody else's packet about the flow, or its end: nothing to remember.
    About,
}

/// Whether the frame is for this host and could be for a VIP at all: which version of IP it has.
#[inline(always)]
pub(crate) fn kind<C: Context>(ctx: &C, config: &Config) -> [u8; 2] {
    match ctx.at::<Ethernet>(0) {
        Some(ethernet) if ethernet.to == config.mac.octets() => ethernet.kind,
        _ => [0; 2],
    }
}

/// Finds the backend; `None` where the packet is not for a VIP.
#[inline(always)]
pub(crate) fn select<F: Family, C: Context>(ctx: &C, config: &Config) -> Result<Option<Choice>, DropReason> {
    let Some(header) = ctx.at::<F::Header>(ETHERNET) else {
        return Ok(None);
    };
    if !is_plain::<F, C>(ctx, ETHERNET) {
        return Ok(None);
    }
    let protocol = F::protocol(header);
    let (source, destination) = (F::source(header), F::destination(header));
    let (vip, flow) = if protocol == TCP {
        let Some(tcp) = ctx.at::<Tcp>(F::TRANSPORT) else {
            return Ok(None);
        };
        let Some(vip) = F::vip(destination, tcp.ports.destination, TCP) else {
            return Ok(None);
        };
        let stage = match tcp.flags & (Tcp::SYN | Tcp::RST | Tcp::ACK) {
            Tcp::SYN => Stage::Opens,
            flags if flags & Tcp::RST != 0 => Stage::About,
            _ => Stage::Goes,
        };
        (
            vip,
            flow::<F>(source, tcp.ports.source, tcp.ports.destination, stage),
        )
    } else if protocol == UDP {
        let Some(&ports) = ctx.at::<Ports>(F::TRANSPORT) else {
            return Ok(None);
        };
        let Some(vip) = F::vip(destination, ports.destination, UDP) else {
            return Ok(None);
        };
        (
            vip,
            flow::<F>(source, ports.source, ports.destination, Stage::Datagram),
        )
    } else if protocol == F::ICMP {
        return select_error::<F, C>(ctx, config);
    } else {
        return Ok(None);
    };
    pick::<F>(&flow, vip, config).map(Some)
}

/// An ICMP error about an answer goes to the backend that gave the answer. Anything else of ICMP is the host's own.
#[inline(always)]
fn select_error<F: Family, C: Context>(ctx: &C, config: &Config) -> Result<Option<Choice>, DropReason> {
    let about = F::TRANSPORT + ICMP;
    let ports = about + size_of::<F::Header>();
    let (Some(icmp), Some(header)) = (ctx.at::<Icmp>(F::TRANSPORT), ctx.at::<F::Header>(about)) else {
        return Ok(None);
    };
    let (kind, protocol) = (icmp.kind, F::protocol(header));
    if !F::is_error(kind) || protocol != TCP && protocol != UDP || !is_plain::<F, C>(ctx, about) {
        return Ok(None);
    }
    let (vip, client) = (F::source(header), F::destination(header));
    let Some(&ports) = ctx.at::<Ports>(ports) else {
        return Ok(None);
    };
    let Some(vip) = F::vip(vip, ports.source, protocol) else {
        return Ok(None);
    };
    maps::count(Event::IcmpRouted);
    let flow = flow::<F>(client, ports.destination, ports.source, Stage::About);
    pick::<F>(&flow, vip, config).map(Some)
}

/// Whether ports are where they usually are: IPv4 without options, and no fragment. (IPv6 says both by another
/// protocol.)
#[inline(always)]
fn is_plain<F: Family, C: Context>(ctx: &C, at: usize) -> bool {
    if F::VERSION == 6 {
        return true;
    }
    let Some(header) = ctx.at::<Ip4>(at) else {
        return false;
    };
    if header.version_and_length != 0x45 {
        maps::count(Event::Options);
        return false;
    }
    if u16::from_be_bytes(header.fragment) & 0x3fff != 0 {
        maps::count(Event::Fragment);
        return false;
    }
    true
}

#[inline(always)]
fn flow<F: Family>(client: F::Address, port: Port, vip_port: Port, stage: Stage) -> Flow<F::Address> {
    Flow {
        client,
        port,
        vip_port,
        stage,
    }
}

#[inline(always)]
fn pick<F: Family>(
    flow: &Flow<F::Address>,
    vip: &'static Vip,
    config: &Config,
) -> Result<Choice, DropReason> {
    let affinity = vip.flags & Vip::AFFINITY != 0;
    let hash = hash::<F>(vip, flow.client, flow.port, flow.vip_port);
    let choice = |backend| Choice { vip, backend, hash };
    if flow.stage == Stage::Opens {
        maps::count(Event::Syn);
    } else if let Some(pick) = F::flow(flow.client, flow.port, vip.number) {
        // A connection stays until its backend is gone; datagrams have no end to wait for.
        if let Some(backend) = alive(pick, flow.stage == Stage::Datagram) {
            return Ok(choice(backend));
        }
        maps::count(Event::BackendGone);
    } else if flow.stage == Stage::Goes {
        maps::count(Event::Miss);
    }

    let known = if affinity {
        F::flow(flow.client, [0; 2], vip.number).and_then(|pick| Some((pick, alive(pick, true)?)))
    } else {
        None
    };
    let (pick, backend) = match known {
        Some(known) => known,
        None => from_ring(vip, hash)?,
    };
    if flow.stage != Stage::About {
        maps::count_flow(vip.number);
        if maps::admits(config) {
            F::remember(flow.client, flow.port, vip.number, pick);
            if affinity {
                F::remember(flow.client, [0; 2], vip.number, pick);
            }
        }
    }
    Ok(choice(backend))
}

/// Of a flow: which slot of the ring is its.
#[inline(always)]
pub(crate) fn hash<F: Family>(vip: &Vip, client: F::Address, port: Port, vip_port: Port) -> u32 {
    let affinity = vip.flags & Vip::AFFINITY != 0;
    family::hash::<F>(client, if affinity { [0; 2] } else { port }, vip_port)
}

#[inline(always)]
fn from_ring(vip: &Vip, hash: u32) -> Result<(Pick, *mut Backend), DropReason> {
    let number = maps::at_slot(vip.service, maps::slot(hash));
    let backend = maps::backend(number).ok_or(DropReason::NoBackend)?;
    // SAFETY: the entry of an array, which is there for ever. User space writes a backend before rings name it.
    let (flags, generation) = unsafe { ((*backend).flags, (*backend).generation) };
    if number == 0 || flags & Backend::USED == 0 {
        maps::count_unserved(vip.number);
        return Err(DropReason::NoBackend);
    }
    let pick = Pick {
        backend: number,
        generation,
    };
    Ok((pick, backend))
}

/// The backend, if it is still the one that was picked, and takes new flows where that is asked for.
#[inline(always)]
fn alive(pick: Pick, for_new: bool) -> Option<*mut Backend> {
    let backend = maps::backend(pick.backend)?;
    // SAFETY: as above.
    let (flags, generation) = unsafe { ((*backend).flags, (*backend).generation) };
    let well = generation == pick.generation
        && flags & Backend::USED != 0
        && !(for_new && flags & Backend::DRAINING != 0);
    well.then_some(backend)
}
