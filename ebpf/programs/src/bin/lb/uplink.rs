//! A packet that came by the uplink, as the network stack sees it first.

use aya_ebpf::{bindings::TC_ACT_UNSPEC, programs::TcContext};
use flynn_abi::{
    DropReason, Endpoint, Host, Ipv4,
    lb::{Backend, Config, Event, Tunnelled, Vip},
};
use flynn_programs::Decision;

use crate::{
    context::{self, Context},
    deliver,
    family::{Family, V4, V6},
    headers::{ETHERNET, Ethernet, Ip4},
    maps, neighbour,
    select::{self, Choice},
    tunnel,
};

#[inline(always)]
pub(crate) fn decide(ctx: &TcContext) -> Decision {
    let config = maps::config()?;
    // SAFETY: the kernel hands programs a valid context.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return Ok(TC_ACT_UNSPEC);
    }
    context::gather(ctx);
    match select::kind(ctx, config) {
        Ethernet::IPV4 if tunnel::is_tunnelled(ctx) => tunnel::receive(ctx, config, false),
        Ethernet::IPV4 => forward::<V4>(ctx, config),
        Ethernet::IPV6 => forward::<V6>(ctx, config),
        _ => Ok(TC_ACT_UNSPEC),
    }
}

/// A packet that another host sent encrypted, decrypted.
#[inline(always)]
pub(crate) fn decide_encrypted(ctx: &TcContext) -> Decision {
    let config = maps::config()?;
    flynn_programs::packet::with_ethernet(ctx)?;
    context::gather(ctx);
    if tunnel::is_tunnelled(ctx) {
        tunnel::receive(ctx, config, true)
    } else {
        Ok(TC_ACT_UNSPEC)
    }
}

#[inline(always)]
fn forward<F: Family>(ctx: &TcContext, config: &Config) -> Decision {
    let Some(choice) = select::select::<F, _>(ctx, config)? else {
        return Ok(TC_ACT_UNSPEC);
    };
    let Choice { vip, backend, hash } = choice;
    // SAFETY: the entry of an array, which is there for ever.
    let Backend { address, port, .. } = unsafe { *backend };
    maps::count_traffic(vip.number, ctx.length());
    let tunnelled = Tunnelled {
        kind: Tunnelled::FORWARD,
        flags: (vip.flags & Vip::FIRST_HOST) as u8,
        port,
        address,
    };
    let endpoint = flynn_programs::maps::endpoint4(address);
    if endpoint.is_some_and(|endpoint| endpoint.flags & Endpoint::CONTAINER != 0) {
        return deliver::deliver::<F>(ctx, tunnelled, config);
    }
    let host = host_of(address).ok_or(DropReason::NoRoute)?;
    // IPv6 packets have no neighbour's address: the underlay is IPv4.
    if F::VERSION == 4 && host.flags & Host::DIRECT != 0 && vip.flags & Vip::FIRST_HOST == 0 {
        return pass_on(ctx, host);
    }
    tunnel::send::<F>(ctx, host, hash, tunnelled, config)
}

/// The host whose subnet the address is in.
#[inline(always)]
pub(crate) fn host_of(address: Ipv4) -> Option<&'static Host> {
    let network = flynn_programs::maps::config().ok()?;
    let mask = u32::from_ne_bytes(network.subnet_mask4.octets());
    let subnet = u32::from_ne_bytes(address.octets()) & mask;
    flynn_programs::maps::host4(Ipv4::new(subnet.to_ne_bytes()))
}

/// Gives the packet as it is to a host on the same link, which has the same tables and so finds the same backend. While
/// tables change, two hosts may not agree for a moment: the packet's lifetime bounds how often it goes to and fro.
#[inline(always)]
fn pass_on(ctx: &TcContext, host: &Host) -> Decision {
    let failed = |_| DropReason::RewriteFailed;
    let header = ctx.at::<Ip4>(ETHERNET).ok_or(DropReason::Truncated)?;
    let (lifetime, protocol) = (header.time_to_live, header.protocol);
    if lifetime <= 1 || host.ifindex == 0 {
        return Err(DropReason::NoRoute);
    }
    let word = |lifetime: u8| u64::from(u16::from_ne_bytes([lifetime, protocol]));
    ctx.l3_csum_replace(ETHERNET + 10, word(lifetime), word(lifetime - 1), 2)
        .map_err(failed)?;
    ctx.store(ETHERNET + 8, &(lifetime - 1), 0).map_err(failed)?;
    maps::count(Event::Direct);
    Ok(neighbour::send(host.ifindex, host.next_hop))
}
