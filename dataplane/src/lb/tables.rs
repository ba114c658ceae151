//! The balancer's maps.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap as KernelMap, MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use flynn_abi::{
    Endpoint, Ipv4, Ipv6, Mac,
    lb::{
        self, CHUNK_SLOTS, Chunk, Config, Cpu, Event, Former, Formers, MAX_BACKENDS, MAX_SERVICES, MAX_VIPS,
        Port, RING_CHUNKS, RING_SLOTS, VipKey4, VipKey6, VipTraffic,
    },
};

use rustix::net::{AddressFamily, SocketType, netdevice::index_to_name, socket};

use super::{Backend, Service, Traffic, Uplink, Vip, maglev};
use crate::{
    Protocol,
    error::{Error, Refusal, Result},
    maps::take,
    mirror::Mirror,
};

/// One of the sizes above: all of them fit.
#[expect(clippy::cast_possible_truncation, reason = "a constant, looked at")]
const fn small(size: u32) -> u16 {
    assert!(size <= u16::MAX as u32);
    size as u16
}

type BackendKey = (Ipv4, Port);

pub(super) struct Tables {
    config: Array<MapData, Config>,
    vips4: Mirror<VipKey4, lb::Vip>,
    vips6: Mirror<VipKey6, lb::Vip>,
    rings: KernelMap<MapData, u32, Chunk>,
    formers: KernelMap<MapData, u32, Formers>,
    backends: Array<MapData, lb::Backend>,
    traffic: PerCpuArray<MapData, VipTraffic>,
    cpu: PerCpuArray<MapData, Cpu>,
    network: Array<MapData, flynn_abi::Config>,
    endpoints: KernelMap<MapData, Ipv4, Endpoint>,
    hosts: KernelMap<MapData, Ipv4, flynn_abi::Host>,
    host_addresses: KernelMap<MapData, Ipv6, u32>,
    /// What the backends' numbers mean.
    known: BTreeMap<u16, lb::Backend>,
    /// The rings as they were written; those of another process are not known.
    written: HashMap<u16, Vec<u16>>,
    /// The number after the one that was given out last: a number is not given out again soon.
    next: u16,
}

impl Tables {
    pub(super) fn take(object: &mut Ebpf) -> Result<Self> {
        let mut tables = Self {
            config: take(object, "lb_config")?,
            vips4: Mirror::take(object, "lb_vips4")?,
            vips6: Mirror::take(object, "lb_vips6")?,
            rings: take(object, "lb_rings")?,
            formers: take(object, "lb_formers")?,
            backends: take(object, "lb_backends")?,
            traffic: take(object, "lb_traffic")?,
            cpu: take(object, "lb_cpu")?,
            network: take(object, "config")?,
            endpoints: take(object, "endpoints4")?,
            hosts: take(object, "hosts4")?,
            host_addresses: take(object, "host_addresses")?,
            known: BTreeMap::new(),
            written: HashMap::new(),
            next: 1,
        };
        let mut read = || -> Result<(), Refusal> {
            for (number, backend) in (0..).zip(tables.backends.iter()) {
                let backend = backend?;
                if backend.flags & lb::Backend::USED != 0 {
                    tables.known.insert(number, backend);
                    tables.next = number.wrapping_add(1);
                }
            }
            Ok(())
        };
        read().map_err(Error::kernel("reading the load balancer's backends"))?;
        Ok(tables)
    }

    pub(super) fn configure(&mut self, uplink: &Uplink, flood: u32) -> Result<()> {
        let config = Config {
            uplink: uplink.index,
            mtu: uplink.mtu,
            flood,
            mac: Mac::new(uplink.mac),
            reserved: 0,
        };
        self.config
            .set(0, config, 0)
            .map_err(|error| Error::kernel("telling the load balancer of the uplink")(error.into()))
    }

