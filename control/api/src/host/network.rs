//! The network of a host, as it is told and shown.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The network of a host. Counters are those since the data plane was begun.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkStatus {
    /// The host's subnet.
    pub subnet: String,
    /// The gateway address.
    pub gateway: Option<Ipv4Addr>,
    /// The cluster's network.
    #[serde(default)]
    pub network: String,
    /// The IPv6 network beside it.
    #[serde(default)]
    pub network6: String,
    /// Containers of this host with their counters.
    pub endpoints: Vec<EndpointStatus>,
    /// The hosts of the cluster, this one among them.
    #[serde(default)]
    pub hosts: Vec<NetworkHost>,
    /// Containers of other hosts.
    #[serde(default)]
    pub remote: Vec<RemoteEndpoint>,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// How full the data plane's maps are.
    #[serde(default)]
    pub maps: Vec<MapFill>,
}

/// One container's address and counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EndpointStatus {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its job.
    pub job_id: String,
    /// The name of its app; empty for an operator's own job.
    #[serde(default)]
    pub app: String,
    /// Its process type.
    #[serde(default)]
    pub process_type: String,
    /// The number by which the data plane knows its app.
    #[serde(default)]
    pub identity: u32,
    /// Of the platform: others reach only `open_ports`.
    #[serde(default)]
    pub system: bool,
    /// Only hosts and the apps on its list reach it.
    #[serde(default)]
    pub isolated: bool,
    /// Ports with a service: `5432/tcp`.
    #[serde(default)]
    pub open_ports: Vec<String>,
    /// Bytes a second that it may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_limit: Option<u64>,
    /// Bytes a second that it may be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_limit: Option<u64>,
    /// From the container.
    pub tx_packets: u64,
    /// From the container.
    pub tx_bytes: u64,
    /// To the container.
    pub rx_packets: u64,
    /// To the container.
    pub rx_bytes: u64,
    /// Packets from the container that were dropped, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tx_drops: BTreeMap<String, u64>,
    /// Packets to the container that were dropped on its host, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rx_drops: BTreeMap<String, u64>,
}

/// A host of the cluster, as another sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkHost {
    /// Its id.
    pub id: String,
    /// Where it is reached.
    pub address: Ipv4Addr,
    /// Its subnet.
    pub subnet: String,
    /// It is the one that says so.
    #[serde(default)]
    pub own: bool,
    /// How packets get there: `own`, `encrypted`, `tunnel`, `direct`, or `none` where there is no route.
    pub way: String,
    /// The neighbour that they are handed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<Ipv4Addr>,
    /// The interface that they leave by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// How many containers it has.
    pub endpoints: u64,
    /// When it renewed its lease last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewed_at: Option<Timestamp>,
}

/// A container of another host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RemoteEndpoint {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its host.
    pub host_id: String,
    /// The number by which the data plane knows its app.
    pub identity: u32,
}

/// A connection, or a flow of datagrams, of a container of this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Flow {
    /// `tcp` or `udp`. Datagrams are seen where a socket is connected, or where they came by a route by port: as long as
    /// there was one within the last minute.
    #[serde(default = "super::job::tcp")]
    pub protocol: String,
    /// The container's job.
    pub job_id: String,
    /// The name of its app; empty for an operator's own job.
    pub app: String,
    /// Its process type.
    pub process_type: String,
    /// The container's service that the connection came to; absent where the container opened it, or has none there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The container's side.
    pub local: std::net::SocketAddr,
    /// The other.
    pub remote: std::net::SocketAddr,
    /// Where the client sent it to, if it came by a route by port and is balanced in the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<std::net::SocketAddr>,
    /// TCP's smoothed round-trip time, in microseconds.
    pub rtt_us: u32,
    /// Segments that the container sent again.
    pub retransmits: u32,
    /// Bytes that the other side has acknowledged over TCP.
    pub tx_bytes: u64,
    /// Bytes that came over TCP.
    pub rx_bytes: u64,
}

/// A service as sockets of this host's jobs find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ServiceStatus {
    /// Its name; empty where only the data plane still knows its number.
    pub service: String,
    /// Its virtual addresses.
    pub addresses: crate::discovery::VirtualAddresses,
    /// Where sockets that go there get to.
    pub instances: Vec<ServiceInstance>,
}

/// One instance of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ServiceInstance {
    /// The index of its registration.
    pub index: u64,
    /// Where it is.
    pub address: std::net::IpAddr,
    /// The IPv6 address of the same container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<std::net::Ipv6Addr>,
    /// It is the leader.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leader: bool,
}

/// How full a map of the data plane is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MapFill {
    /// Its name.
    pub name: String,
    /// Entries that it has.
    pub entries: u64,
    /// Entries that there is room for.
    pub room: u64,
}

/// Tells the daemon about its network: sent by bootstrap once the host holds a subnet lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkConfig {
    /// The cluster's network, `100.100.0.0/16`.
    pub network: String,
    /// This host's part of it, `100.100.1.0/24`.
    pub subnet: String,
    /// The IPv6 network beside it.
    #[serde(default = "crate::discovery::NetworkLeases::default_network6")]
    pub network6: String,
}
