//! What the eBPF programs and user space agree on: the keys and values of the maps, the flags in them, and the
//! reasons for which a packet is dropped.
//!
//! Nothing here acts. Addresses are kept as on the wire, in byte arrays behind types of their own, so that a number in
//! the wrong byte order cannot be written down. All types are `repr(C)` without padding, and their sizes are asserted:
//! a change of one is a change of [`LAYOUT`], which names the directory that maps are pinned in.
#![no_std]

mod address;
mod config;
mod counters;
mod drop_reason;
mod endpoint;
#[cfg(feature = "user")]
mod user;

pub use address::{Ipv4, Ipv6, Mac};
pub use config::Config;
pub use counters::Counters;
pub use drop_reason::DropReason;
pub use endpoint::Endpoint;

/// The version of all layouts in this crate together. Maps of another version are never reused.
pub const LAYOUT: u32 = 1;

/// How many endpoints of each address family the cluster may have.
pub const MAX_ENDPOINTS: u32 = 1 << 17;

/// How many of them may be on this host, and so have counters.
pub const MAX_LOCAL_ENDPOINTS: u32 = 1 << 12;

/// How many reasons for a drop there is room for.
pub const MAX_DROP_REASONS: u32 = 64;

/// The UDP port of VXLAN between hosts.
pub const VXLAN_PORT: u16 = 8472;
