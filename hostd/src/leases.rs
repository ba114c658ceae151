//! Which host holds which subnet of the cluster's network. Pure: who calls does it by compare-and-swap on the
//! metadata of [`HOST_SERVICE`], so that no two hosts ever get the same.
//!
//! A lease does not run out by time: a host that was away for a month finds its subnet, and its containers their
//! addresses. It ends when the host is removed (`flynn-host remove`); a host that then comes back sees that its lease
//! is gone, starts nothing in that network any more, and has to join anew.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{HOST_SERVICE, NetworkLeases, PORT, ServiceMeta, SubnetLease};
use flynn_api::{Error, ErrorCode, Result};
use ipnet::{Ipv4Net, Ipv6Net};
use jiff::{SignedDuration, Timestamp};

/// After this long without, a lease is renewed.
const RENEWAL: SignedDuration = SignedDuration::from_hours(24);

/// What a cluster's operator chooses at bootstrap, once and for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Networks {
    /// The cluster's network.
    pub network: Ipv4Net,
    /// The prefix length of each host's part.
    pub subnet_length: u8,
    /// The IPv6 network beside it.
    pub network6: Ipv6Net,
    /// No encapsulation between hosts that share a link.
    pub direct: bool,
}

impl Networks {
    /// Refuses what cannot work.
    pub fn check(&self) -> Result<()> {
        let (network, length) = (self.network, self.subnet_length);
        if !(20..=30).contains(&length) || length <= network.prefix_len() {
            return Err(Error::invalid_field(
                "subnet_length",
                format!(
                    "each host's part of {network} must be between a /20 and a /30, and smaller than the whole: give \
                     --subnet-length"
                ),
            ));
        }
        if network.trunc() != network || self.network6.trunc() != self.network6 {
            let (network, network6) = (network.trunc(), self.network6.trunc());
            return Err(Error::invalid_field(
                "network",
                format!("a network ends in zeros: {network}, {network6}"),
            ));
        }
        if self.network6.prefix_len() > 96 {
            return Err(Error::invalid_field(
                "network6",
                format!(
                    "{} must be a /96 or larger: IPv4 addresses are the ends of the IPv6 addresses",
                    self.network6
                ),
            ));
        }
        Ok(())
    }

    /// The document of a cluster in which no host holds a subnet yet.
    fn document(&self) -> NetworkLeases {
        NetworkLeases {
            network: self.network.to_string(),
            subnet_length: self.subnet_length,
            network6: self.network6.to_string(),
            direct: self.direct,
            leases: BTreeMap::new(),
        }
    }
}

/// Gives a host its subnet: the one that it holds, or one that nobody holds. Renews the lease when that is due.
pub fn take(
    leases: &mut NetworkLeases,
    host: &str,
    address: Ipv4Addr,
    now: Timestamp,
) -> Result<SubnetLease> {
    if let Some((other, lease)) = leases
        .leases
        .iter()
        .find(|(id, lease)| *id != host && lease.address == address)
    {
        return Err(Error::conflict(format!(
            "the address {address} is that of host {other}, which holds {}: give this host another with --address; or, \
             if {other} is gone for good, run `flynn-host remove {other}` on a host of the cluster",
            lease.subnet
        )));
    }
    let subnet = match leases.leases.get(host) {
        Some(lease) => {
            let due = lease
                .renewed_at
                .is_none_or(|then| now.duration_since(then).abs() > RENEWAL);
            if lease.address == address && !due {
                return Ok(lease.clone());
            }
            lease.subnet.clone()
        }
        None => free(leases)?.to_string(),
    };
    let lease = SubnetLease {
        subnet,
        address,
        renewed_at: Some(now),
    };
    leases.leases.insert(host.to_owned(), lease.clone());
    Ok(lease)
}

/// Where the discoverds of the hosts with leases are.
pub fn members(leases: &NetworkLeases) -> impl Iterator<Item = String> {
    let addresses = leases.leases.values().map(|lease| lease.address);
    addresses.map(|address| format!("{address}:{PORT}"))
}

/// Takes a host's subnet back; `None` when it holds none.
pub fn release(leases: &mut NetworkLeases, host: &str) -> Option<SubnetLease> {
    leases.leases.remove(host)
}

/// A subnet that nobody holds. Those behind the highest that is held come first: one that was released rests as long
/// as there are others. The network's very first is never given: it would hold the network's own address.
fn free(leases: &NetworkLeases) -> Result<Ipv4Net> {
    let unreadable = |what: &str, why: &dyn std::fmt::Display| {
        Error::internal(format!("{what:?} in the network leases cannot be read: {why}"))
    };
    let network: Ipv4Net = leases
        .network
        .parse()
        .map_err(|why| unreadable(&leases.network, &why))?;
    let held = leases
        .leases
        .values()
        .map(|lease| {
            lease
                .subnet
                .parse::<Ipv4Net>()
                .map_err(|why| unreadable(&lease.subnet, &why))
        })
        .collect::<Result<Vec<_>>>()?;
    let highest = held.iter().map(Ipv4Net::broadcast).max();
    let all = || {
        network
            .subnets(leases.subnet_length)
            .map_err(|why| unreadable(&leases.network, &why))
    };
    let behind = |subnet: &Ipv4Net| highest.is_none_or(|highest| subnet.network() > highest);
    let nobodys = |subnet: &Ipv4Net| {
        subnet.network() != network.network()
            && !held
                .iter()
                .any(|other| other.contains(subnet) || subnet.contains(other))
    };
    let found = all()?.filter(behind).find(nobodys).or(all()?.find(nobodys));
    found.ok_or_else(|| {
        Error::new(
            ErrorCode::LimitExceeded,
            format!(
                "all subnets of {network} are held: remove hosts that are gone for good with `flynn-host remove`"
            ),
        )
    })
}