    /// Has the maps hold these services and no others. What stays is there all the time; what a service loses is taken
    /// from it once nothing leads there any more.
    pub(super) fn set(&mut self, services: &[Service]) -> Result<()> {
        let numbers = self.service_numbers(services)?;
        let mut wanted = BTreeSet::new();
        for (service, number) in services.iter().zip(&numbers) {
            let members = self.put_backends(service, *number)?;
            self.put_ring(service, &members, *number)?;
            wanted.extend(members);
        }
        self.put_vips(services, &numbers)?;
        self.forget_rings(&numbers.into_iter().collect())?;
        let unwanted: Vec<u16> = self
            .known
            .keys()
            .filter(|n| !wanted.contains(n))
            .copied()
            .collect();
        for number in unwanted {
            let gone = lb::Backend {
                generation: self.known[&number].generation,
                ..lb::Backend::default()
            };
            self.write_backend(number, gone)?;
            self.known.remove(&number);
        }
        Ok(())
    }

    /// A service keeps the number that one of its VIPs has.
    fn service_numbers(&self, services: &[Service]) -> Result<Vec<u16>> {
        let mut taken = BTreeSet::new();
        let mut numbers: Vec<Option<u16>> = Vec::new();
        for service in services {
            let known = service
                .vips
                .iter()
                .find_map(|vip| self.vip(vip))
                .map(|vip| vip.service);
            numbers.push(known.filter(|number| taken.insert(*number)));
        }
        // Numbers that VIPs still have are free only once those are gone.
        let used = self.vips4.iter().map(|(_, vip)| vip.service);
        taken.extend(used.chain(self.vips6.iter().map(|(_, vip)| vip.service)));
        let full = || Error::TooMany {
            what: "services behind the load balancer",
            most: MAX_SERVICES,
        };
        let mut free = (0..small(MAX_SERVICES)).filter(|number| !taken.contains(number));
        let mut given = |number: Option<u16>| number.or_else(|| free.next()).ok_or_else(full);
        numbers.into_iter().map(&mut given).collect()
    }

    fn vip(&self, vip: &Vip) -> Option<lb::Vip> {
        match vip.key() {
            Key::V4(key) => self.vips4.get(&key).copied(),
            Key::V6(key) => self.vips6.get(&key).copied(),
        }
    }

    /// The numbers of the service's backends, in their order.
    fn put_backends(&mut self, service: &Service, number: u16) -> Result<Vec<u16>> {
        let mut there: HashMap<BackendKey, u16> = HashMap::new();
        for (id, backend) in &self.known {
            if backend.service == number {
                there.insert((backend.address, backend.port), *id);
            }
        }
        let mut members = Vec::new();
        for backend in &service.backends {
            let key = (Ipv4::from(backend.address), backend.port.to_be_bytes());
            let id = match there.get(&key) {
                Some(id) => *id,
                None => self.free_number()?,
            };
            let before = self.known.get(&id).copied();
            let wanted = lb::Backend {
                address: key.0,
                port: key.1,
                generation: match before {
                    Some(before) => before.generation,
                    None => self.generation(id)?.wrapping_add(1),
                },
                flags: lb::Backend::USED
                    | if backend.draining {
                        lb::Backend::DRAINING
                    } else {
                        0
                    },
                service: number,
                ..lb::Backend::default()
            };
            if before != Some(wanted) {
                self.write_backend(id, wanted)?;
                self.known.insert(id, wanted);
            }
            there.insert(key, id);
            members.push(id);
        }
        Ok(members)
    }

    fn put_ring(&mut self, service: &Service, members: &[u16], number: u16) -> Result<()> {
        let names: Vec<String> = service
            .backends
            .iter()
            .map(|backend| format!("{}:{}", backend.address, backend.port))
            .collect();
        let wanted: Vec<_> = service
            .backends
            .iter()
            .zip(&names)
            .map(|(backend, name)| maglev::Member {
                name: name.as_bytes(),
                weight: if backend.draining { 0 } else { backend.weight },
            })
            .collect();
        let ring: Vec<u16> = maglev::ring(&wanted)
            .into_iter()
            .map(|index| members[usize::from(index)])
            .collect();
        // What another process wrote is read once.
        let before = match self.written.remove(&number) {
            Some(before) => before,
            None => self.read_ring(number)?,
        };
        let alive = service.backends.iter().zip(members);
        let alive = alive.filter(|(backend, _)| !backend.lost).map(|(_, id)| *id);
        self.put_formers(number, &before, &ring, &alive.collect())?;
        if before == ring {
            self.written.insert(number, ring);
            return Ok(());
        }
        let chunk = |ring: &[u16], nth: u32| {
            let mut slots = [0; CHUNK_SLOTS as usize];
            let part = part(ring, nth);
            slots[..part.len()].copy_from_slice(part);
            Chunk { slots }
        };
        for nth in 0..RING_CHUNKS {
            let wanted = chunk(&ring, nth);
            if before.is_empty() || chunk(&before, nth) != wanted {
                self.rings
                    .insert(Chunk::key(number, nth), wanted, 0)
                    .map_err(|error| Error::kernel("writing a ring of the load balancer")(error.into()))?;
            }
        }
        self.written.insert(number, ring);
        Ok(())
    }

