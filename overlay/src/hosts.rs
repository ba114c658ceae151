//! The other hosts: which there are, and the way to each.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::PoisonError,
};

use flynn_dataplane::{Program, Way};
use futures::StreamExt;
use ipnet::Ipv4Net;
use tracing::{info, warn};

use crate::{
    error::{Error, Result},
    netlink::{self, Netlink},
    network::{DEVICE, Network},
    wireguard::Peer,
};

/// Another host of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its own address, which it sends tunnelled packets from.
    pub address: Ipv4Addr,
    /// The part of the cluster's network that is its.
    pub subnet: Ipv4Net,
    /// IPv4 packets go to it, and come from it, as they are: for hosts on the same link, on which nobody else can send.
    /// Both hosts must have it so. It gives way to encryption.
    pub direct: bool,
    /// How WireGuard knows it, if it has a key.
    pub wireguard: Option<Peer>,
}

/// A container on another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RemoteEndpoint {
    /// Its address.
    pub address: Ipv4Addr,
    /// The number of its app.
    pub identity: flynn_dataplane::Identity,
}

/// How another host is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// IPv4 packets go to it as they are.
    pub direct: bool,
    /// What is sent to it is encrypted.
    pub encrypted: bool,
    /// What comes from it is only taken encrypted.
    pub only_encrypted: bool,
    /// The way there.
    pub way: Way,
}

impl Network {
    /// How each other host is reached, by the first address of its subnet, and the name of the interface. Those to
    /// which there is no way are left out.
    pub async fn ways(&self) -> Result<BTreeMap<Ipv4Addr, (Reached, String)>> {
        let links = self.netlink.links().await;
        let links = links.map_err(Error::kernel("listing interfaces"))?;
        let reached = |host: flynn_dataplane::Host| {
            let way = host.way?;
            let link = links.iter().find(|link| link.index == way.ifindex)?;
            let reached = Reached {
                direct: host.direct,
                encrypted: host.encrypted,
                only_encrypted: host.only_encrypted,
                way,
            };
            Some((host.subnet, (reached, link.name.clone())))
        };
        Ok(self.dataplane().hosts().into_iter().filter_map(reached).collect())
    }

    /// How full the data plane's maps are: each with its name, its entries, and how many there is room for.
    pub fn fill(&self) -> Vec<(&'static str, u64, u64)> {
        self.dataplane().fill()
    }

    /// Replaces the cluster's other hosts; this one may be among them. The ways to those which stay remain all the time.
    pub async fn set_hosts(&self, hosts: &[Host]) -> Result<()> {
        let hosts = self.check_hosts(hosts)?;
        let mut known = self.hosts.lock().await;
        self.find_ways(known.insert(hosts)).await
    }

    /// Replaces the addresses that float between hosts. The data plane knows of them from the next [`Network::set_hosts`]
    /// or [`Network::refresh`] on.
    pub fn set_floating(&self, addresses: BTreeSet<IpAddr>) {
        *self.floating.lock().unwrap_or_else(PoisonError::into_inner) = Some(addresses);
    }

    /// Finds the ways to other hosts anew, and the addresses of this one, once hosts have been given.
    pub async fn refresh(&self) -> Result<()> {
        match self.hosts.lock().await.as_deref() {
            Some(known) => self.find_ways(known).await,
            None => Ok(()),
        }
    }

