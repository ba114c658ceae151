//! The maps, with the host's own types in front of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};
use flynn_abi::{
    Config, ContainerDrop, Counters, DropReason, Endpoint, FLOATING, Ipv4, Ipv6, MAX_ENDPOINTS,
    MAX_HOST_ADDRESSES, MAX_HOSTS, MAX_IDENTITIES, MAX_LOCAL_ENDPOINTS, MAX_OPEN_PORTS, MAX_PAIRS, Mac,
    OpenPort, Pair, Peer, policy::Identity,
};

use crate::{
    Attachment, Container, Drops, Host, Network, Policy, Traffic,
    error::{Error, Refusal, Result},
    mirror::Mirror,
};

pub(crate) struct Maps {
    config: Array<MapData, Config>,
    endpoints4: Mirror<Ipv4, Endpoint>,
    endpoints6: Mirror<Ipv6, Endpoint>,
    local: Array<MapData, Endpoint>,
    hosts4: Mirror<Ipv4, flynn_abi::Host>,
    peers: Mirror<Ipv4, Peer>,
    host_addresses: Mirror<Ipv6, u32>,
    identities: Mirror<Identity, u32>,
    pairs: Mirror<Pair, u32>,
    open_ports: Mirror<OpenPort, u32>,
    limits: Array<MapData, flynn_abi::Limits>,
    counters: PerCpuArray<MapData, Counters>,
    drops: PerCpuArray<MapData, u64>,
    /// The slot of the container behind each interface.
    veths: Mirror<u32, u32>,
    container_drops: PerCpuHashMap<MapData, ContainerDrop, u64>,
    /// The slots of `counters` that are taken.
    slots: BTreeSet<u32>,
}

impl Maps {
    pub(crate) fn take(object: &mut Ebpf) -> Result<Self> {
        let mut maps = Self {
            config: take(object, "config")?,
            endpoints4: Mirror::take(object, "endpoints4")?,
            endpoints6: Mirror::take(object, "endpoints6")?,
            local: take(object, "local")?,
            hosts4: Mirror::take(object, "hosts4")?,
            peers: Mirror::take(object, "peers")?,
            host_addresses: Mirror::take(object, "host_addresses")?,
            identities: Mirror::take(object, "identities")?,
            pairs: Mirror::take(object, "pairs")?,
            open_ports: Mirror::take(object, "open_ports")?,
            limits: take(object, "limits")?,
            counters: take(object, "counters")?,
            drops: take(object, "drops")?,
            veths: Mirror::take(object, "veths")?,
            container_drops: take(object, "container_drops")?,
            slots: BTreeSet::new(),
        };
        maps.index()?;
        Ok(maps)
    }

    /// What follows from the endpoints: an older build may not have known of it, and a killed one not have written it.
    fn index(&mut self) -> Result<()> {
        let local = self.local();
        let veths: HashMap<u32, u32> = local
            .map(|(_, endpoint)| (endpoint.ifindex, endpoint.slot))
            .collect();
        self.slots = veths.values().copied().collect();
        self.veths.set(&veths)?;
        let drops = self.container_drops.keys().collect::<Result<Vec<_>, _>>();
        let drops =
            drops.map_err(|error| Error::kernel("reading the eBPF map container_drops")(error.into()))?;
        let gone = drops.iter().filter(|drop| !self.slots.contains(&drop.slot));
        let gone: Vec<_> = gone.copied().collect();
        gone.into_iter().try_for_each(|drop| self.forget_drop(drop))
    }

