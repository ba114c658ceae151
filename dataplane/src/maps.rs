//! The maps, with the host's own types in front of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use flynn_abi::{Config, Counters, DropReason, Endpoint, Ipv4, Ipv6, MAX_LOCAL_ENDPOINTS, Mac};

use crate::{
    Container, Network, Traffic,
    error::{Error, Refusal, Result},
};

pub(crate) struct Maps {
    config: Array<MapData, Config>,
    endpoints4: HashMap<MapData, Ipv4, Endpoint>,
    endpoints6: HashMap<MapData, Ipv6, Endpoint>,
    counters: PerCpuArray<MapData, Counters>,
    drops: PerCpuArray<MapData, u64>,
    /// The slots of `counters` that are taken.
    slots: BTreeSet<u32>,
}

impl Maps {
    pub(crate) fn take(object: &mut Ebpf) -> Result<Self> {
        let mut maps = Self {
            config: take(object, "config")?,
            endpoints4: take(object, "endpoints4")?,
            endpoints6: take(object, "endpoints6")?,
            counters: take(object, "counters")?,
            drops: take(object, "drops")?,
            slots: BTreeSet::new(),
        };
        maps.slots = maps.local()?.values().map(|endpoint| endpoint.slot).collect();
        Ok(maps)
    }

    pub(crate) fn configure(&mut self, network: &Network) -> Result<()> {
        let gateway = Endpoint {
            flags: Endpoint::GATEWAY,
            ..Endpoint::default()
        };
        let mut write = || -> Result<(), Refusal> {
            self.endpoints4.insert(Ipv4::from(network.gateway4), gateway, 0)?;
            if let Some(gateway6) = network.gateway6 {
                self.endpoints6.insert(Ipv6::from(gateway6), gateway, 0)?;
            }
            for old in keys(&self.endpoints4, Endpoint::GATEWAY)? {
                if old != Ipv4::from(network.gateway4) {
                    absent_is_fine(self.endpoints4.remove(&old))?;
                }
            }
            for old in keys(&self.endpoints6, Endpoint::GATEWAY)? {
                if Some(old) != network.gateway6.map(Ipv6::from) {
                    absent_is_fine(self.endpoints6.remove(&old))?;
                }
            }
            Ok(self.config.set(0, network.config(), 0)?)
        };
        write().map_err(Error::kernel("telling the eBPF programs of the cluster network"))
    }

    pub(crate) fn add(&mut self, container: &Container) -> Result<()> {
        let key = Ipv4::from(container.ipv4);
        let before = self.local_endpoint(key)?;
        let slot = match before {
            Some(endpoint) => endpoint.slot,
            None => self.free_slot()?,
        };
        let endpoint = Endpoint {
            ifindex: container.ifindex,
            slot,
            mac: Mac::new(container.mac),
            flags: Endpoint::CONTAINER,
            ..Endpoint::default()
        };
        let mut write = || -> Result<(), Refusal> {
            if before.is_none() {
                let zeros = vec![Counters::default(); nr_cpus().map_err(|(_, error)| error)?];
                self.counters.set(slot, PerCpuValues::try_from(zeros)?, 0)?;
            }
            // IPv4 last: an entry that only has its IPv6 half is not listed and its slot is given again.
            if let Some(ipv6) = container.ipv6 {
                self.endpoints6.insert(Ipv6::from(ipv6), endpoint, 0)?;
            }
            Ok(self.endpoints4.insert(key, endpoint, 0)?)
        };
        write().map_err(Error::kernel(format!("adding the endpoint {}", container.ipv4)))?;
        self.slots.insert(slot);
        Ok(())
    }

    pub(crate) fn remove(&mut self, ipv4: Ipv4Addr, ipv6: Option<Ipv6Addr>) -> Result<bool> {
        let key = Ipv4::from(ipv4);
        let endpoint = self.local_endpoint(key)?;
        let mut write = || -> Result<(), Refusal> {
            if let Some(ipv6) = ipv6 {
                absent_is_fine(self.endpoints6.remove(&Ipv6::from(ipv6)))?;
            }
            if endpoint.is_some() {
                absent_is_fine(self.endpoints4.remove(&key))?;
            }
            Ok(())
        };
        write().map_err(Error::kernel(format!("removing the endpoint {ipv4}")))?;
        if let Some(endpoint) = endpoint {
            self.slots.remove(&endpoint.slot);
        }
        Ok(endpoint.is_some())
    }

