//! Our own network: what `flynn-host` has on a host, without `flynn-host`.
//!
//! Policy is on, at its dearest: both containers' apps are isolated, and the client's may open connections to the server's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flynn_dataplane::lb;
use flynn_lab::netns;
use flynn_overlay::{
    AppPolicy, Attachment, Host, Limits, Network, NetworkConfig, Policy, Protocol, RemoteEndpoint,
};
use ipnet::Ipv4Net;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::load::Pair;
use super::peers::joined;

/// A host's BPF file system, and with it its programs and maps. All else of the network is in its namespace.
pub(super) struct Pins(tempfile::TempDir);

impl Pins {
    fn directory(&self) -> PathBuf {
        self.0.path().join("flynn")
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // Where this fails, it goes with the process's mount namespace.
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// What keeps a host: its namespace and its pins.
pub(super) type Kept = (OwnedFd, Pins);

/// A container that a host is to have.
struct Container<'a> {
    namespace: &'a OwnedFd,
    last: u8,
    attachment: Attachment,
}

/// The numbers of the two apps.
const CLIENT: u32 = 1001;
const SERVER: u32 = 1002;

/// The port of the route, which the load does not go to.
const ROUTED: u16 = 80;

/// Two containers on one host.
pub(super) fn one_host() -> Result<(Pair, Kept)> {
    let host = netns::make()?;
    let (client, server) = (netns::make()?, netns::make()?);
    let containers = [container(&client, 2, CLIENT), container(&server, 3, SERVER)];
    let pins = up(&host, 1, &[], &containers)?;
    let pair = Pair {
        name: "ours",
        address: address(1, 3),
        client,
        server,
    };
    Ok((pair, (host, pins)))
}

/// What is particular about two hosts.
#[derive(Clone, Copy, Default)]
pub(super) struct Particulars {
    /// A TCP route leads to the server, and the load balancer for it is attached to both hosts' uplinks through tc.
    pub(super) routed: bool,
    /// How fast the client may send.
    pub(super) client: Limits,
    /// How fast the server may receive.
    pub(super) server: Limits,
}

/// Two hosts with a container each, joined by a veth pair.
pub(super) fn two_hosts(name: &'static str, particulars: Particulars) -> Result<(Pair, [Kept; 2])> {
    let (a, b) = (netns::make()?, netns::make()?);
    joined(&a, &b, "uplink", &["192.0.2.1/24", "192.0.2.2/24"])?;
    let (client, server) = (netns::make()?, netns::make()?);
    let there = |host, identity| RemoteEndpoint {
        address: address(host, 2),
        identity,
    };
    let mut here = [container(&client, 2, CLIENT), container(&server, 2, SERVER)];
    here[0].attachment.limits = particulars.client;
    here[1].attachment.limits = particulars.server;
    let pins_a = up(&a, 1, &[there(2, SERVER)], &here[..1])?;
    let pins_b = up(&b, 2, &[there(1, CLIENT)], &here[1..])?;
    if particulars.routed {
        balance(&a, &pins_a, address(2, 2))?;
        balance(&b, &pins_b, address(2, 2))?;
    }
    let pair = Pair {
        name,
        address: address(2, 2),
        client,
        server,
    };
    Ok((pair, [(a, pins_a), (b, pins_b)]))
}

/// Has a host know a TCP route from the second host's address to a container.
fn balance(host: &OwnedFd, pins: &Pins, backend: Ipv4Addr) -> Result<()> {
    let service = lb::Service {
        vips: vec![lb::Vip {
            address: Ipv4Addr::new(192, 0, 2, 2).into(),
            port: ROUTED,
            protocol: Protocol::Tcp,
        }],
        backends: vec![lb::Backend {
            address: backend,
            port: ROUTED,
            weight: 1,
            draining: false,
            lost: false,
        }],
        ..lb::Service::default()
    };
    let limits = lb::Limits {
        flows: 1 << 16,
        flood: lb::FLOOD,
    };
    netns::inside(host.as_fd(), || {
        let mut balancer = lb::Balancer::open(&pins.directory(), uplink()?, lb::Mode::Tc, &limits)?;
        Ok(balancer.set(&[service])?)
    })
}

/// This namespace's uplink.
fn uplink() -> Result<lb::Uplink> {
    let link = interface_json("uplink")?;
    let number = |key: &str| link[key].as_u64().and_then(|number| number.try_into().ok());
    let mac: Vec<u8> = link["address"]
        .as_str()
        .context("no address")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    Ok(lb::Uplink {
        name: "uplink".to_owned(),
        index: number("ifindex").context("no index")?,
        mtu: number("mtu").context("no MTU")?,
        mac: mac.try_into().ok().context("no Ethernet address")?,
        is_device: false,
    })
}

fn interface_json(name: &str) -> Result<serde_json::Value> {
    let output = Command::new("ip")
        .args(["-json", "link", "show", name])
        .output()?;
    ensure!(
        output.status.success(),
        "ip: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(links[0].clone())
}

fn container(namespace: &OwnedFd, last: u8, identity: u32) -> Container<'_> {
    let attachment = Attachment {
        identity,
        ..Attachment::default()
    };
    Container {
        namespace,
        last,
        attachment,
    }
}

/// Brings the network up in a namespace, with these containers; those which are elsewhere are on the other host.
fn up(
    namespace: &OwnedFd,
    number: u8,
    elsewhere: &[RemoteEndpoint],
    containers: &[Container<'_>],
) -> Result<Pins> {
    let pins = tempfile::tempdir()?;
    mount("bpf", pins.path(), "bpf", MountFlags::empty(), None).context("mounting a BPF file system")?;
    let pins = Pins(pins);
    let host = |number| Host {
        address: Ipv4Addr::new(192, 0, 2, number),
        subnet: Ipv4Net::new_assert(address(number, 0), 24),
        direct: false,
        wireguard: None,
    };
    let alone = elsewhere.is_empty();
    let config = NetworkConfig {
        cluster: Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 0, 0), 16),
        cluster6: Some(NetworkConfig::DEFAULT_CLUSTER6),
        subnet: host(number).subnet,
        pins: pins.directory(),
        uplink: (!alone).then(|| "uplink".to_owned()),
        address: (!alone).then_some(host(number).address),
        encryption: None,
    };
    netns::inside(namespace.as_fd(), || {
        netns::ip("link set lo up\n")?;
        crate::inside::runtime()?.block_on(async {
            let network = Network::up(config).await?;
            network.set_policy(&policy())?;
            if !alone {
                network.set_hosts(&[host(1), host(2)]).await?;
                network.set_remote(elsewhere)?;
            }
            for it in containers {
                let address = address(number, it.last);
                network
                    .attach(it.namespace.as_fd(), address, &it.attachment)
                    .await?;
            }
            Ok(())
        })
    })?;
    Ok(pins)
}

fn policy() -> Policy {
    let isolated = AppPolicy {
        isolated: true,
        system: false,
    };
    Policy {
        apps: BTreeMap::from([(CLIENT, isolated), (SERVER, isolated)]),
        allowed: BTreeSet::from([(CLIENT, SERVER)]),
        host_ports: None,
    }
}

/// An address in a host's subnet.
fn address(host: u8, last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, host, last)
}