    /// Finds them anew whenever interfaces, addresses or routes change. Ends only when the kernel does not tell of
    /// changes any more: begin again, with [`Network::refresh`].
    pub async fn follow_routes(&self) -> Result<()> {
        let changes = netlink::changes().map_err(Error::kernel("asking to be told of changed routes"))?;
        let mut changes = changes.ready_chunks(1024);
        loop {
            // Once at the beginning, for what changed before anybody listened.
            if let Err(error) = self.refresh().await {
                warn!(%error, "cannot follow changed routes");
            }
            if changes.next().await.is_none() {
                return Ok(());
            }
            // Changes come in flocks.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Replaces what is known of other hosts' containers. They are reached without it; it is policy that wants to know.
    pub fn set_remote(&self, remote: &[RemoteEndpoint]) -> Result<()> {
        let endpoint = |endpoint: &RemoteEndpoint| {
            (
                endpoint.address,
                self.config.ipv6(endpoint.address),
                endpoint.identity,
            )
        };
        let remote: Vec<_> = remote.iter().map(endpoint).collect();
        Ok(self.dataplane().set_remote(&remote)?)
    }

    /// Replaces the cluster's policy.
    pub fn set_policy(&self, policy: &flynn_dataplane::Policy) -> Result<()> {
        Ok(self.dataplane().set_policy(policy)?)
    }

    /// Takes packets of other hosts in at the uplink, from the hosts that were known when the last hand was on all this.
    /// Their ways are found anew once they are given.
    pub(crate) async fn take_in(&self) -> Result<()> {
        let Some(uplink) = self.uplink else {
            return Ok(());
        };
        let links = self
            .netlink
            .links()
            .await
            .map_err(Error::kernel("listing interfaces"))?;
        if let Some(link) = links.iter().find(|link| link.index == uplink) {
            self.dataplane().attach(Program::FromUplink, &link.name)?;
        }
        Ok(())
    }

    fn check_hosts(&self, hosts: &[Host]) -> Result<Vec<Host>> {
        let (cluster, own) = (self.config.cluster, self.config.subnet);
        let mut by_subnet = BTreeMap::new();
        let mut addresses = BTreeSet::new();
        for host in hosts {
            let subnet = host.subnet.trunc();
            let refuse = |why: &str| {
                let address = host.address;
                Err(Error::Config(format!(
                    "the host {address} has the subnet {subnet}, {why}"
                )))
            };
            if subnet == own {
                continue;
            }
            if !cluster.contains(&subnet) || subnet.prefix_len() != own.prefix_len() {
                return refuse(&format!(
                    "which is no /{} of the cluster's network {cluster}",
                    own.prefix_len()
                ));
            }
            if let Some(other) = by_subnet.insert(subnet, Host { subnet, ..*host }) {
                return refuse(&format!("and so has {}", other.address));
            }
            if !addresses.insert(host.address) {
                return refuse("and another one besides");
            }
        }
        Ok(by_subnet.into_values().collect())
    }

    async fn find_ways(&self, hosts: &[Host]) -> Result<()> {
        let mut ways = Vec::with_capacity(hosts.len());
        let mut uplinks = BTreeSet::from_iter(self.uplink);
        let handshakes = self.introduce(hosts)?;
        let before = self.protections();
        for host in hosts {
            let plain = self.find_way(host).await?;
            uplinks.extend(plain.map(|way| way.ifindex));
            let (protection, way) = self.protect(host, plain, &handshakes, &before);
            ways.push(flynn_dataplane::Host {
                subnet: host.subnet.network(),
                address: host.address,
                direct: host.direct && plain.is_some_and(|way| way.next_hop == host.address),
                encrypted: protection.sent && plain.is_some(),
                only_encrypted: protection.received,
                way,
            });
        }
        // Who may arrive first: programs at uplinks, then hosts.
        let links = self
            .netlink
            .links()
            .await
            .map_err(Error::kernel("listing interfaces"))?;
        let uplinks = links.iter().filter(|link| uplinks.contains(&link.index));
        let uplinks: BTreeSet<&str> = uplinks.map(|link| link.name.as_str()).collect();
        let own = self
            .netlink
            .all_addresses()
            .await
            .map_err(Error::kernel("listing addresses"))?;
        let addresses = own
            .into_iter()
            .chain(hosts.iter().map(|host| host.address.into()));
        self.program_hosts(&ways, &uplinks, &addresses.map(mapped).collect())?;
        if self.config.encryption.is_none() {
            self.stop_encrypting().await?;
        }
        Ok(())
    }

    fn program_hosts(
        &self,
        ways: &[flynn_dataplane::Host],
        uplinks: &BTreeSet<&str>,
        addresses: &BTreeSet<Ipv6Addr>,
    ) -> Result<()> {
        let floating = self
            .floating
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|floating| floating.iter().copied().map(mapped).collect());
        let mut dataplane = self.dataplane();
        let attached = dataplane.attached()?;
        let attached: BTreeSet<&str> = attached
            .iter()
            .filter(|(program, _)| *program == Program::FromUplink)
            .map(|(_, interface)| interface.as_str())
            .collect();
        for uplink in uplinks.difference(&attached) {
            info!(uplink, "packets of other hosts are taken in here");
            dataplane.attach(Program::FromUplink, uplink)?;
        }
        dataplane.set_host_addresses(addresses, floating.as_ref())?;
        dataplane.set_hosts(ways)?;
        for old in attached.difference(uplinks) {
            dataplane.detach(Program::FromUplink, old)?;
        }
        Ok(())
    }

    async fn find_way(&self, host: &Host) -> Result<Option<Way>> {
        let found = find_way(&self.netlink, host.address).await;
        let found = found.map_err(Error::kernel(format!("looking for the way to {}", host.address)))?;
        // Through the overlay's own device, nothing of it gets anywhere.
        let own = self
            .netlink
            .link(DEVICE)
            .await
            .map_err(Error::kernel(format!("looking for {DEVICE}")))?;
        let found = found.filter(|way| own.is_none_or(|link| link.index != way.ifindex));
        Ok(found.map(|way| Way {
            source: self.config.address.unwrap_or(way.source),
            ..way
        }))
    }
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

async fn find_way(netlink: &Netlink, to: Ipv4Addr) -> std::io::Result<Option<Way>> {
    Ok(netlink.way_to(to).await?.map(|found| Way {
        ifindex: found.link,
        next_hop: found.via.unwrap_or(to),
        source: found.source,
    }))
}