    /// The ring of a service as the kernel has it; empty where it has none, or not all of it.
    fn read_ring(&self, number: u16) -> Result<Vec<u16>> {
        let mut ring = Vec::new();
        for nth in 0..RING_CHUNKS {
            match self.rings.get(&Chunk::key(number, nth), 0) {
                Ok(chunk) => ring.extend(chunk.slots),
                Err(MapError::KeyNotFound) => return Ok(Vec::new()),
                Err(error) => return Err(Error::kernel("reading a ring of the load balancer")(error.into())),
            }
        }
        ring.truncate(RING_SLOTS as usize);
        Ok(ring)
    }

    /// Writes who had the slots that others get now, before they get them, of those who are `alive`.
    fn put_formers(
        &mut self,
        number: u16,
        before: &[u16],
        ring: &[u16],
        alive: &BTreeSet<u16>,
    ) -> Result<()> {
        for nth in 0..RING_CHUNKS {
            let key = Chunk::key(number, nth);
            let known = match self.formers.get(&key, 0) {
                Ok(known) => Some(known),
                Err(MapError::KeyNotFound) => None,
                Err(error) => return Err(Error::kernel("reading rings of the load balancer")(error.into())),
            };
            let none = Formers {
                slots: [Former::default(); CHUNK_SLOTS as usize],
            };
            let mut wanted = none;
            let slots = part(before, nth).iter().zip(part(ring, nth));
            for (place, (before, now)) in slots.enumerate() {
                let known = known.map_or_else(Former::default, |known| known.slots[place]);
                wanted.slots[place] = formers(known, *before, *now, alive);
            }
            let outcome = if known.unwrap_or(none) == wanted {
                Ok(())
            } else if wanted == none {
                self.formers.remove(&key)
            } else {
                self.formers.insert(key, wanted, 0)
            };
            outcome.map_err(|error| Error::kernel("writing rings of the load balancer")(error.into()))?;
        }
        Ok(())
    }

    fn put_vips(&mut self, services: &[Service], numbers: &[u16]) -> Result<()> {
        let used = self.vips4.iter().map(|(_, vip)| vip.number);
        let mut used: BTreeSet<u16> = used.chain(self.vips6.iter().map(|(_, vip)| vip.number)).collect();
        let (mut wanted4, mut wanted6) = (HashMap::new(), HashMap::new());
        for (service, number) in services.iter().zip(numbers) {
            for vip in &service.vips {
                let id = match self.vip(vip) {
                    Some(known) => known.number,
                    None => self.free_vip(&mut used)?,
                };
                let mut flags = 0;
                if service.affinity {
                    flags |= lb::Vip::AFFINITY;
                }
                if service.first_host {
                    flags |= lb::Vip::FIRST_HOST;
                }
                let value = lb::Vip {
                    number: id,
                    service: *number,
                    flags,
                    reserved: 0,
                };
                match vip.key() {
                    Key::V4(key) => drop(wanted4.insert(key, value)),
                    Key::V6(key) => drop(wanted6.insert(key, value)),
                }
            }
        }
        self.vips4.set(&wanted4)?;
        self.vips6.set(&wanted6)
    }

