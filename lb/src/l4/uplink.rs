//! The interface that clients' packets come by: the one with the host's address.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Context as _;
use flynn_dataplane::lb::Uplink;
use futures::TryStreamExt as _;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;

/// The uplink, and the addresses on it that clients may send to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) uplink: Uplink,
    pub(super) addresses: Vec<IpAddr>,
}

/// Looks for the interface with this address.
pub(super) async fn find(host: Ipv4Addr) -> anyhow::Result<Found> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let connection = tokio::spawn(connection);
    let found = read(&handle, host).await;
    connection.abort();
    found
}

async fn read(handle: &rtnetlink::Handle, host: Ipv4Addr) -> anyhow::Result<Found> {
    let mut all: Vec<(u32, IpAddr)> = Vec::new();
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await? {
        for attribute in &message.attributes {
            if let AddressAttribute::Address(address) | AddressAttribute::Local(address) = attribute {
                all.push((message.header.index, *address));
            }
        }
    }
    let index = all
        .iter()
        .find(|(_, address)| *address == IpAddr::V4(host))
        .map(|(index, _)| *index)
        .with_context(|| format!("no interface has the host's address {host}"))?;
    let mut links = handle.link().get().match_index(index).execute();
    let link = links.try_next().await?.context("the uplink is gone")?;
    let (mut name, mut mtu, mut mac) = (String::new(), 1500, [0; 6]);
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(known) => name = known,
            LinkAttribute::Mtu(known) => mtu = known,
            LinkAttribute::Address(known) => mac = known.try_into().unwrap_or_default(),
            _ => {}
        }
    }
    let mut addresses: Vec<IpAddr> = all
        .into_iter()
        .filter(|(of, address)| *of == index && is_reachable(*address))
        .map(|(_, address)| address)
        .collect();
    addresses.sort();
    addresses.dedup();
    let is_device = std::path::Path::new("/sys/class/net")
        .join(&name)
        .join("device")
        .exists();
    Ok(Found {
        uplink: Uplink {
            name,
            index,
            mtu,
            mac,
            is_device,
        },
        addresses,
    })
}

/// Not one that only means something on the link.
fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_link_local() && !address.is_loopback(),
        IpAddr::V6(address) => !address.is_unicast_link_local() && !address.is_loopback(),
    }
}
