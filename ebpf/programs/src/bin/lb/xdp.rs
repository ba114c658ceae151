//! A packet as early as it can be seen: what goes to another host goes there at once, everything else takes its way
//! through the network stack, where `lb_uplink` waits.

use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_fib_lookup as Route, xdp_action},
    helpers::{bpf_fib_lookup, bpf_xdp_adjust_head},
    programs::XdpContext,
};
use flynn_abi::{
    DropReason, Endpoint, Host, Ipv4,
    lb::{Backend, Config, Event, Tunnelled, Vip},
};

use crate::{
    context::Context,
    family::{Family, V4, V6},
    headers::{ETHERNET, Ethernet, OVERHEAD, Outer},
    maps,
    select::{self, Choice},
    tunnel, uplink,
};

const AF_INET: u8 = 2;

type Action = Result<u32, DropReason>;

#[inline(always)]
pub(crate) fn decide(ctx: &XdpContext) -> Action {
    let config = maps::config()?;
    match select::kind(ctx, config) {
        Ethernet::IPV4 => forward::<V4>(ctx, config),
        Ethernet::IPV6 => forward::<V6>(ctx, config),
        _ => Ok(xdp_action::XDP_PASS),
    }
}

#[inline(always)]
fn forward<F: Family>(ctx: &XdpContext, config: &Config) -> Action {
    let Some(choice) = select::select::<F, _>(ctx, config)? else {
        return Ok(xdp_action::XDP_PASS);
    };
    let Choice { vip, backend, hash } = choice;
    // SAFETY: the entry of an array, which is there for ever. The programs write what they look up in words; of two
    // that do so at once, both write the same.
    let backend = unsafe { &mut *backend };
    let now = maps::now() | 1;
    if backend.looked_up != now {
        // Once in a while a packet takes the slow way, on which the kernel makes sure of the neighbour.
        look_up(ctx, backend);
        backend.looked_up = now;
        return Ok(xdp_action::XDP_PASS);
    }
    let length = ctx.length();
    if backend.host == 0 || length as usize + OVERHEAD > config.mtu as usize + ETHERNET {
        return Ok(xdp_action::XDP_PASS);
    }
    let tunnelled = Tunnelled {
        kind: Tunnelled::FORWARD,
        flags: (vip.flags & Vip::FIRST_HOST) as u8,
        port: backend.port,
        address: backend.address,
    };
    let source = Ipv4::new(backend.source.to_ne_bytes());
    let destination = Ipv4::new(backend.host.to_ne_bytes());
    let outer = tunnel::outer(source, destination, length, hash, tunnelled);
    let ethernet = Ethernet {
        to: first_six(backend.to),
        from: first_six(backend.from),
        kind: Ethernet::IPV4,
    };
    // SAFETY: the helper takes the context that the program was given.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(OVERHEAD as i32)) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    write(ctx, 0, ethernet)?;
    write::<Outer>(ctx, ETHERNET, outer)?;
    maps::count_traffic(vip.number, length);
    maps::count(Event::Encapsulated);
    Ok(xdp_action::XDP_TX)
}

#[inline(always)]
fn first_six(number: u64) -> [u8; 6] {
    let [a, b, c, d, e, f, ..] = number.to_ne_bytes();
    [a, b, c, d, e, f]
}

/// Finds the way to the backend's host, if it leads back out of the interface that the packet came by.
#[inline(always)]
fn look_up(ctx: &XdpContext, backend: &mut Backend) {
    backend.host = 0;
    let local = flynn_programs::maps::endpoint4(backend.address);
    if local.is_some_and(|endpoint| endpoint.flags & Endpoint::CONTAINER != 0) {
        return;
    }
    let Some(host) = uplink::host_of(backend.address) else {
        return;
    };
    // Without a tunnel, or by a device that XDP has no way to.
    if host.flags & (Host::DIRECT | Host::ENCRYPTED) != 0 {
        return;
    }
    let ifindex = ctx.ingress_ifindex() as u32;
    // SAFETY: it is integers, of which all zeros are a value.
    let mut route: Route = unsafe { core::mem::zeroed() };
    route.family = AF_INET;
    route.ifindex = ifindex;
    route.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(host.source.octets());
    route.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(host.address.octets());
    // SAFETY: the helper reads and writes the struct that it is given with its size.
    let found = unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut route, size_of::<Route>() as i32, 0) };
    if found != 0 || route.ifindex != ifindex {
        return;
    }
    let six = |[a, b, c, d, e, f]: [u8; 6]| u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]);
    backend.to = six(route.dmac);
    backend.from = six(route.smac);
    backend.source = u32::from_ne_bytes(host.source.octets());
    backend.host = u32::from_ne_bytes(host.address.octets());
}

#[inline(always)]
fn write<T>(ctx: &XdpContext, offset: usize, value: T) -> Result<(), DropReason> {
    const { assert!(align_of::<T>() == 1, "packets are not aligned") };
    let at = ctx.data() + offset;
    if at + size_of::<T>() > ctx.data_end() {
        return Err(DropReason::RewriteFailed);
    }
    // SAFETY: the kernel lends the bytes up to `data_end`, which were just seen to be enough, for writing as well.
    unsafe { (at as *mut T).write(value) };
    Ok(())
}
