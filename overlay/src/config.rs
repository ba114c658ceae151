//! What an operator can choose.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    address, allocator,
    error::{Error, Result},
    wireguard::Encryption,
};

/// The most addresses that a host can have: as many as the data plane counts for.
const LARGEST_SUBNET: u8 = 20;
/// A gateway and one container.
const SMALLEST_SUBNET: u8 = 30;

/// The networks of a cluster and of one of its hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The network that all containers of the cluster have their addresses from.
    pub cluster: Ipv4Net,
    /// The IPv6 network beside it: /96 or larger, since an IPv4 address is the end of an IPv6 address. Where it is
    /// `None`, or the machine has no IPv6, containers have none.
    pub cluster6: Option<Ipv6Net>,
    /// The part of `cluster` that is this host's.
    pub subnet: Ipv4Net,
    /// The directory in a BPF file system where programs and maps are pinned.
    pub pins: PathBuf,
    /// The interface to the other hosts and to the outside. Where it is `None`, the default route's.
    pub uplink: Option<String>,
    /// The address by which other hosts know this one. Where it is `None`, the one that routes to them prefer.
    pub address: Option<Ipv4Addr>,
    /// How what goes to other hosts is encrypted, if it shall be.
    pub encryption: Option<Encryption>,
}

impl NetworkConfig {
    /// The IPv6 network of clusters whose operator has not chosen another.
    pub const DEFAULT_CLUSTER6: Ipv6Net =
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd66, 0x6c79, 0x6e6e, 0, 0, 0, 0, 0), 64);

    /// The host's own address in the cluster network.
    pub fn gateway(&self) -> Ipv4Addr {
        allocator::gateway(self.subnet)
    }

    pub(crate) fn gateway6(&self) -> Option<Ipv6Addr> {
        self.ipv6(self.gateway())
    }

    /// The IPv6 address that goes with a container's address.
    pub fn ipv6(&self, address: Ipv4Addr) -> Option<Ipv6Addr> {
        self.cluster6.map(|network| address::ipv6(network, address))
    }

    /// The IPv6 addresses that go with those of the host's subnet: the first, and how many of its bits count.
    pub(crate) fn subnet6(&self) -> Option<(IpAddr, u8)> {
        let first = self.ipv6(self.subnet.network())?;
        Some((first.into(), 96 + self.subnet.prefix_len()))
    }

    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Config(why));
        let (cluster, subnet) = (self.cluster, self.subnet);
        if !(LARGEST_SUBNET..=SMALLEST_SUBNET).contains(&subnet.prefix_len()) {
            return refuse(format!(
                "the host's subnet {subnet} must be between a /{LARGEST_SUBNET} and a /{SMALLEST_SUBNET}"
            ));
        }
        if !cluster.contains(&subnet) {
            return refuse(format!(
                "the host's subnet {subnet} must be within the cluster's network {cluster}"
            ));
        }
        match self.cluster6 {
            Some(cluster6) if cluster6.prefix_len() > 96 => refuse(format!(
                "the cluster's IPv6 network {cluster6} must be a /96 or larger"
            )),
            _ => Ok(()),
        }
    }

    pub(crate) fn check_container(&self, container: Ipv4Addr) -> Result<()> {
        if allocator::is_for_containers(self.subnet, container) {
            return Ok(());
        }
        let subnet = self.subnet;
        Err(Error::Config(format!(
            "{container} is no address for a container of the host's subnet {subnet}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cluster: &str, subnet: &str, cluster6: &str) -> NetworkConfig {
        NetworkConfig {
            cluster: cluster.parse().unwrap(),
            cluster6: Some(cluster6.parse().unwrap()),
            subnet: subnet.parse().unwrap(),
            pins: PathBuf::new(),
            uplink: None,
            address: None,
            encryption: None,
        }
    }

    #[test]
    fn networks_that_do_not_fit_are_refused() {
        for (cluster, subnet, cluster6, fits) in [
            ("100.100.0.0/16", "100.100.1.0/24", "fd00::/64", true),
            ("100.100.0.0/24", "100.100.0.0/24", "fd00::/96", true),
            ("100.100.0.0/16", "100.101.1.0/24", "fd00::/64", false),
            ("100.100.0.0/16", "100.100.0.0/19", "fd00::/64", false),
            ("100.100.0.0/16", "100.100.0.0/31", "fd00::/64", false),
            ("100.100.0.0/16", "100.100.1.0/24", "fd00::/97", false),
        ] {
            assert_eq!(
                config(cluster, subnet, cluster6).check().is_ok(),
                fits,
                "{cluster} {subnet} {cluster6}"
            );
        }
    }

    #[test]
    fn only_addresses_for_containers_are_attached() {
        let config = config("100.100.0.0/16", "100.100.1.0/24", "fd00::/64");
        for (address, fits) in [
            ("100.100.1.2", true),
            ("100.100.1.254", true),
            ("100.100.1.1", false),
            ("100.100.2.2", false),
        ] {
            assert_eq!(
                config.check_container(address.parse().unwrap()).is_ok(),
                fits,
                "{address}"
            );
        }
    }
}
