//! The packet path of one host: loads the eBPF programs, pins, attaches and replaces them, and feeds their maps. No
//! other crate speaks bpf(2).
//!
//! **In**: which interfaces carry which [`Program`], which containers are behind which addresses ([`Container`]), and
//! the cluster's networks ([`Network`]). **Out**: drops by reason, what went through each container's veth.
//!
//! [`Dataplane`] is the network of containers; [`steer`] the router's ports; [`allow_devices`] is no packet's affair, but
//! bpf(2)'s.
//!
//! Invariants:
//! - All state is in the kernel, pinned below one directory of a BPF file system: `v<layout>/<map>` and
//!   `links/<program>@<interface>`, or `links/<program>@cgroup<id>`. A [`Dataplane`] is only a hand on it: dropping one,
//!   or the death of the process, changes nothing for a packet, and the next [`Dataplane::open`] finds everything again.
//! - Opening replaces the programs of all pinned links by this build's, each in one step: there is no moment in which
//!   an interface has none. Where an older build has pinned maps of another layout, what they hold is carried over before.
//! - Nothing here knows about network namespaces: interfaces are those of the calling thread's.

#[cfg(feature = "bench")]
pub mod bench;
mod container;
mod devices;
mod error;
pub mod features;
mod hook;
mod host;
pub mod lb;
mod links;
mod maps;
mod migrate;
mod mirror;
mod network;
mod object;
mod pins;
mod policy;
mod program;
pub mod service;
pub mod steer;
mod sys;
mod verify;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};

pub use container::{Container, Drops, Traffic};
pub use devices::{Device, allow_devices};
pub use error::{Error, Result};
pub use flynn_abi::{
    Counters, DropReason, Steered, VXLAN_PORT,
    policy::{HOST, Identity, MAX_IDENTITY, UNKNOWN},
};
pub use hook::Hook;
pub use host::{Host, Way};
pub use network::{Network, Prefix};
pub use policy::{AppPolicy, Attachment, Limits, Policy, Port, Protocol};
pub use program::{Outcome, Program};
pub use verify::verify;

use links::Links;
use maps::Maps;
use migrate::Part;
use pins::Pins;

/// The device that encrypts and decrypts what goes between hosts, where there is one.
pub const ENCRYPTED_DEVICE: &str = "flynn-wg";

/// A hand on this host's packet path.
pub struct Dataplane {
    links: Links,
    maps: Maps,
}

impl Dataplane {
    /// Takes hold of the packet path pinned below `pins`, a directory in a BPF file system which is made where it is
    /// missing, or starts one there. What is attached runs this build's programs afterwards.
    pub fn open(pins: &Path) -> Result<Self> {
        Self::open_with(pins, Hook::detect())
    }

    /// The same with a given kind of hook, where [`Dataplane::open`] takes the best that the kernel has.
    pub fn open_with(pins: &Path, hook: Hook) -> Result<Self> {
        let pins = Pins::open(pins)?;
        let mut object = object::load(&pins)?;
        let mut maps = Maps::take(&mut object)?;
        migrate::carry_over(&pins, &mut maps)?;
        let links = Links::take(object, pins, hook, Program::OVERLAY)?;
        migrate::remove(links.pins(), Part::Overlay)?;
        Ok(Self { links, maps })
    }

    /// Tells the programs of the cluster network. Until this was done once, they drop every packet.
    pub fn configure(&mut self, network: &Network) -> Result<()> {
        self.maps.configure(network)
    }

    /// Attaches a program to an interface, or replaces the one that is there.
    pub fn attach(&mut self, program: Program, interface: &str) -> Result<()> {
        self.links.attach(program, interface)
    }

    /// Takes a program from an interface; the kernel may run it for a few packets more. It is no error when it, or the
    /// interface, is not there any more.
    pub fn detach(&mut self, program: Program, interface: &str) -> Result<()> {
        self.links.detach(program, interface)
    }

    /// Which programs are pinned to which interfaces.
    pub fn attached(&self) -> Result<Vec<(Program, String)>> {
        self.links.list()
    }

    /// Makes a container reachable and lets it send. Its counters start at zero; one with the same addresses that was
    /// there before is replaced and keeps its counters.
    pub fn add(&mut self, container: &Container, attachment: &Attachment) -> Result<()> {
        self.maps.add(container, attachment)
    }

    /// Forgets a container by its addresses: whether there was one.
    pub fn remove(&mut self, ipv4: Ipv4Addr, ipv6: Option<Ipv6Addr>) -> Result<bool> {
        self.maps.remove(ipv4, ipv6)
    }

    /// The containers of this host with what went through them, by address.
    pub fn containers(&self) -> Result<Vec<(Container, Traffic)>> {
        self.maps.containers()
    }

    /// Replaces the cluster's other hosts; ways to those which stay are there all the time.
    pub fn set_hosts(&mut self, hosts: &[Host]) -> Result<()> {
        self.maps.set_hosts(hosts)
    }

    /// The cluster's other hosts, as they were set last.
    pub fn hosts(&self) -> Vec<Host> {
        self.maps.hosts()
    }

    /// How full the maps are: each with its name, its entries, and how many there is room for.
    pub fn fill(&self) -> Vec<(&'static str, u64, u64)> {
        self.maps.fill()
    }

    /// Replaces the addresses that are hosts' own, and those which float between hosts, or none of the latter where they
    /// are not known yet: [`Policy::host_ports`] holds for all of them, and the load balancer knows the floating ones. IPv4
    /// addresses are given mapped.
    pub fn set_host_addresses(
        &mut self,
        addresses: &BTreeSet<Ipv6Addr>,
        floating: Option<&BTreeSet<Ipv6Addr>>,
    ) -> Result<()> {
        self.maps.set_host_addresses(addresses, floating)
    }

    /// Replaces what is known of other hosts' containers: addresses and identities.
    pub fn set_remote(&mut self, remote: &[(Ipv4Addr, Option<Ipv6Addr>, Identity)]) -> Result<()> {
        self.maps.set_remote(remote)
    }

    /// Replaces the policy.
    pub fn set_policy(&mut self, policy: &Policy) -> Result<()> {
        self.maps.set_policy(policy)
    }

    /// How many packets were dropped for each reason since the maps were made.
    pub fn drops(&self) -> Result<Vec<(DropReason, u64)>> {
        self.maps.drops()
    }

    /// How many of them were dropped of each container of this host, by address, since it was added.
    pub fn container_drops(&self) -> Result<BTreeMap<Ipv4Addr, Drops>> {
        self.maps.container_drops()
    }

    /// What a program would do with a frame that came by the interface with this index. Nothing is sent, but it counts.
    pub fn dry_run(&self, program: Program, ifindex: u32, frame: &[u8]) -> Result<Outcome> {
        self.links.dry_run(program, ifindex, frame)
    }

    /// The kind of hook that programs are attached to.
    pub fn hook(&self) -> Hook {
        self.links.hook()
    }

    /// Forgets everything: detaches all programs, and unpins them and the maps.
    pub fn unpin(self) -> Result<()> {
        self.links.unpin()
    }
}
