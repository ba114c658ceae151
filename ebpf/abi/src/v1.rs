//! Layout 1, for taking its maps over. `endpoints4`, `endpoints6`, `counters` and `drops` had what they have today.

use crate::{Ipv4, Ipv6, Mac};

/// The one entry of the map `config`.
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
    /// Only [`crate::Config::READY`].
    pub flags: u16,
}

impl From<Config> for crate::Config {
    fn from(old: Config) -> Self {
        Self {
            network4: old.network4,
            mask4: old.mask4,
            network6: old.network6,
            mask6: old.mask6,
            gateway: old.gateway,
            flags: old.flags,
            ..Self::default()
        }
    }
}

const _: () = assert!(size_of::<Config>() == 48);
