//! The load balancer for TCP and UDP: packets to an address and a port ([`Vip`]) go to one of a service's containers.
//!
//! **In**: the services ([`Balancer::set`]), all at once and as they should be. **Out**: what went where ([`Traffic`],
//! [`Event`], [`flows`]).
//!
//! - Nothing is attached while there are no services.
//! - Which backend a flow gets follows from the flow and the backends' addresses, ports and weights alone: hosts that
//!   are told the same decide the same.
//! - The maps of the overlay, which say where containers are, are only read.

mod flows;
pub mod maglev;
mod tables;
mod xdp;

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use aya::{TestRun, TestRunOptions};
pub use flows::{Flow, flows};
use flynn_abi::lb::VipTraffic;
pub use flynn_abi::lb::{Event, FLOOD, FLOWS, RING_SLOTS};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

use crate::{
    ENCRYPTED_DEVICE, Hook, Outcome, Program, Protocol,
    error::{Error, Refusal, Result},
    links::Links,
    migrate::{self, Part},
    object,
    pins::Pins,
};
use tables::Tables;

/// What clients send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vip {
    /// An address that leads to this host.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// One of those that take what is sent there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The container's address in the cluster network. What comes by IPv6 goes to the IPv6 address beside it.
    pub address: Ipv4Addr,
    /// The port that it listens on.
    pub port: u16,
    /// Its share, in proportion to the others'.
    pub weight: u32,
    /// It keeps the connections that it has, and gets no more. Datagrams go to others at once.
    pub draining: bool,
    /// It is dead, as far as is known: connections that nobody knows are not looked for there. What is known to be there
    /// still goes there.
    pub lost: bool,
}

/// VIPs with the backends that serve them. A VIP belongs to one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Where clients send to.
    pub vips: Vec<Vip>,
    /// Who takes it, each once.
    pub backends: Vec<Backend>,
    /// All that comes from a client's address goes to the same backend.
    pub affinity: bool,
    /// Answers leave through the host that the question came by: for networks that do not let others answer for it.
    pub first_host: bool,
}

/// What came for a VIP.
pub type Traffic = VipTraffic;

/// The interface that clients' packets come by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// There is a device behind it, and not only another piece of this kernel.
    pub is_device: bool,
}

/// Where the programs run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// In XDP where a device's driver has it, else only in tc.
    #[default]
    Auto,
    /// In XDP, by the driver.
    Native,
    /// In XDP, by the network stack.
    Generic,
    /// Only in tc, where they always run for what XDP leaves to them.
    Tc,
}

/// How much is remembered, and when no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Flows of IPv4, all CPUs together; a quarter as many of IPv6. Taken when the maps are made.
    pub flows: u32,
    /// New flows a second and CPU from which on they are not remembered.
    pub flood: u32,
}

impl Limits {
    /// A four hundredth of the memory for flows, and at least 65,536 of them.
    pub fn of_memory(bytes: u64) -> Self {
        const ENTRY: u64 = 96;
        let flows = (bytes / 400 / ENTRY).clamp(1 << 16, 1 << 23);
        Self {
            flows: u32::try_from(flows).unwrap_or(FLOWS),
            flood: FLOOD,
        }
    }
}

/// A hand on this host's load balancer. As with [`crate::Dataplane`], all state is in the kernel.
pub struct Balancer {
    links: Links,
    tables: Tables,
    uplink: Uplink,
    mode: Mode,
}

impl Balancer {
    /// Takes hold of the load balancer pinned below `pins`, or makes one there. What is attached runs this build's
    /// programs afterwards.
    pub fn open(pins: &Path, uplink: Uplink, mode: Mode, limits: &Limits) -> Result<Self> {
        let pins = Pins::open(pins)?;
        let sizes = [("lb_flows4", limits.flows), ("lb_flows6", limits.flows / 4)];
        let mut object = object::load_lb(&pins, &sizes)?;
        let mut tables = Tables::take(&mut object)?;
        tables.configure(&uplink, limits.flood)?;
        let mut links = Links::take(object, pins, Hook::detect(), Program::LB)?;
        xdp::load(&mut links)?;
        let mut balancer = Self {
            links,
            tables,
            uplink,
            mode,
        };
        if !balancer.tables.is_empty() {
            balancer.attach()?;
        }
        migrate::remove(balancer.links.pins(), Part::Balancer)?;
        Ok(balancer)
    }

