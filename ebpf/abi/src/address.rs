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

    /// An IPv4 address in the last four bytes, behind zeros.
    #[inline]
    pub const fn mapped(address: Ipv4) -> Self {
        let [a, b, c, d] = address.0;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d])
    }

    /// The last four bytes.
    #[inline]
    pub const fn last(self) -> Ipv4 {
        let [.., a, b, c, d] = self.0;
        Ipv4([a, b, c, d])
    }

    /// The sixteen bytes as four numbers.
    #[inline]
    pub const fn words(self) -> [u32; 4] {
        [self.word(0), self.word(4), self.word(8), self.word(12)]
    }

    #[inline]
    const fn word(self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
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
