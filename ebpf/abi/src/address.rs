//! Addresses as they are on the wire.

use core::net::{Ipv4Addr, Ipv6Addr};

/// An IPv4 address, in network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Ipv4([u8; 4]);

/// An IPv6 address, in network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Ipv6([u8; 16]);

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Mac([u8; 6]);

impl Ipv4 {
    /// The address made of these bytes.
    #[inline]
    pub const fn new(octets: [u8; 4]) -> Self {
        Self(octets)
    }

    /// The four bytes, first the most significant.
    #[inline]
    pub const fn octets(self) -> [u8; 4] {
        self.0
    }
}

impl Ipv6 {
    /// The address made of these bytes.
    #[inline]
    pub const fn new(octets: [u8; 16]) -> Self {
        Self(octets)
    }

    /// The sixteen bytes, first the most significant.
    #[inline]
    pub const fn octets(self) -> [u8; 16] {
        self.0
    }
}

impl Mac {
    /// The address made of these bytes.
    #[inline]
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The six bytes, in the order in which they are sent.
    #[inline]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl From<Ipv4Addr> for Ipv4 {
    fn from(address: Ipv4Addr) -> Self {
        Self(address.octets())
    }
}

impl From<Ipv4> for Ipv4Addr {
    fn from(address: Ipv4) -> Self {
        Self::from(address.0)
    }
}

impl From<Ipv6Addr> for Ipv6 {
    fn from(address: Ipv6Addr) -> Self {
        Self(address.octets())
    }
}

impl From<Ipv6> for Ipv6Addr {
    fn from(address: Ipv6) -> Self {
        Self::from(address.0)
    }
}

const _: () = assert!(size_of::<Ipv4>() == 4 && align_of::<Ipv4>() == 1);
const _: () = assert!(size_of::<Ipv6>() == 16 && align_of::<Ipv6>() == 1);
const _: () = assert!(size_of::<Mac>() == 6 && align_of::<Mac>() == 1);