    pub(crate) fn containers(&self) -> Result<Vec<(Container, Traffic)>> {
        let read = || -> Result<_, Refusal> {
            let mut ipv6 = BTreeMap::new();
            for entry in &self.endpoints6 {
                let (key, endpoint) = entry?;
                if endpoint.flags & Endpoint::CONTAINER != 0 {
                    ipv6.insert(endpoint.slot, key.into());
                }
            }
            let mut containers = Vec::new();
            for (address, endpoint) in self.local()? {
                let traffic = self
                    .counters
                    .get(&endpoint.slot, 0)?
                    .iter()
                    .fold(Counters::default(), sum);
                let container = Container {
                    ipv4: address,
                    ipv6: ipv6.get(&endpoint.slot).copied(),
                    mac: endpoint.mac.octets(),
                    ifindex: endpoint.ifindex,
                };
                containers.push((container, traffic));
            }
            Ok(containers)
        };
        read().map_err(Error::kernel("reading the endpoints"))
    }

    pub(crate) fn drops(&self) -> Result<Vec<(DropReason, u64)>> {
        let read = || -> Result<_, Refusal> {
            DropReason::ALL
                .iter()
                .map(|&reason| Ok((reason, self.drops.get(&(reason as u32), 0)?.iter().sum())))
                .collect()
        };
        read().map_err(Error::kernel("reading the drop counters"))
    }

    /// The containers of this host by address.
    fn local(&self) -> Result<BTreeMap<Ipv4Addr, Endpoint>> {
        let read = || -> Result<_, Refusal> {
            let mut local = BTreeMap::new();
            for entry in &self.endpoints4 {
                let (key, endpoint) = entry?;
                if endpoint.flags & Endpoint::CONTAINER != 0 {
                    local.insert(key.into(), endpoint);
                }
            }
            Ok(local)
        };
        read().map_err(Error::kernel("reading the endpoints"))
    }

    fn local_endpoint(&self, key: Ipv4) -> Result<Option<Endpoint>> {
        match self.endpoints4.get(&key, 0) {
            Ok(endpoint) => Ok((endpoint.flags & Endpoint::CONTAINER != 0).then_some(endpoint)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(Error::kernel("reading an endpoint")(error.into())),
        }
    }

    fn free_slot(&self) -> Result<u32> {
        (0..MAX_LOCAL_ENDPOINTS)
            .find(|slot| !self.slots.contains(slot))
            .ok_or(Error::Full(MAX_LOCAL_ENDPOINTS))
    }
}

/// The addresses of the endpoints of a kind.
fn keys<K: Pod>(endpoints: &HashMap<MapData, K, Endpoint>, kind: u16) -> Result<Vec<K>, MapError> {
    let mut keys = Vec::new();
    for entry in endpoints {
        let (key, endpoint) = entry?;
        if endpoint.flags & kind != 0 {
            keys.push(key);
        }
    }
    Ok(keys)
}

fn absent_is_fine(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sum(all: Counters, cpu: &Counters) -> Counters {
    Counters {
        sent_packets: all.sent_packets + cpu.sent_packets,
        sent_bytes: all.sent_bytes + cpu.sent_bytes,
        received_packets: all.received_packets + cpu.received_packets,
        received_bytes: all.received_bytes + cpu.received_bytes,
    }
}

fn take<M>(object: &mut Ebpf, name: &str) -> Result<M>
where
    M: TryFrom<Map, Error = MapError>,
{
    #[derive(Debug, thiserror::Error)]
    #[error("the object has no such map")]
    struct Missing;
    let mut take = || -> Result<M, Refusal> { Ok(M::try_from(object.take_map(name).ok_or(Missing)?)?) };
    take().map_err(Error::kernel(format!("taking the eBPF map {name}")))
}