    fn free_vip(&mut self, used: &mut BTreeSet<u16>) -> Result<u16> {
        let most = 2 * MAX_VIPS;
        let number = (0..small(most))
            .find(|number| !used.contains(number))
            .ok_or(Error::TooMany {
                what: "addresses and ports of the load balancer",
                most,
            })?;
        used.insert(number);
        let mut write = || -> Result<(), Refusal> {
            let zeros = vec![VipTraffic::default(); nr_cpus().map_err(|(_, error)| error)?];
            Ok(self
                .traffic
                .set(u32::from(number), PerCpuValues::try_from(zeros)?, 0)?)
        };
        write().map_err(Error::kernel("resetting a counter of the load balancer"))?;
        Ok(number)
    }

    fn forget_rings(&mut self, numbers: &BTreeSet<u16>) -> Result<()> {
        let mut forget = || -> Result<(), Refusal> {
            let keys: Vec<u32> = self.rings.keys().collect::<Result<_, _>>()?;
            let unwanted = |key: &u32| !u16::try_from(key >> 8).is_ok_and(|number| numbers.contains(&number));
            for key in keys.into_iter().filter(unwanted) {
                self.rings.remove(&key)?;
            }
            let keys: Vec<u32> = self.formers.keys().collect::<Result<_, _>>()?;
            for key in keys.into_iter().filter(unwanted) {
                self.formers.remove(&key)?;
            }
            Ok(())
        };
        forget().map_err(Error::kernel("removing a ring of the load balancer"))?;
        self.written.retain(|number, _| numbers.contains(number));
        Ok(())
    }

    fn free_number(&mut self) -> Result<u16> {
        let most = small(MAX_BACKENDS);
        let candidates = (self.next.clamp(1, most - 1)..most).chain(1..most);
        let number = candidates
            .into_iter()
            .find(|number| !self.known.contains_key(number))
            .ok_or(Error::TooMany {
                what: "backends behind the load balancer",
                most: MAX_BACKENDS - 1,
            })?;
        self.next = number + 1;
        Ok(number)
    }

    fn generation(&self, number: u16) -> Result<u16> {
        let read = self.backends.get(&u32::from(number), 0);
        let read =
            read.map_err(|error| Error::kernel("reading a backend of the load balancer")(error.into()));
        Ok(read?.generation)
    }

    fn write_backend(&mut self, number: u16, backend: lb::Backend) -> Result<()> {
        self.backends
            .set(u32::from(number), backend, 0)
            .map_err(|error| Error::kernel("writing a backend of the load balancer")(error.into()))
    }

