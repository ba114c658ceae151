//! Who is behind an address.

use crate::Mac;

/// A value of the maps `endpoints4` and `endpoints6`, whose keys are the addresses of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    /// The host's end of the container's veth, for [`Endpoint::CONTAINER`].
    pub ifindex: u32,
    /// Its place in the map `counters`, for [`Endpoint::CONTAINER`].
    pub slot: u32,
    /// The container's Ethernet address, for [`Endpoint::CONTAINER`].
    pub mac: Mac,
    /// Bits of this type's constants.
    pub flags: u16,
    /// Zeros. Room for the host that a remote endpoint is on and for the identity of its app.
    pub reserved: [u8; 16],
}

impl Endpoint {
    /// A container on this host.
    pub const CONTAINER: u16 = 1;
    /// This host itself, at its gateway address.
    pub const GATEWAY: u16 = 2;
}

const _: () = assert!(size_of::<Endpoint>() == 32);