    fn forget_drop(&mut self, drop: ContainerDrop) -> Result<()> {
        match self.container_drops.remove(&drop) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::kernel("removing from the eBPF map container_drops")(
                error.into(),
            )),
        }
    }

    pub(crate) fn configure(&mut self, network: &Network) -> Result<()> {
        let gateway = Endpoint {
            ifindex: network.device.unwrap_or(0),
            flags: Endpoint::GATEWAY,
            identity: flynn_abi::policy::HOST,
            ..Endpoint::default()
        };
        let gateway4 = Ipv4::from(network.gateway4);
        let gateway6 = network.gateway6.map(Ipv6::from);
        self.endpoints4.put(gateway4, gateway)?;
        if let Some(gateway6) = gateway6 {
            self.endpoints6.put(gateway6, gateway)?;
        }
        let is_old = |endpoint: &Endpoint| endpoint.flags & Endpoint::GATEWAY != 0;
        self.endpoints4
            .remove_unless(|key, endpoint| !is_old(endpoint) || *key == gateway4)?;
        self.endpoints6
            .remove_unless(|key, endpoint| !is_old(endpoint) || Some(*key) == gateway6)?;
        let policy = self.config()?.flags & (Config::ISOLATION | Config::HOST_PORTS);
        let mut config = network.config();
        config.flags |= policy;
        let before = self.config()?;
        if (before.subnet4, before.subnet_mask4) != (config.subnet4, config.subnet_mask4) {
            // Places mean other addresses: first nobody looks at them, and then they change.
            let subnet_mask4 = Ipv4::default();
            self.set_config(Config {
                subnet_mask4,
                ..config
            })?;
            self.place_all(config)?;
        }
        self.set_config(config)?;
        self.place(gateway4, gateway)
    }

    /// Writes the map `local` anew.
    fn place_all(&mut self, config: Config) -> Result<()> {
        for place in 0..MAX_LOCAL_ENDPOINTS {
            self.write_place(place, Endpoint::default())?;
        }
        let is_remote = |endpoint: &Endpoint| endpoint.flags & Endpoint::REMOTE != 0;
        let endpoints = self
            .endpoints4
            .iter()
            .filter(|(_, endpoint)| !is_remote(endpoint));
        let endpoints: Vec<_> = endpoints.map(|(&key, &endpoint)| (key, endpoint)).collect();
        for (address, endpoint) in endpoints {
            if let Some(place) = place(config, address) {
                self.write_place(place, endpoint)?;
            }
        }
        Ok(())
    }

    /// Writes an endpoint of this host to the map `local`, or that there is none.
    fn place(&mut self, address: Ipv4, endpoint: Endpoint) -> Result<()> {
        match place(self.config()?, address) {
            Some(place) => self.write_place(place, endpoint),
            None => Ok(()),
        }
    }

    fn write_place(&mut self, place: u32, endpoint: Endpoint) -> Result<()> {
        let written = self.local.set(place, endpoint, 0);
        written.map_err(|error| Error::kernel("writing to the eBPF map local")(error.into()))
    }

    pub(crate) fn set_hosts(&mut self, hosts: &[Host]) -> Result<()> {
        let peers = hosts.iter().map(|host| (host.address.into(), host.peer()));
        let hosts = hosts.iter().map(|host| (host.subnet.into(), host.entry()));
        // Who may send before who is sent to, so that none of the answers comes from a stranger.
        self.peers.set(&peers.collect())?;
        self.hosts4.set(&hosts.collect())
    }

    pub(crate) fn hosts(&self) -> Vec<Host> {
        let hosts = self.hosts4.iter();
        hosts
            .map(|(subnet, entry)| Host::of((*subnet).into(), entry, self.peers.get(&entry.address)))
            .collect()
    }

    pub(crate) fn fill(&self) -> Vec<(&'static str, u64, u64)> {
        let slots = ("counters", self.slots.len() as u64, MAX_LOCAL_ENDPOINTS.into());
        vec![
            self.endpoints4.fill(MAX_ENDPOINTS),
            self.endpoints6.fill(MAX_ENDPOINTS),
            self.hosts4.fill(MAX_HOSTS),
            self.peers.fill(MAX_HOSTS),
            self.host_addresses.fill(MAX_HOST_ADDRESSES),
            self.identities.fill(MAX_IDENTITIES),
            self.pairs.fill(MAX_PAIRS),
            self.open_ports.fill(MAX_OPEN_PORTS),
            slots,
        ]
    }

    pub(crate) fn set_host_addresses(
        &mut self,
        addresses: &BTreeSet<Ipv6Addr>,
        floating: Option<&BTreeSet<Ipv6Addr>>,
    ) -> Result<()> {
        const OWN: u32 = 1;
        let own = addresses.iter().map(|&address| (address.into(), OWN));
        let mut wanted: HashMap<Ipv6, u32> = own.collect();
        if let Some(floating) = floating {
            wanted.extend(floating.iter().map(|&address| (address.into(), OWN | FLOATING)));
        } else {
            let known = self.host_addresses.iter();
            wanted.extend(known.filter(|(_, flags)| **flags & FLOATING != 0));
        }
        self.host_addresses.set(&wanted)
    }

    pub(crate) fn set_remote(&mut self, remote: &[(Ipv4Addr, Option<Ipv6Addr>, Identity)]) -> Result<()> {
        let entry = |identity| Endpoint {
            flags: Endpoint::REMOTE,
            identity,
            ..Endpoint::default()
        };
        let four = remote
            .iter()
            .map(|&(ipv4, _, identity)| (ipv4.into(), entry(identity)));
        let six = remote
            .iter()
            .filter_map(|&(_, ipv6, identity)| Some((ipv6?.into(), entry(identity))));
        set_remote(&mut self.endpoints4, four.collect())?;
        set_remote(&mut self.endpoints6, six.collect())
    }

    pub(crate) fn set_policy(&mut self, policy: &Policy) -> Result<()> {
        let mut ports: HashMap<OpenPort, u32> = HashMap::new();
        for port in policy.host_ports.iter().flatten() {
            ports.insert(port.of(OpenPort::HOSTS), 1);
        }
        let pairs = policy.pairs();
        // What allows comes before what forbids, and goes after it.
        self.pairs.put_all(&pairs)?;
        self.open_ports.put_all(&ports)?;
        self.identities.set(&policy.identities())?;
        let mut config = self.config()?;
        config.flags &= !(Config::ISOLATION | Config::HOST_PORTS);
        if policy.isolates() {
            config.flags |= Config::ISOLATION;
        }
        if policy.host_ports.is_some() {
            config.flags |= Config::HOST_PORTS;
        }
        self.set_config(config)?;
        self.pairs.remove_unless(|key, _| pairs.contains_key(key))?;
        self.open_ports
            .remove_unless(|key, _| key.slot != OpenPort::HOSTS || ports.contains_key(key))
    }

    pub(crate) fn add(&mut self, container: &Container, attachment: &Attachment) -> Result<()> {
        let key = Ipv4::from(container.ipv4);
        let before = self.endpoints4.get(&key).copied().filter(is_local);
        let slot = match before {
            Some(endpoint) => endpoint.slot,
            None => self.free_slot()?,
        };
        let mut flags = Endpoint::CONTAINER;
        if attachment.system {
            flags |= Endpoint::SYSTEM;
        }
        if !attachment.limits.is_none() {
            flags |= Endpoint::LIMITED;
        }
        let endpoint = Endpoint {
            ifindex: container.ifindex,
            slot,
            mac: Mac::new(container.mac),
            flags,
            identity: attachment.identity,
            translates: match before {
                Some(_) => self.translates(key, container.ipv6)?,
                None => 0,
            },
            ..Endpoint::default()
        };
        self.prepare_slot(slot, before.is_none(), attachment)
            .map_err(Error::kernel(format!("adding the endpoint {}", container.ipv4)))?;
        let ports = attachment.open_ports.iter().map(|port| (port.of(slot), 1));
        let ports: HashMap<OpenPort, u32> = ports.collect();
        self.open_ports.put_all(&ports)?;
        // IPv4 last: an entry that only has its IPv6 half is not listed and its slot is given again.
        if let Some(ipv6) = container.ipv6 {
            self.endpoints6.put(ipv6.into(), endpoint)?;
        }
        self.endpoints4.put(key, endpoint)?;
        self.place(key, endpoint)?;
        if let Some(before) = before.filter(|before| before.ifindex != container.ifindex) {
            self.veths.remove(&before.ifindex)?;
        }
        self.veths.put(container.ifindex, slot)?;
        self.slots.insert(slot);
        self.open_ports
            .remove_unless(|key, _| key.slot != slot || ports.contains_key(key))
    }

    /// What programs have noted of a container, wherever they may have found it.
    fn translates(&self, address: Ipv4, ipv6: Option<Ipv6Addr>) -> Result<u32> {
        let local = match place(self.config()?, address) {
            Some(place) => self.local.get(&place, 0).map(Some),
            None => Ok(None),
        };
        let local = local.map_err(|error| Error::kernel("reading the eBPF map local")(error.into()))?;
        let four = self.endpoints4.read(&address)?;
        let six = match ipv6 {
            Some(ipv6) => self.endpoints6.read(&ipv6.into())?,
            None => None,
        };
        let all = [local, four, six].into_iter().flatten();
        Ok(all.map(|endpoint| endpoint.translates).max().unwrap_or_default())
    }

    fn prepare_slot(&mut self, slot: u32, is_new: bool, attachment: &Attachment) -> Result<(), Refusal> {
        if is_new {
            let zeros = vec![Counters::default(); nr_cpus().map_err(|(_, error)| error)?];
            self.counters.set(slot, PerCpuValues::try_from(zeros)?, 0)?;
        }
        // Where nothing changes, nobody's account is cleared.
        let wanted = attachment.limits.entry();
        let mut present = self.limits.get(&slot, 0)?;
        (present.sent.due, present.received.due) = (0, 0);
        if is_new || present != wanted {
            self.limits.set(slot, wanted, 0)?;
        }
        Ok(())
    }

    pub(crate) fn remove(&mut self, ipv4: Ipv4Addr, ipv6: Option<Ipv6Addr>) -> Result<bool> {
        if let Some(ipv6) = ipv6 {
            self.endpoints6.remove(&ipv6.into())?;
        }
        let key = Ipv4::from(ipv4);
        let Some(endpoint) = self.endpoints4.get(&key).copied().filter(is_local) else {
            return Ok(false);
        };
        self.place(key, Endpoint::default())?;
        self.endpoints4.remove(&key)?;
        self.veths.remove(&endpoint.ifindex)?;
        self.open_ports
            .remove_unless(|port, _| port.slot != endpoint.slot)?;
        for reason in DropReason::ALL {
            for side in [ContainerDrop::SENT, ContainerDrop::FOR_IT] {
                self.forget_drop(container_drop(endpoint.slot, *reason, side))?;
            }
        }
        self.slots.remove(&endpoint.slot);
        Ok(true)
    }

    /// The packets that were dropped of each container of this host.
    pub(crate) fn container_drops(&self) -> Result<BTreeMap<Ipv4Addr, Drops>> {
        let read = || -> Result<HashMap<_, _>, Refusal> {
            let counts = self.container_drops.iter();
            let counts = counts.map(|entry| entry.map(|(drop, cpus)| (drop, cpus.iter().sum::<u64>())));
            Ok(counts.collect::<Result<_, _>>()?)
        };
        let counts = read().map_err(Error::kernel("reading the eBPF map container_drops"))?;
        let of = |slot, side| {
            let counted = |&reason| Some((reason, *counts.get(&container_drop(slot, reason, side))?));
            DropReason::ALL.iter().filter_map(counted).collect()
        };
        let local = self.local();
        let drops = local.map(|(address, endpoint)| {
            let drops = Drops {
                sent: of(endpoint.slot, ContainerDrop::SENT),
                for_it: of(endpoint.slot, ContainerDrop::FOR_IT),
            };
            (address, drops)
        });
        Ok(drops.collect())
    }

    pub(crate) fn containers(&self) -> Result<Vec<(Container, Traffic)>> {
        let local6 = self.endpoints6.iter().filter(|(_, endpoint)| is_local(endpoint));
        let ipv6: BTreeMap<u32, Ipv6> = local6.map(|(key, endpoint)| (endpoint.slot, *key)).collect();
        let read = || -> Result<_, Refusal> {
            let mut containers = Vec::new();
            for (address, endpoint) in self.local() {
                let counters = self.counters.get(&endpoint.slot, 0)?;
                let container = Container {
                    ipv4: address,
                    ipv6: ipv6.get(&endpoint.slot).map(|&key| key.into()),
                    mac: endpoint.mac.octets(),
                    ifindex: endpoint.ifindex,
                };
                containers.push((container, counters.iter().fold(Counters::default(), sum)));
            }
            containers.sort_by_key(|(container, _)| container.ipv4);
            Ok(containers)
        };
        read().map_err(Error::kernel("reading the counters"))
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

    /// Puts the configuration of an older layout in place.
    pub(crate) fn carry_config(&mut self, config: Config) -> Result<()> {
        self.set_config(config)
    }

    fn config(&self) -> Result<Config> {
        let read = self.config.get(&0, 0);
        read.map_err(|error| Error::kernel("reading the programs' configuration")(error.into()))
    }

    fn set_config(&mut self, config: Config) -> Result<()> {
        let written = self.config.set(0, config, 0);
        written.map_err(|error| Error::kernel("writing the programs' configuration")(error.into()))
    }

    /// The containers of this host by address.
    fn local(&self) -> impl Iterator<Item = (Ipv4Addr, Endpoint)> {
        let local = self.endpoints4.iter().filter(|(_, endpoint)| is_local(endpoint));
        local.map(|(&key, &endpoint)| (key.into(), endpoint))
    }

    fn free_slot(&self) -> Result<u32> {
        (0..MAX_LOCAL_ENDPOINTS)
            .find(|slot| !self.slots.contains(slot))
            .ok_or(Error::Full(MAX_LOCAL_ENDPOINTS))
    }
}

