//! A packet that came through the tunnel and that the VXLAN device took out of it: one that came in pieces or is to be
//! cut, or any where the uplink has no program. What was taken out at the uplink and is for this host itself comes in here
//! as well.

use aya_ebpf::{
    bindings::{TC_ACT_OK, bpf_tunnel_key},
    helpers::bpf_skb_get_tunnel_key,
    programs::TcContext,
};
use flynn_abi::{DropReason, Endpoint, Ipv4, Peer};

use crate::{
    Decision, maps,
    packet::{self, Header, Ipv4Header, Ipv6Header, Protocol},
    policy::{Packet, Sender},
    rate, route, tunnel,
};

const PACKET_HOST: u32 = 0;

#[inline(always)]
pub(crate) fn decide(ctx: &TcContext) -> Decision {
    // SAFETY: the kernel hands programs a valid context. Only programs of this host can have marked it.
    let mark = unsafe { (*ctx.skb.skb).mark };
    if mark == tunnel::TAKEN_OUT {
        ctx.set_mark(0);
        return Ok(TC_ACT_OK);
    }
    // SAFETY: integers, for which zeros are values.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    let size = size_of::<bpf_tunnel_key>() as u32;
    // SAFETY: the kernel hands programs a valid context, and the key is as large as it is said to be.
    if unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &raw mut key, size, 0) } != 0 {
        return Err(DropReason::UnknownHost);
    }
    // SAFETY: the part of the union that the helper fills for IPv4; for IPv6 it is a part of the address.
    let from = unsafe { key.__bindgen_anon_1.remote_ipv4 };
    let peer = maps::peer(Ipv4::new(from.to_be_bytes())).ok_or(DropReason::UnknownHost)?;
    if mark == tunnel::DECRYPTED {
        ctx.set_mark(0);
    } else if peer.flags & Peer::ENCRYPTED != 0 {
        return Err(DropReason::NotEncrypted);
    }
    let sender = Sender::remote(key.tunnel_id);
    match packet::protocol(ctx)? {
        Protocol::Ipv4 => forward::<Ipv4Header>(ctx, peer, sender),
        Protocol::Ipv6 => forward::<Ipv6Header>(ctx, peer, sender),
    }
}

#[inline(always)]
fn forward<H: Header>(ctx: &TcContext, peer: &Peer, sender: Sender) -> Decision {
    let config = maps::config()?;
    let ip = &packet::frame::<H>(ctx)?.ip;
    let subnet = packet::masked(H::ipv4(ip.source()), config.subnet_mask4);
    if subnet != u32::from_ne_bytes(peer.subnet.octets()) {
        return Err(DropReason::ForeignSubnet);
    }
    let packet = Packet {
        ctx,
        ip,
        at: packet::IP,
    };
    // The Ethernet address in the tunnel is nobody's.
    let take = || {
        ctx.change_type(PACKET_HOST)
            .map_err(|_| DropReason::RewriteFailed)
    };
    match H::endpoint(ip.destination()) {
        Some(receiver) if receiver.flags & Endpoint::CONTAINER != 0 => {
            packet.to_container(sender, receiver, config)?;
            rate::limit_received(ctx, receiver)?;
            take()?;
            route::hand_over::<H>(ctx, receiver)
        }
        Some(receiver) if receiver.flags & Endpoint::GATEWAY != 0 => {
            packet.to_host(sender, config)?;
            take()?;
            Ok(TC_ACT_OK)
        }
        _ => Err(DropReason::NoEndpoint),
    }
}
