//! Floating addresses: each is at one healthy host, and within a second at another when that is lost.
//!
//! [`core`] decides, [`packet`] and [`frame`] are what goes over the wire, [`kernel`] and [`uplink`] are the kernel's
//! part, and [`run`] joins them in a thread of its own, which a busy daemon does not delay. [`follow`] tells it of the cluster's
//! hosts and addresses, which [`command`] changes.
//!
//! No fence is needed: each host balances by the same tables, so that it does not matter which one a packet comes to.

pub mod command;
mod core;
mod follow;
mod frame;
mod kernel;
mod packet;
mod shell;
mod uplink;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use follow::follow;
pub use shell::run;

/// The UDP port of heartbeats.
pub const PORT: u16 = 1115;

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// How many bits its network has.
    pub length: u8,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted =
            || format!("{text:?}: an address with its network's length is wanted, such as 192.0.2.10/24");
        let (ip, length) = text.split_once('/').ok_or_else(wanted)?;
        let ip: IpAddr = ip.parse().map_err(|_| wanted())?;
        let length: u8 = length.parse().map_err(|_| wanted())?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        if !(1..=most).contains(&length) {
            return Err(wanted());
        }
        if ip.is_loopback() || ip.is_multicast() || ip.is_unspecified() {
            return Err(format!("{ip} is no address that a host can have for others"));
        }
        Ok(Self { ip, length })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.length)
    }
}

/// What the thread is told.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// Heartbeats are authenticated with it.
    pub key: [u8; 32],
    /// The cluster's hosts by id, this one as well.
    pub hosts: BTreeMap<String, Ipv4Addr>,
    /// The floating addresses.
    pub addresses: BTreeSet<Address>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("hosts", &self.hosts)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

/// The addresses that this host holds now, for whoever wants to know.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<BTreeSet<IpAddr>>>);

impl Held {
    /// Those addresses.
    pub fn get(&self) -> BTreeSet<IpAddr> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, held: BTreeSet<IpAddr>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for good in ["192.0.2.10/24", "10.0.0.1/32", "2001:db8::1/64"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in [
            "192.0.2.10",
            "192.0.2.10/0",
            "192.0.2.10/33",
            "2001:db8::1/129",
            "127.0.0.1/8",
            "224.0.0.1/4",
            "x/24",
            "192.0.2.10/-1",
            "",
            "/",
            "::/64",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
