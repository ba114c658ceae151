//! Virtual addresses of services: what sockets of a cgroup are told instead.
//!
//! **In**: the networks that virtual addresses are from, and for each service's number its instances and its leader.
//! **Out**: sockets that go to an instance, and on demand those that go to one which is not there any more, ended
//! ([`Flows`]). Packets to virtual addresses, of what does not go by those sockets, are translated by the overlay's programs
//! with the same maps.
//!
//! Invariants, besides those of the crate:
//! - A program that looks at a service while it changes finds an instance of before or of after, never a gap.
//! - What a change costs depends on that service alone.
//! - What user space knows of the maps it has read from them: a new process goes on where the last one was.

mod backends;
mod diag;
mod flows;
mod links;
mod packets;
mod plan;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use aya::maps::Array;
use flynn_abi::ServiceConfig;

use crate::{
    Prefix,
    error::{Error, Result},
    maps::take,
    migrate::{self, Part},
    object,
    pins::Pins,
};

use backends::Backends;
pub use flows::{Flow, Flows};
use links::Links;
use packets::Packets;

/// An instance of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Which registration it is: never the same again.
    pub id: u64,
    /// Where it is.
    pub address: IpAddr,
    /// The IPv6 address of the same container, for sockets that cannot speak IPv4.
    pub address6: Option<Ipv6Addr>,
}

/// The maps of this part alone.
const MAPS: [&str; 6] = [
    "service_config",
    "service_counts",
    "service_backends",
    "service_peers",
    "service_flows",
    "service_packets",
];

/// A hand on the virtual addresses of this host's jobs.
pub struct Services {
    links: Links,
    config: Array<aya::maps::MapData, ServiceConfig>,
    backends: Backends,
    flows: Flows,
    packets: Packets,
}

impl Services {
    /// Takes hold of what is pinned below `pins`, as [`crate::Dataplane::open`] does. What is attached runs this build's
    /// programs afterwards.
    pub fn open(pins: &Path) -> Result<Self> {
        let pins = Pins::open(pins)?;
        let mut object = object::load_service(&pins)?;
        let config = take(&mut object, "service_config")?;
        let backends = Backends::take(&mut object)?;
        let flows = Flows::take(&object)?;
        let packets = Packets::take(&mut object::load(&pins)?)?;
        let links = Links::take(object, pins)?;
        migrate::remove(links.pins(), Part::Services)?;
        Ok(Self {
            links,
            config,
            backends,
            flows,
            packets,
        })
    }

    /// Has all sockets made in a cgroup v2 and below it find services. There is one such cgroup: a link to another one is
    /// given up.
    pub fn attach(&mut self, cgroup: &Path) -> Result<()> {
        self.links.attach(cgroup)
    }

    /// Tells the networks that virtual addresses are from. Until this was done once, no address is virtual.
    pub fn configure(&mut self, network4: Prefix<Ipv4Addr>, network6: Ipv6Addr) -> Result<()> {
        let bits = 32_u32.saturating_sub(u32::from(network4.length));
        let config = ServiceConfig {
            network6: network6.into(),
            network4: network4.address.into(),
            size4: 1_u32.checked_shl(bits).unwrap_or(u32::MAX),
        };
        self.config.set(0, config, 0).map_err(|error| {
            Error::kernel("telling the eBPF programs of the services' network")(error.into())
        })
    }

    /// Says who serves a service and who leads it. Any instance may be chosen from now on, and no other.
    pub fn set(&mut self, number: u32, instances: &[Instance], leader: Option<Instance>) -> Result<()> {
        self.backends.set(number, instances, leader)
    }

    /// Forgets a service: connections to its addresses are refused.
    pub fn remove(&mut self, number: u32) -> Result<()> {
        self.backends.set(number, &[], None)
    }

    /// The numbers of services that have instances.
    pub fn numbers(&self) -> BTreeSet<u32> {
        self.backends.numbers()
    }

    /// A service's instances, in no order, and its leader.
    pub fn service(&self, number: u32) -> (&[Instance], Option<Instance>) {
        self.backends.get(number)
    }

    /// The sockets that go by virtual addresses.
    pub fn flows(&self) -> Result<Flows> {
        self.flows.try_clone()
    }

    /// Ends the flows of packets that came past the sockets, in all namespaces, as [`Flows::sever`] ends sockets'.
    pub fn sever_packets(&mut self, is_gone: impl Fn(&Flow) -> bool, dead: &[SocketAddr]) -> Result<usize> {
        self.packets.sever(is_gone, dead)
    }

    /// How much memory each map takes in the kernel, in bytes.
    pub fn memory(&self) -> Result<Vec<(&'static str, u64)>> {
        MAPS.into_iter()
            .map(|name| Ok((name, self.links.pins().map_memory(name)?)))
            .collect()
    }
}
