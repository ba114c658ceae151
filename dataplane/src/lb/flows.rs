//! The flows that the load balancer's programs have translated.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV4},
    path::Path,
};

use aya::maps::{HashMap, Map, MapData, MapError};
use flynn_abi::{
    Ipv6,
    lb::{Translation, TranslationKey},
};

use rustix::time::{ClockId, clock_gettime};

use super::{Vip, tables::protocol};
use crate::{
    error::{Error, Refusal, Result},
    pins::Pins,
};

/// A flow that a container of this host serves, or served of late: datagrams are silent for a minute before it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Whose it is.
    pub client: SocketAddr,
    /// What the client sends to.
    pub vip: Vip,
    /// Who answers: by IPv6 at the address beside this one.
    pub backend: SocketAddrV4,
    /// The client as the backend sees it: by another port where two VIPs would share one.
    pub seen: SocketAddr,
}

/// So many of the flows of the load balancer pinned below `pins`, in no order; none where there is no load balancer.
pub fn flows(pins: &Path, most: usize) -> Result<Vec<Flow>> {
    let pins = Pins::open(pins)?;
    let read = || -> Result<_, Refusal> {
        let path = pins.maps().join("lb_established");
        if !path.try_exists()? {
            return Ok(Vec::new());
        }
        let map = Map::LruHashMap(MapData::from_pin(path)?);
        let established: HashMap<MapData, TranslationKey, Translation> = map.try_into()?;
        let mut flows = Vec::new();
        for entry in &established {
            match entry {
                Ok((key, value)) if value.is_over(key.protocol, now()) => {}
                Ok((key, value)) => flows.push(flow(&key, &value)),
                // It went while it was read.
                Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error.into()),
            }
            if flows.len() >= most {
                break;
            }
        }
        Ok(flows)
    };
    read().map_err(Error::kernel("reading the load balancer's flows"))
}

/// The programs' clock: in units of 2^30 ns.
fn now() -> u32 {
    let time = clock_gettime(ClockId::Monotonic);
    let nanoseconds = i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec);
    // The lower bits, as the programs have them.
    u32::try_from((nanoseconds >> 30) & i128::from(u32::MAX)).unwrap_or_default()
}

fn flow(key: &TranslationKey, value: &Translation) -> Flow {
    let address = |wide: Ipv6| {
        if key.version == 4 {
            IpAddr::V4(wide.last().into())
        } else {
            IpAddr::V6(wide.into())
        }
    };
    let client = address(key.client);
    Flow {
        client: (client, u16::from_be_bytes(value.client_port)).into(),
        vip: Vip {
            address: address(value.vip),
            port: u16::from_be_bytes(value.port),
            protocol: protocol(key.protocol),
        },
        backend: SocketAddrV4::new(key.container.into(), u16::from_be_bytes(key.port)),
        seen: (client, u16::from_be_bytes(key.client_port)).into(),
    }
}
