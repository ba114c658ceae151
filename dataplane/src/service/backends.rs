//! The maps of who serves what.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv6Addr},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap as Map, MapData, MapError},
};
use flynn_abi::{Backend, BackendKey, MAX_SERVICES};

use super::{
    Instance,
    plan::{Step, plan},
};
use crate::{
    error::{Error, Refusal, Result},
    maps::take,
};

pub(super) struct Backends {
    counts: Array<MapData, u32>,
    places: Map<MapData, BackendKey, Backend>,
    /// What the maps say, by service.
    known: HashMap<u32, Known>,
}

#[derive(Default)]
struct Known {
    /// By place.
    instances: Vec<Instance>,
    leader: Option<Instance>,
}

impl Backends {
    pub(super) fn take(object: &mut Ebpf) -> Result<Self> {
        let mut backends = Self {
            counts: take(object, "service_counts")?,
            places: take(object, "service_backends")?,
            known: HashMap::new(),
        };
        backends
            .read()
            .map_err(Error::kernel("reading the services' instances"))?;
        Ok(backends)
    }

    /// Reads what the process before has left, and clears what it had written but not published.
    fn read(&mut self) -> Result<(), Refusal> {
        let mut found: HashMap<u32, HashMap<u32, Instance>> = HashMap::new();
        for entry in &self.places {
            let (key, backend) = entry?;
            found
                .entry(key.service)
                .or_default()
                .insert(key.index, instance(&backend));
        }
        for (service, mut places) in found {
            let leader = places.remove(&BackendKey::LEADER);
            let count = self.counts.get(&service, 0)?;
            let instances: Vec<Instance> = (0..count).map_while(|place| places.remove(&place)).collect();
            if u32::try_from(instances.len()) != Ok(count) {
                self.counts.set(service, u32::try_from(instances.len())?, 0)?;
            }
            for index in places.into_keys() {
                absent_is_fine(self.places.remove(&BackendKey { service, index }))?;
            }
            self.known.insert(service, Known { instances, leader });
        }
        Ok(())
    }

    pub(super) fn set(&mut self, service: u32, wanted: &[Instance], leader: Option<Instance>) -> Result<()> {
        if service == 0 || service >= MAX_SERVICES {
            return Err(Error::NoSuchService(service));
        }
        let mut known = self.known.remove(&service).unwrap_or_default();
        let (steps, places) = plan(&known.instances, wanted);
        let write = || -> Result<(), Refusal> {
            // The leader first: whoever finds the service finds its leader.
            let key = BackendKey {
                service,
                index: BackendKey::LEADER,
            };
            match leader {
                Some(leader) if known.leader != Some(leader) => {
                    self.places.insert(key, backend(&leader), 0)?;
                }
                None if known.leader.is_some() => absent_is_fine(self.places.remove(&key))?,
                _ => {}
            }
            for step in steps {
                match step {
                    Step::Put(index, instance) => {
                        self.places
                            .insert(BackendKey { service, index }, backend(&instance), 0)?;
                    }
                    Step::Count(count) => self.counts.set(service, count, 0)?,
                    Step::Clear(index) => {
                        absent_is_fine(self.places.remove(&BackendKey { service, index }))?;
                    }
                }
            }
            Ok(())
        };
        let written = write();
        if let Err(refusal) = written {
            // How far it came is in the maps alone.
            self.known.clear();
            self.read()
                .map_err(Error::kernel("reading the services' instances"))?;
            return Err(Error::kernel(format!(
                "writing the instances of service {service}"
            ))(refusal));
        }
        known.instances = places;
        known.leader = leader;
        if !known.instances.is_empty() || known.leader.is_some() {
            self.known.insert(service, known);
        }
        Ok(())
    }

    pub(super) fn numbers(&self) -> BTreeSet<u32> {
        self.known.keys().copied().collect()
    }

    pub(super) fn get(&self, service: u32) -> (&[Instance], Option<Instance>) {
        self.known
            .get(&service)
            .map_or((&[], None), |known| (&known.instances, known.leader))
    }
}

fn backend(instance: &Instance) -> Backend {
    let address = match instance.address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    Backend {
        address: address.into(),
        address6: instance.address6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
        instance: instance.id,
    }
}

fn instance(backend: &Backend) -> Instance {
    let address6 = Ipv6Addr::from(backend.address6);
    Instance {
        id: backend.instance,
        address: IpAddr::V6(backend.address.into()).to_canonical(),
        address6: (!address6.is_unspecified()).then_some(address6),
    }
}

pub(super) fn absent_is_fine(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
