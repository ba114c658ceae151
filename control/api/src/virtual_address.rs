//! Virtual addresses of services: where they come from and what follows from a service's number.
//!
//! A service's number is its own for as long as it exists. Its addresses are twice the number beyond the first of the
//! network, its leader's one more, in both families.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The greatest number that a service may have, however large the networks are.
pub const MAX_NUMBER: u32 = (1 << 15) - 1;

/// The networks that virtual addresses are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtualNetworks {
    /// `100.101.0.0/16`
    pub ipv4: Ipv4Net,
    /// `fd66:6c79:6e73::/64`
    pub ipv6: Ipv6Net,
}

/// A service's virtual addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VirtualAddresses {
    /// The service's number.
    pub number: u32,
    /// Any instance.
    pub ipv4: Ipv4Addr,
    /// Any instance.
    pub ipv6: Ipv6Addr,
    /// The leader.
    pub leader_ipv4: Ipv4Addr,
    /// The leader.
    pub leader_ipv6: Ipv6Addr,
}

impl Default for VirtualNetworks {
    fn default() -> Self {
        Self {
            ipv4: Ipv4Net::new_assert(Ipv4Addr::new(100, 101, 0, 0), 16),
            ipv6: Ipv6Net::new_assert(Ipv6Addr::new(0xfd66, 0x6c79, 0x6e73, 0, 0, 0, 0, 0), 64),
        }
    }
}

impl VirtualNetworks {
    /// Why these cannot be used.
    pub fn check(&self) -> Result<(), String> {
        if !(8..=24).contains(&self.ipv4.prefix_len()) || self.ipv4.trunc() != self.ipv4 {
            return Err(format!(
                "{} is no network of 8 to 24 bits such as 100.101.0.0/16: each service takes two addresses of it",
                self.ipv4
            ));
        }
        if self.ipv6.prefix_len() != 64 || self.ipv6.trunc() != self.ipv6 {
            return Err(format!(
                "{} is no network of 64 bits such as fd66:6c79:6e73::/64",
                self.ipv6
            ));
        }
        Ok(())
    }

    /// The greatest number whose addresses are in the networks.
    pub fn greatest(&self) -> u32 {
        let addresses = 1_u32 << (32 - u32::from(self.ipv4.prefix_len().max(1)));
        (addresses / 2 - 1).min(MAX_NUMBER)
    }

    /// The addresses of the service of this number, which must not be greater than [`VirtualNetworks::greatest`].
    pub fn addresses(&self, number: u32) -> VirtualAddresses {
        let ipv4 = self.ipv4.network().to_bits() + 2 * number;
        let ipv6 = self.ipv6.network().to_bits() + 2 * u128::from(number);
        VirtualAddresses {
            number,
            ipv4: Ipv4Addr::from_bits(ipv4),
            ipv6: Ipv6Addr::from_bits(ipv6),
            leader_ipv4: Ipv4Addr::from_bits(ipv4 + 1),
            leader_ipv6: Ipv6Addr::from_bits(ipv6 + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_services_share_an_address() {
        for length in [8, 16, 20, 24] {
            let networks = VirtualNetworks {
                ipv4: Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), length),
                ..VirtualNetworks::default()
            };
            networks.check().unwrap();
            let numbers = 1..=networks.greatest();
            let all: Vec<_> = numbers.clone().map(|number| networks.addresses(number)).collect();
            let ipv4: BTreeSet<_> = all.iter().flat_map(|of| [of.ipv4, of.leader_ipv4]).collect();
            let ipv6: BTreeSet<_> = all.iter().flat_map(|of| [of.ipv6, of.leader_ipv6]).collect();
            assert_eq!((ipv4.len(), ipv6.len()), (2 * all.len(), 2 * all.len()));
            assert!(ipv4.iter().all(|address| networks.ipv4.contains(address)));
            assert!(ipv6.iter().all(|address| networks.ipv6.contains(address)));
        }
    }

    #[test]
    fn networks_that_cannot_be_used() {
        let with = |ipv4: &str, ipv6: &str| VirtualNetworks {
            ipv4: ipv4.parse().unwrap(),
            ipv6: ipv6.parse().unwrap(),
        };
        assert!(VirtualNetworks::default().check().is_ok());
        assert_eq!(VirtualNetworks::default().greatest(), MAX_NUMBER);
        for (ipv4, ipv6) in [
            ("100.101.0.0/25", "fd00::/64"),
            ("0.0.0.0/0", "fd00::/64"),
            ("100.101.0.1/16", "fd00::/64"),
            ("100.101.0.0/16", "fd00::/63"),
            ("100.101.0.0/16", "fd00::1/64"),
        ] {
            assert!(with(ipv4, ipv6).check().is_err(), "{ipv4} {ipv6}");
        }
    }
}
