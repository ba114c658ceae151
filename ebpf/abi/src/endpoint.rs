//! Who is behind an address.

use crate::{Mac, policy::Identity};

/// A value of the maps `endpoints4` and `endpoints6`, whose keys are the addresses of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    /// The host's end of the container's veth, for [`Endpoint::CONTAINER`]; the overlay's device, for
    /// [`Endpoint::GATEWAY`], or zero while that is not known.
    pub ifindex: u32,
    /// Its place in the map `counters`, for [`Endpoint::CONTAINER`].
    pub slot: u32,
    /// The container's Ethernet address, for [`Endpoint::CONTAINER`].
    pub mac: Mac,
    /// Bits of this type's constants.
    pub flags: u16,
    /// Whose it is.
    pub identity: Identity,
    /// Not 0: packets from and to it are translated one by one (the map `service_packets`). The program that begins with
    /// the first of them writes it; user space keeps what it finds. A field of its own, so that neither ever writes what
    /// is the other's.
    pub translates: u32,
    /// Zeros.
    pub reserved: [u8; 8],
}

impl Endpoint {
    /// A container on this host.
    pub const CONTAINER: u16 = 1;
    /// This host itself, at its gateway address.
    pub const GATEWAY: u16 = 2;
    /// A container on another host. Such entries say whose it is; the way there is in the map `hosts4`.
    pub const REMOTE: u16 = 4;
    /// Beside [`Endpoint::CONTAINER`]: part of the platform. Others reach only those of its ports that are open.
    pub const SYSTEM: u16 = 8;
    /// Beside [`Endpoint::CONTAINER`]: the map `limits` has something for it.
    pub const LIMITED: u16 = 16;
}

const _: () = assert!(size_of::<Endpoint>() == 32);
