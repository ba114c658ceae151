//! Flows that are translated packet by packet, and their end.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use aya::{
    Ebpf,
    maps::{HashMap, MapData},
};
use flynn_abi::{BackendKey, MAX_PACKET_PEERS, PacketFlow, PacketPeer};

use super::{Flow, backends::absent_is_fine};
use crate::{
    error::{Error, Refusal, Result},
    maps::take,
};

pub(super) struct Packets(HashMap<MapData, PacketPeer, PacketFlow>);

impl Packets {
    /// From the overlay's object, whose programs translate.
    pub(super) fn take(overlay: &mut Ebpf) -> Result<Self> {
        take(overlay, "service_packets").map(Self)
    }

    /// Forgets the flows which `is_gone` says to lead nowhere, and those to one of the `dead` addresses. How many those were.
    pub(super) fn sever(&mut self, is_gone: impl Fn(&Flow) -> bool, dead: &[SocketAddr]) -> Result<usize> {
        let leads_nowhere = |flow: &Flow| dead.contains(&flow.backend) || is_gone(flow);
        let mut sever = || -> Result<usize, Refusal> {
            // Programs go on writing meanwhile: a walk that is sent back to its beginning ends as well.
            let most = usize::try_from(2 * MAX_PACKET_PEERS)?;
            let gone: Vec<_> = self
                .0
                .iter()
                .take(most)
                .filter_map(Result::ok)
                .filter(|(peer, noted)| peer.way == PacketPeer::SEND && leads_nowhere(&flow(peer, noted)))
                .collect();
            for (peer, noted) in &gone {
                // The way out first: no packet finds half of a flow and takes it for none.
                absent_is_fine(self.0.remove(peer))?;
                let back = PacketPeer {
                    address: noted.address,
                    way: PacketPeer::RECEIVE,
                    ..*peer
                };
                absent_is_fine(self.0.remove(&back))?;
            }
            Ok(gone.len())
        };
        sever().map_err(Error::kernel("forgetting flows to instances that are gone"))
    }
}

fn flow(peer: &PacketPeer, noted: &PacketFlow) -> Flow {
    let backend = IpAddr::V6(Ipv6Addr::from(noted.address)).to_canonical();
    Flow {
        service: noted.place.service,
        leader: noted.place.index == BackendKey::LEADER,
        instance: noted.instance,
        backend: SocketAddr::new(backend, u16::from_be_bytes(peer.port)),
    }
}
