//! What the programs know about the cluster network.

use crate::{Ipv4, Ipv6, Mac};

/// The one entry of the map `config`.
///
/// Addresses that it takes in belong to the cluster: there is an endpoint behind them or nothing. A family without a
/// network has a mask of zeros and its network is ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    /// The cluster's IPv4 network.
    pub network4: Ipv4,
    /// Its mask.
    pub mask4: Ipv4,
    /// The cluster's IPv6 network.
    pub network6: Ipv6,
    /// Its mask.
    pub mask6: Ipv6,
    /// What containers take for their gateway, and see frames come from.
    pub gateway: Mac,
    /// Bits of this type's constants.
    pub flags: u16,
    /// The part of `network4` that is this host's.
    pub subnet4: Ipv4,
    /// Its mask, which is that of every host's subnet.
    pub subnet_mask4: Ipv4,
    /// The address that other hosts send tunnelled packets to; zeros where it is not known.
    pub address: Ipv4,
    /// The largest packet that fits into the tunnel.
    pub tunnel_mtu: u32,
}

impl Config {
    /// Somebody has written this: until then every packet is dropped.
    pub const READY: u16 = 1;
    /// Some identity is isolated: without this, nobody needs to be looked up.
    pub const ISOLATION: u16 = 2;
    /// Of hosts, ordinary containers reach only ports that are open.
    pub const HOST_PORTS: u16 = 4;
}

const _: () = assert!(size_of::<Config>() == 64);
