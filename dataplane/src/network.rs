//! The cluster network as the programs know it.

use std::net::{Ipv4Addr, Ipv6Addr};

use flynn_abi::Config;

/// The cluster's networks and its gateways' Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The IPv4 network that all containers of the cluster have their addresses from.
    pub cluster4: Prefix<Ipv4Addr>,
    /// The IPv6 network beside it.
    pub cluster6: Option<Prefix<Ipv6Addr>>,
    /// This host's address in the cluster network.
    pub gateway4: Ipv4Addr,
    /// The same for IPv6.
    pub gateway6: Option<Ipv6Addr>,
    /// How many bits of an address say which host's subnet it is of.
    pub subnet_length: u8,
    /// The address that other hosts send tunnelled packets to, where there is one.
    pub address: Option<Ipv4Addr>,
    /// The largest packet that fits into the tunnel.
    pub tunnel_mtu: u32,
    /// The interface index of the overlay's device, once there is one.
    pub device: Option<u32>,
    /// The Ethernet address that containers send to and see frames come from.
    pub gateway_mac: [u8; 6],
}

/// The addresses whose first `length` bits are those of `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix<A> {
    /// Any address of the network.
    pub address: A,
    /// How many bits make the network.
    pub length: u8,
}

impl Network {
    pub(crate) fn config(&self) -> Config {
        let (mask4, subnet_mask4) = (mask4(self.cluster4.length), mask4(self.subnet_length));
        let (network6, mask6) = self.cluster6.map_or((0, 0), |prefix| {
            let mask = u128::MAX
                .checked_shl(128 - u32::from(prefix.length.min(128)))
                .unwrap_or(0);
            (prefix.address.to_bits() & mask, mask)
        });
        Config {
            network4: Ipv4Addr::from_bits(self.cluster4.address.to_bits() & mask4).into(),
            mask4: Ipv4Addr::from_bits(mask4).into(),
            network6: Ipv6Addr::from_bits(network6).into(),
            mask6: Ipv6Addr::from_bits(mask6).into(),
            gateway: flynn_abi::Mac::new(self.gateway_mac),
            flags: Config::READY,
            subnet4: Ipv4Addr::from_bits(self.gateway4.to_bits() & subnet_mask4).into(),
            subnet_mask4: Ipv4Addr::from_bits(subnet_mask4).into(),
            address: self.address.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
            tunnel_mtu: self.tunnel_mtu,
        }
    }
}

fn mask4(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0)
}
