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

use super::{Vip, tables::protocol};
use crate::{
    error::{Error, Refusal, Result},
    pins::Pins,
};

/// A flow that a container of this host serves, or served of late: nobody says when one is over.
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
