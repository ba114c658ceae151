//! Any port for the router, without a socket for each.
//!
//! A program at the network namespace gives what comes to a routed port to the router's one socket of that protocol.
//! The program, the routed ports and the way to the socket are pinned: a router that is gone leaves ports that answer
//! as if nothing listened, and its successor puts its own socket in the place of the old one in one step.

use std::{
    collections::BTreeSet,
    fs::File,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, PerCpuArray, SockHash},
    programs::{SkLookup, links::FdLink},
};
use flynn_abi::{SteerKey, Steered};

use crate::{
    Port, Protocol,
    error::{Error, Refusal, Result},
    migrate::{self, Part},
    object,
    pins::Pins,
};

/// The name of the program, and of its link's pin.
const PROGRAM: &str = "steer";

/// A hand on the steering of a network namespace.
pub struct Steer {
    pins: Pins,
    ports: HashMap<MapData, SteerKey, u32>,
    sockets: SockHash<MapData, u32>,
    counts: PerCpuArray<MapData, u64>,
}

impl Steer {
    /// Takes hold of what is pinned below `pins`, or starts with nothing, and has this build's program run for the
    /// network namespace of the calling thread.
    pub fn open(pins: &Path) -> Result<Self> {
        let pins = Pins::open(pins)?;
        let mut object = object::load_steer(&pins)?;
        let ports = HashMap::try_from(take(&mut object, "steer_ports")?);
        let sockets = SockHash::try_from(take(&mut object, "steer_sockets")?);
        let counts = PerCpuArray::try_from(take(&mut object, "steer_counts")?);
        let failed = || Error::kernel("taking the eBPF maps of the router's ports");
        let steer = Self {
            ports: ports.map_err(|error| failed()(error.into()))?,
            sockets: sockets.map_err(|error| failed()(error.into()))?,
            counts: counts.map_err(|error| failed()(error.into()))?,
            pins,
        };
        attach(&mut object, &steer.pins).map_err(Error::kernel("steering the router's ports"))?;
        migrate::remove(&steer.pins, Part::Steer)?;
        Ok(steer)
    }

    /// From now on, what comes to the routed ports of this protocol is for this socket, which listens or, for
    /// datagrams, is bound. What an earlier socket has accepted, or has in its queue, stays there.
    pub fn serve(&mut self, protocol: Protocol, socket: impl AsFd) -> Result<()> {
        self.sockets
            .insert(u32::from(number(protocol)), socket.as_fd().as_raw_fd(), 0)
            .map_err(|error| Error::kernel("steering to the router's socket")(error.into()))
    }

    /// These are the routed ports from now on. Each is added or removed by itself; those that stay are not touched.
    pub fn set_ports(&mut self, wanted: &BTreeSet<Port>) -> Result<()> {
        let mut set = || -> Result<(), Refusal> {
            let wanted: BTreeSet<SteerKey> = wanted
                .iter()
                .map(|port| SteerKey::new(number(port.protocol), port.number))
                .collect();
            let there = self.ports.keys().collect::<Result<BTreeSet<_>, _>>()?;
            for key in there.difference(&wanted) {
                self.ports.remove(key)?;
            }
            for key in wanted.difference(&there) {
                self.ports.insert(key, 0, 0)?;
            }
            Ok(())
        };
        set().map_err(Error::kernel("changing the router's ports"))
    }

    /// The routed ports.
    pub fn ports(&self) -> Result<BTreeSet<Port>> {
        let mut ports = BTreeSet::new();
        for key in self.ports.keys() {
            let key = key.map_err(|error| Error::kernel("reading the router's ports")(error.into()))?;
            let protocol = [Protocol::Tcp, Protocol::Udp]
                .into_iter()
                .find(|protocol| number(*protocol) == key.protocol());
            ports.extend(protocol.map(|protocol| Port {
                protocol,
                number: key.port(),
            }));
        }
        Ok(ports)
    }

    /// What became of connections and datagrams to routed ports, since the maps were made.
    pub fn counts(&self) -> Result<[(Steered, u64); 3]> {
        let mut counts = Steered::ALL.map(|outcome| (outcome, 0));
        for (outcome, count) in &mut counts {
            let values = self
                .counts
                .get(&(*outcome as u32), 0)
                .map_err(|error| Error::kernel("reading the router's counters")(error.into()))?;
            *count = values.iter().sum();
        }
        Ok(counts)
    }

    /// Ends the steering; the maps stay.
    pub fn detach(self) -> Result<()> {
        Pins::remove(&self.pins.steer()).map(drop)
    }
}

/// The protocol's number in IP headers.
const fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}

/// Attaches this build's program and puts its link in the place of the pinned one. For a moment both run, one after
/// the other over the same maps, which comes to the same as one.
fn attach(object: &mut Ebpf, pins: &Pins) -> Result<(), Refusal> {
    let program: &mut SkLookup = object.program_mut(PROGRAM).ok_or(Missing)?.try_into()?;
    program.load()?;
    let id = program.attach(File::open("/proc/thread-self/ns/net")?)?;
    let link = FdLink::from(program.take_link(id)?);
    let pin = pins.steer();
    let mut aside = pin.clone().into_os_string();
    aside.push("~");
    let aside = PathBuf::from(aside);
    Pins::remove(&aside)?;
    link.pin(&aside)?;
    Ok(std::fs::rename(&aside, &pin)?)
}

fn take(object: &mut Ebpf, name: &str) -> Result<Map> {
    object
        .take_map(name)
        .ok_or_else(|| Error::kernel(format!("taking the eBPF map {name}"))(Missing.into()))
}

#[derive(Debug, thiserror::Error)]
#[error("the object has no such part")]
struct Missing;