    /// Has exactly these services balanced.
    pub fn set(&mut self, services: &[Service]) -> Result<()> {
        let mut interfaces = Vec::new();
        for backend in services.iter().flat_map(|service| &service.backends) {
            interfaces.extend(self.tables.interface_of(backend.address)?);
        }
        interfaces.sort();
        interfaces.dedup();
        let attached = self.links.list()?;
        // Answers must be understood before there are questions.
        for interface in &interfaces {
            if !attached.contains(&(Program::LbAnswer, interface.clone())) {
                self.links.attach(Program::LbAnswer, interface)?;
            }
        }
        self.tables.set(services)?;
        if self.tables.is_empty() {
            self.detach()?;
        } else {
            self.attach()?;
        }
        for (program, interface) in attached {
            if program == Program::LbAnswer && !interfaces.contains(&interface) {
                self.links.detach(program, &interface)?;
            }
        }
        Ok(())
    }

    /// Whether there is an interface that packets are not looked for at yet: of some backend's answers, or of what other
    /// hosts send encrypted.
    pub fn needs_interfaces(&self) -> Result<bool> {
        let attached = self.links.list()?;
        if !self.tables.is_empty() && encrypts() && !attached.contains(&encrypted()) {
            return Ok(true);
        }
        for address in self.tables.backends() {
            if let Some(interface) = self.tables.interface_of(address)?
                && !attached.contains(&(Program::LbAnswer, interface))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How the programs run: `Auto` while there is nothing to balance.
    pub fn mode(&self) -> Mode {
        if self.tables.is_empty() {
            Mode::Auto
        } else {
            self.mode
        }
    }

    /// Where clients' packets come by.
    pub fn uplink(&self) -> &Uplink {
        &self.uplink
    }

    /// Whether an address is one that a container has or may have.
    pub fn is_container(&self, address: Ipv4Addr) -> Result<bool> {
        self.tables.is_container(address)
    }

    /// The hosts on the same link that packets go to as they are: what clients send to them is for us to understand.
    pub fn direct_hosts(&self) -> Result<Vec<Ipv4Addr>> {
        self.tables.direct_hosts()
    }

    /// The addresses that float between hosts: packets for them may come to this one at any moment.
    pub fn floating(&self) -> Result<Vec<IpAddr>> {
        self.tables.floating()
    }

    /// The VIPs that there are.
    pub fn vips(&self) -> Vec<Vip> {
        self.tables.vips()
    }

    /// What came for each VIP.
    pub fn traffic(&self) -> Result<Vec<(Vip, Traffic)>> {
        self.tables.traffic()
    }

    /// How often what happened.
    pub fn events(&self) -> Result<Vec<(Event, u64)>> {
        self.tables.events()
    }

    /// What a classifier would do with a frame, as [`crate::Dataplane::dry_run`].
    pub fn dry_run(&self, program: Program, ifindex: u32, frame: &[u8]) -> Result<Outcome> {
        self.links.dry_run(program, ifindex, frame)
    }

    /// What the XDP program would do with a frame that came by the interface with this index, where XDP runs natively.
    /// Nothing is sent, but it counts.
    pub fn dry_run_xdp(&mut self, ifindex: u32, frame: &[u8]) -> Result<Outcome> {
        // The context's layout is the kernel's `struct xdp_md`: of it only the length and the interface are given.
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let mut context = [0; 24];
        context[4..8].copy_from_slice(&length.to_ne_bytes());
        context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
        let mut out = vec![0; frame.len() + 256];
        let mut run = || -> Result<_, Refusal> {
            Ok(xdp::program(&mut self.links)?.test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ..TestRunOptions::default()
            })?)
        };
        let result = run().map_err(Error::kernel("running the eBPF program lb_xdp"))?;
        out.truncate(usize::try_from(result.data_size_out).unwrap_or(usize::MAX));
        Ok(Outcome {
            action: result.return_value,
            frame: out,
        })
    }

    fn attach(&mut self) -> Result<()> {
        let name = self.uplink.name.clone();
        let attached = self.links.list()?;
        if !attached.contains(&(Program::LbUplink, name.clone())) {
            self.links.attach(Program::LbUplink, &name)?;
        }
        if encrypts() && !attached.contains(&encrypted()) {
            self.links.attach(Program::LbEncrypted, ENCRYPTED_DEVICE)?;
        }
        if !self.links.pins().xdp(&name).exists() || self.mode == Mode::Auto {
            self.mode = xdp::attach(&mut self.links, &name, self.uplink.is_device, self.mode)?;
        }
        Ok(())
    }

    fn detach(&mut self) -> Result<()> {
        let name = self.uplink.name.clone();
        xdp::detach(&self.links, &name)?;
        for (program, interface) in self.links.list()? {
            self.links.detach(program, &interface)?;
        }
        Ok(())
    }
}

/// Whether there is a device that encrypts what goes between hosts.
fn encrypts() -> bool {
    let found = socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| name_to_index(&socket, ENCRYPTED_DEVICE));
    found.is_ok()
}

/// What is attached where there is.
fn encrypted() -> (Program, String) {
    (Program::LbEncrypted, ENCRYPTED_DEVICE.to_owned())
}
