//! Those whom we are measured beside: what the kernel has by itself, set up as others set it up.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::Result;
use flynn_lab::netns;

use super::load::Pair;

/// Two hosts with a bridge each and the kernel's VXLAN between them, and a container at each bridge: routes, neighbours
/// and forwarding entries are fixed, as flannel has them. Gives the two containers, and the two hosts.
pub(super) fn vxlan() -> Result<[Pair; 2]> {
    let (a, b) = (netns::make()?, netns::make()?);
    joined(&a, &b, "uplink", &["192.0.2.1/24", "192.0.2.2/24"])?;
    let (client, server) = (vxlan_host(&a, 1, 2)?, vxlan_host(&b, 2, 1)?);
    Ok([
        Pair {
            name: "kernel VXLAN",
            client,
            server,
            address: Ipv4Addr::new(10, 244, 2, 2),
        },
        Pair {
            name: "host to host",
            client: a,
            server: b,
            address: Ipv4Addr::new(192, 0, 2, 2),
        },
    ])
}

/// Two namespaces joined by one veth pair.
pub(super) fn veth() -> Result<Pair> {
    let (client, server) = (netns::make()?, netns::make()?);
    joined(&client, &server, "eth0", &["10.244.0.1/24", "10.244.0.2/24"])?;
    Ok(Pair {
        name: "one veth pair",
        client,
        server,
        address: Ipv4Addr::new(10, 244, 0, 2),
    })
}

/// Two containers at one bridge. The host's namespace lives on in its interfaces' other ends.
pub(super) fn bridge() -> Result<(Pair, OwnedFd)> {
    let host = netns::make()?;
    bridge_up(&host, 0, 1500)?;
    let pair = Pair {
        name: "bridge",
        client: at_bridge(&host, 0, 2, 1500)?,
        server: at_bridge(&host, 0, 3, 1500)?,
        address: Ipv4Addr::new(10, 244, 0, 3),
    };
    Ok((pair, host))
}

/// One of two hosts, which carry the numbers in their addresses: a container at its bridge.
fn vxlan_host(host: &OwnedFd, own: u8, other: u8) -> Result<OwnedFd> {
    bridge_up(host, own, 1450)?;
    let mac = |number| format!("02:00:00:00:00:{number:02x}");
    ip(
        host,
        &format!(
            "link add flannel.1 address {} type vxlan id 1 dstport 8472 local 192.0.2.{own} dev uplink nolearning
             link set flannel.1 mtu 1450 up
             address add 10.244.{own}.0/32 dev flannel.1
             route add 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink
             neigh add 10.244.{other}.0 lladdr {} dev flannel.1 nud permanent\n",
            mac(own),
            mac(other)
        ),
    )?;
    netns::inside(host.as_fd(), || {
        let entry = ["fdb", "add", &mac(other), "dev", "flannel.1", "dst"];
        let dst = format!("192.0.2.{other}");
        let mut bridge = std::process::Command::new("bridge");
        let output = bridge.args(entry).arg(dst).arg("self").output()?;
        anyhow::ensure!(
            output.status.success(),
            "{bridge:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        Ok(())
    })?;
    at_bridge(host, own, 2, 1450)
}

fn bridge_up(host: &OwnedFd, subnet: u8, mtu: u32) -> Result<()> {
    ip(
        host,
        &format!(
            "link add cni0 mtu {mtu} type bridge
             address add 10.244.{subnet}.1/24 dev cni0
             link set cni0 up\n"
        ),
    )
}

fn at_bridge(host: &OwnedFd, subnet: u8, number: u8, mtu: u32) -> Result<OwnedFd> {
    let container = netns::make()?;
    ip(
        host,
        &format!(
            "link add veth{number} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}
             link set veth{number} master cni0 up\n",
            path(&container)
        ),
    )?;
    ip(
        &container,
        &format!(
            "link set lo up
             address add 10.244.{subnet}.{number}/24 dev eth0
             link set eth0 up
             route add default via 10.244.{subnet}.1\n"
        ),
    )?;
    Ok(container)
}

/// Joins two namespaces by a veth pair with these addresses.
pub(super) fn joined(a: &OwnedFd, b: &OwnedFd, interface: &str, addresses: &[&str; 2]) -> Result<()> {
    ip(
        a,
        &format!(
            "link add {interface} type veth peer name {interface} netns {}\n",
            path(b)
        ),
    )?;
    for (namespace, address) in [(a, addresses[0]), (b, addresses[1])] {
        ip(
            namespace,
            &format!("link set lo up\naddress add {address} dev {interface}\nlink set {interface} up\n"),
        )?;
    }
    Ok(())
}

fn ip(namespace: &OwnedFd, lines: &str) -> Result<()> {
    netns::inside(namespace.as_fd(), || netns::ip(lines))
}

/// Where other processes find a namespace that we hold.
fn path(namespace: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd())
}