/// [`take`] in discoverd. Without `networks` the cluster must have been made already.
pub async fn take_in(
    discoverd: &DiscoveryClient,
    networks: Option<&Networks>,
    host: &str,
    address: Ipv4Addr,
) -> Result<(NetworkLeases, SubnetLease, ServiceMeta)> {
    let now = Timestamp::now();
    let ((leases, lease), meta) = discoverd
        .change_meta(HOST_SERVICE, |leases: &mut NetworkLeases| {
            if leases.network.is_empty() {
                *leases = networks
                    .ok_or_else(|| {
                        Error::conflict("this cluster has no network yet: bootstrap its first host")
                    })?
                    .document();
            }
            let lease = take(leases, host, address, now)?;
            Ok((leases.clone(), lease))
        })
        .await?;
    Ok((leases, lease, meta))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn networks(network: &str, subnet_length: u8) -> Networks {
        Networks {
            network: network.parse().unwrap(),
            subnet_length,
            network6: NetworkLeases::DEFAULT_NETWORK6.parse().unwrap(),
            direct: false,
        }
    }

    fn address(host: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, host)
    }

    proptest! {
        #[test]
        fn no_subnet_is_held_twice(steps in vec((0..20_u8, prop::bool::weighted(0.7)), 0..200)) {
            // Room for fifteen: one of the sixteen is never given.
            let mut leases = networks("10.0.0.0/24", 28).document();
            let mut model: BTreeMap<u8, String> = BTreeMap::new();
            for (host, takes) in steps {
                let id = format!("h{host}");
                if takes {
                    match take(&mut leases, &id, address(host), Timestamp::UNIX_EPOCH) {
                        Ok(lease) => {
                            prop_assert_ne!(&lease.subnet, "10.0.0.0/28");
                            let before = model.insert(host, lease.subnet.clone());
                            prop_assert!(before.is_none_or(|before| before == lease.subnet), "it changed");
                        }
                        Err(error) => {
                            prop_assert_eq!(error.code, ErrorCode::LimitExceeded);
                            prop_assert!(model.len() == 15 && !model.contains_key(&host));
                        }
                    }
                } else {
                    prop_assert_eq!(release(&mut leases, &id).is_some(), model.remove(&host).is_some());
                }
                let mut held: Vec<_> = leases.leases.values().map(|lease| lease.subnet.clone()).collect();
                held.sort();
                held.dedup();
                prop_assert_eq!(held.len(), model.len());
            }
        }
    }

    #[test]
    fn a_released_subnet_rests_while_there_are_others() {
        let mut leases = networks("10.0.0.0/24", 26).document();
        let now = Timestamp::UNIX_EPOCH;
        let mut subnet =
            |host: u8| take(&mut leases, &format!("h{host}"), address(host), now).map(|lease| lease.subnet);
        assert_eq!(subnet(1).unwrap(), "10.0.0.64/26");
        assert_eq!(subnet(2).unwrap(), "10.0.0.128/26");
        release(&mut leases, "h1");
        let mut subnet =
            |host: u8| take(&mut leases, &format!("h{host}"), address(host), now).map(|lease| lease.subnet);
        assert_eq!(subnet(3).unwrap(), "10.0.0.192/26");
        assert_eq!(subnet(4).unwrap(), "10.0.0.64/26");
        let error = subnet(5).unwrap_err();
        assert!(error.message.contains("flynn-host remove"), "{error}");
    }

    #[test]
    fn a_lease_follows_its_host_and_is_renewed_in_time() {
        let mut leases = networks("10.0.0.0/16", 24).document();
        let at = |hours: i64| Timestamp::UNIX_EPOCH + SignedDuration::from_hours(hours);
        let first = take(&mut leases, "a", address(1), at(0)).unwrap();
        let before = leases.clone();
        assert_eq!(take(&mut leases, "a", address(1), at(1)).unwrap(), first);
        assert_eq!(leases, before, "a renewal that is not due writes nothing");
        let later = take(&mut leases, "a", address(1), at(30)).unwrap();
        assert_eq!((&later.subnet, later.renewed_at), (&first.subnet, Some(at(30))));
        let moved = take(&mut leases, "a", address(9), at(30)).unwrap();
        assert_eq!((&moved.subnet, moved.address), (&first.subnet, address(9)));
        let error = take(&mut leases, "b", address(9), at(30)).unwrap_err();
        assert!(error.message.contains("flynn-host remove a"), "{error}");
    }

    #[test]
    fn networks_that_cannot_work_are_refused() {
        for (network, length, fits) in [
            ("100.100.0.0/16", 24, true),
            ("100.100.0.0/16", 20, true),
            ("100.100.0.0/16", 19, false),
            ("100.100.0.0/24", 24, false),
            ("100.100.0.0/16", 31, false),
            ("100.100.0.1/16", 24, false),
        ] {
            assert_eq!(
                networks(network, length).check().is_ok(),
                fits,
                "{network} {length}"
            );
        }
    }
}
