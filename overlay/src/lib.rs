//! The cluster network of one host: an address for each container, and a way to it, from whichever host.
//!
//! **In**: the cluster's and this host's networks ([`NetworkConfig`]), the network namespaces of containers that come
//! and go ([`Network::attach`], [`Network::detach`]), the other hosts ([`Network::set_hosts`]), their containers and the
//! cluster's policy ([`Network::set_remote`], [`Network::set_policy`]). **Out**: containers which reach one another, the host and what is
//! outside, by addresses that are their own; what each sent and received; drops by reason.
//!
//! How it is laid out: a container has one interface, `eth0`, with a /32 and a /128, a default route to the host's
//! gateway address, and a fixed neighbour entry for that. Its other end in the host's namespace is called after the
//! address ([`host_interface`]) and carries the eBPF program which decides where packets go. The device `flynn0` carries
//! the gateway address and the cluster's routes: it is the host's own way to containers, with a program at its egress,
//! and the VXLAN device for other hosts. There is no bridge, no ARP, and no rule per container.
//!
//! Between hosts, which have IPv4 addresses: a container of another host is reached by what its subnet says alone, so
//! that a new container is no news to anybody. Its packets are put into VXLAN by the program at the sender's veth and
//! taken out by the one at the receiver's uplink; only what those cannot do by hand goes through the device. The network
//! identifier in the tunnel is the sender's identity, by which the receiver holds the policy.
//!
//! What goes to other hosts is encrypted where they and the kernel can (`wireguard`).
//!
//! Invariants:
//! - All state is in the kernel. A [`Network`] is a hand on it: dropping one, or the death of the process, changes
//!   nothing for a container; [`Network::up`] and [`Network::reconcile`] find everything again.
//! - Every step can be done again: `up`, `attach` after a failed `attach`, `detach`.
//! - Everything happens in the network namespace of the calling process, and in those it is handed.
//! - Which addresses are free is decided by [`Allocator`], which does nothing else and touches nothing.

mod address;
mod allocator;
mod attach;
mod config;
mod error;
mod hosts;
mod masquerade;
mod netlink;
mod network;
mod sysctl;
mod wireguard;

pub use address::{host_interface, mac};
pub use allocator::Allocator;
pub use config::NetworkConfig;
pub use error::{Error, Result};
pub use flynn_dataplane::{
    AppPolicy, Attachment, Container, DropReason, Drops, HOST, Identity, Limits, MAX_IDENTITY, Policy, Port,
    Protocol, Traffic, UNKNOWN, Way,
};
pub use hosts::{Host, Reached, RemoteEndpoint};
pub use masquerade::check_tool;
pub use network::{Endpoint, Network, Reconciled};
pub use wireguard::{Encryption, Key, PORT as WIREGUARD_PORT, Peer, PrivateKey, Wireguard};