/// Where in the map `local` an address is, if it is in this host's subnet.
fn place(config: Config, address: Ipv4) -> Option<u32> {
    let number = |address: Ipv4| u32::from(Ipv4Addr::from(address));
    let (mask, address) = (number(config.subnet_mask4), number(address));
    let place = (mask != 0 && address & mask == number(config.subnet4)).then_some(address & !mask);
    place.filter(|&place| place < MAX_LOCAL_ENDPOINTS)
}

fn container_drop(slot: u32, reason: DropReason, side: u16) -> ContainerDrop {
    let reason = reason as u16;
    ContainerDrop { slot, reason, side }
}

fn is_local(endpoint: &Endpoint) -> bool {
    endpoint.flags & Endpoint::CONTAINER != 0
}

/// Replaces the endpoints of other hosts. Where one of this host has the address, that stays.
fn set_remote<K>(endpoints: &mut Mirror<K, Endpoint>, mut wanted: HashMap<K, Endpoint>) -> Result<()>
where
    K: Pod + Eq + std::hash::Hash,
{
    let is_remote = |endpoint: &Endpoint| endpoint.flags & Endpoint::REMOTE != 0;
    wanted.retain(|key, _| endpoints.get(key).is_none_or(is_remote));
    endpoints.put_all(&wanted)?;
    endpoints.remove_unless(|key, endpoint| !is_remote(endpoint) || wanted.contains_key(key))
}

fn sum(all: Counters, cpu: &Counters) -> Counters {
    Counters {
        sent_packets: all.sent_packets + cpu.sent_packets,
        sent_bytes: all.sent_bytes + cpu.sent_bytes,
        received_packets: all.received_packets + cpu.received_packets,
        received_bytes: all.received_bytes + cpu.received_bytes,
    }
}

pub(crate) fn take<M>(object: &mut Ebpf, name: &str) -> Result<M>
where
    M: TryFrom<Map, Error = MapError>,
{
    #[derive(Debug, thiserror::Error)]
    #[error("the object has no such map")]
    struct Missing;
    let mut take = || -> Result<M, Refusal> { Ok(M::try_from(object.take_map(name).ok_or(Missing)?)?) };
    take().map_err(Error::kernel(format!("taking the eBPF map {name}")))
}
