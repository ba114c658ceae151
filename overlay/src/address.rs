//! What follows from an address.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv6Net;

/// What the host's ends of veths begin with.
pub(crate) const PREFIX: &str = "fv";

/// The name of the host's end of the veth of the container with this address.
pub fn host_interface(address: Ipv4Addr) -> String {
    format!("{PREFIX}{:08x}", address.to_bits())
}

/// The address of the container whose veth's host end has this name.
pub(crate) fn of_host_interface(name: &str) -> Option<Ipv4Addr> {
    let digits = name.strip_prefix(PREFIX).filter(|digits| digits.len() == 8)?;
    let address = u32::from_str_radix(digits, 16).ok().map(Ipv4Addr::from_bits)?;
    (host_interface(address) == name).then_some(address)
}

/// The Ethernet address that goes with an address: locally administered, and no two addresses share one.
pub fn mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x66, a, b, c, d]
}

/// The IPv6 address that goes with an address: the IPv4 address is its last 32 bits.
pub(crate) fn ipv6(network: Ipv6Net, address: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(network.network().to_bits() | u128::from(address.to_bits()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn names_lead_back(bits: u32) {
            let address = Ipv4Addr::from_bits(bits);
            let name = host_interface(address);
            prop_assert!(name.len() < 16);
            prop_assert_eq!(of_host_interface(&name), Some(address));
        }

        #[test]
        fn nothing_else_is_taken_for_a_name(name in "(fv)?[-+0-9a-fA-F]{0,10}") {
            if let Some(address) = of_host_interface(&name) {
                prop_assert_eq!(host_interface(address), name);
            }
        }
    }

    #[test]
    fn the_ipv6_address_ends_in_the_ipv4_address() {
        let network: Ipv6Net = "fd66:6c79:6e6e::/64".parse().unwrap();
        let address = ipv6(network, Ipv4Addr::new(100, 100, 1, 5));
        assert_eq!(address, "fd66:6c79:6e6e::6464:105".parse::<Ipv6Addr>().unwrap());
    }
}