    /// By which interface of this host the container with this address is reached, if it is one of this host's.
    pub(super) fn interface_of(&self, address: Ipv4Addr) -> Result<Option<String>> {
        let read = || -> Result<_, Refusal> {
            let endpoint = match self.endpoints.get(&Ipv4::from(address), 0) {
                Ok(endpoint) if endpoint.flags & Endpoint::CONTAINER != 0 => endpoint,
                Ok(_) | Err(MapError::KeyNotFound) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
            // One that is gone by now is nobody's.
            Ok(index_to_name(socket, endpoint.ifindex).ok())
        };
        read().map_err(Error::kernel(format!("looking for the interface of {address}")))
    }

    /// Whether an address is of the cluster's network and no host's own.
    pub(super) fn is_container(&self, address: Ipv4Addr) -> Result<bool> {
        let config = self.network.get(&0, 0);
        let config =
            config.map_err(|error| Error::kernel("reading the cluster network's addresses")(error.into()))?;
        let bits = |address: Ipv4| Ipv4Addr::from(address).to_bits();
        let of_network = address.to_bits() & bits(config.mask4) == bits(config.network4);
        let of_host = address.to_bits() & !bits(config.subnet_mask4);
        Ok(bits(config.mask4) != 0 && of_network && of_host > 1)
    }

    pub(super) fn direct_hosts(&self) -> Result<Vec<Ipv4Addr>> {
        let read = || -> Result<_, Refusal> {
            let mut direct = Vec::new();
            for entry in &self.hosts {
                let (_, host) = entry?;
                if host.flags & flynn_abi::Host::DIRECT != 0 {
                    direct.push(host.address.into());
                }
            }
            Ok(direct)
        };
        read().map_err(Error::kernel("reading the cluster's hosts"))
    }

    pub(super) fn floating(&self) -> Result<Vec<IpAddr>> {
        let read = || -> Result<_, Refusal> {
            let mut floating = Vec::new();
            for entry in &self.host_addresses {
                let (address, flags) = entry?;
                if flags & flynn_abi::FLOATING != 0 {
                    floating.push(Ipv6Addr::from(address).to_canonical());
                }
            }
            Ok(floating)
        };
        read().map_err(Error::kernel("reading the floating addresses"))
    }

    pub(super) fn backends(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.known.values().map(|backend| backend.address.into())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.vips4.iter().next().is_none() && self.vips6.iter().next().is_none()
    }

    pub(super) fn vips(&self) -> Vec<Vip> {
        let four = self.vips4.iter().map(|(key, _)| Vip {
            address: IpAddr::V4(key.address.into()),
            port: u16::from_be_bytes(key.port),
            protocol: protocol(key.protocol),
        });
        let six = self.vips6.iter().map(|(key, _)| Vip {
            address: IpAddr::V6(key.address.into()),
            port: u16::from_be_bytes(key.port),
            protocol: protocol(key.protocol),
        });
        let mut vips: Vec<_> = four.chain(six).collect();
        vips.sort();
        vips
    }

    pub(super) fn traffic(&self) -> Result<Vec<(Vip, Traffic)>> {
        let read = || -> Result<_, Refusal> {
            let mut all = Vec::new();
            for vip in self.vips() {
                if let Some(known) = self.vip(&vip) {
                    let values = self.traffic.get(&u32::from(known.number), 0)?;
                    let sum = values.iter().fold(Traffic::default(), |all, cpu| Traffic {
                        packets: all.packets + cpu.packets,
                        bytes: all.bytes + cpu.bytes,
                        flows: all.flows + cpu.flows,
                        unserved: all.unserved + cpu.unserved,
                    });
                    all.push((vip, sum));
                }
            }
            Ok(all)
        };
        read().map_err(Error::kernel("reading the load balancer's counters"))
    }

    pub(super) fn events(&self) -> Result<Vec<(Event, u64)>> {
        let read = || -> Result<_, Refusal> {
            let cpus = self.cpu.get(&0, 0)?;
            let sum = |event: Event| cpus.iter().map(|cpu| cpu.events[event as usize]).sum();
            Ok(Event::ALL.iter().map(|&event| (event, sum(event))).collect())
        };
        read().map_err(Error::kernel("reading the load balancer's counters"))
    }
}

/// The slots of a ring that are in its nth part.
fn part(ring: &[u16], nth: u32) -> &[u16] {
    let from = ring.len().min((nth * CHUNK_SLOTS) as usize);
    &ring[from..ring.len().min(from + CHUNK_SLOTS as usize)]
}

/// Who had a slot before the one who has it now, of those who are alive: the latest first, each once.
fn formers(known: Former, before: u16, now: u16, alive: &BTreeSet<u16>) -> Former {
    let mut formers = Former::default();
    let mut count = 0;
    for one in iter::once(before).chain(known) {
        if count < formers.len() && one != now && alive.contains(&one) && !formers[..count].contains(&one) {
            formers[count] = one;
            count += 1;
        }
    }
    formers
}

enum Key {
    V4(VipKey4),
    V6(VipKey6),
}

impl Vip {
    fn key(&self) -> Key {
        let (port, protocol, reserved) = (self.port.to_be_bytes(), self.protocol.number(), 0);
        match self.address {
            IpAddr::V4(address) => Key::V4(VipKey4 {
                address: address.into(),
                port,
                protocol,
                reserved,
            }),
            IpAddr::V6(address) => Key::V6(VipKey6 {
                address: address.into(),
                port,
                protocol,
                reserved,
            }),
        }
    }
}

pub(super) fn protocol(number: u8) -> Protocol {
    if number == Protocol::Udp.number() {
        Protocol::Udp
    } else {
        Protocol::Tcp
    }
}

impl Backend {
    /// One that is not draining, of weight 1.
    pub fn new(address: Ipv4Addr, port: u16) -> Self {
        Self {
            address,
            port,
            weight: 1,
            draining: false,
            lost: false,
        }
    }
}
