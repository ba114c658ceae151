//! The host API (port 1113 and `/run/flynn/host.sock`): jobs of one host.
//!
//! | call | what |
//! | --- | --- |
//! | `GET /host/status` | [`HostStatus`] |
//! | `GET /host/jobs` | `{id: `[`ActiveJob`]`}`; with `Accept: text/event-stream` a stream of [`JobEvent`] |
//! | `GET /host/jobs/{id}` | [`ActiveJob`] |
//! | `PUT /host/jobs/{id}` | starts a [`Job`]; answers when its supervisor has taken it |
//! | `DELETE /host/jobs/{id}` | stops it; answers when it is stopping |
//! | `PUT /host/jobs/{id}/signal/{n}` | sends signal `n` to its process |
//! | `PUT /host/jobs/{id}/limits` | changes limits of the running job, [`Resources`](crate::resources::Resources) with some of [its `LIVE`](crate::resources::Resources::LIVE) |
//! | `PUT /host/jobs/{id}/discoverd-deregister` | takes its instances out of discoverd, ahead of a stop |
//! | `GET /host/jobs/{id}/log?lines=n&follow=true` | a stream of [`LogLine`] |
//! | `POST /attach` | upgrade `flynn-attach/0` after an [`AttachRequest`]; frames of [`attach`] |
//! | `GET /host/network` | [`NetworkStatus`] |
//! | `GET /host/network/flows` | `[`[`Flow`]`]`: the established TCP connections of this host's containers |
//! | `GET /host/network/services` | `[`[`ServiceStatus`]`]`: which virtual addresses lead to which instances |
//! | `PUT /host/tags` | sets the tags for placement, all of them |
//! | `PUT /host/drain`, `DELETE` | has the host's jobs go to other hosts; no longer |
//! | `POST /host/update` | has another program go on with the daemon's work ([`Update`], [`Updated`]) |
//! | `GET /host/layers` | `[`[`StoredLayer`](crate::image::StoredLayer)`]` |
//! | `GET /sinks`, `PUT` and `DELETE /sinks/{id}` | [`SinkStatus`](crate::sink::SinkStatus)es; has logs sent to a [`Sink`](crate::sink::Sink), or no more |
//! | `GET /openapi.json` | all of this as an OpenAPI document |
//! | `GET /metrics` | counters and gauges of jobs, of the network and of log sinks, in Prometheus' text format |
//! | `PUT /host/layers/{digest}`, `GET` | puts a squashfs layer into the store; fetches it |
//! | `POST /host/layers/gc` | removes layers that nobody needs ([`LayerGc`](crate::image::LayerGc)) |
//! | `POST /host/layers/verify` | reads all layers, sets damaged ones aside ([`VerifiedLayers`](crate::image::VerifiedLayers)) |
//! | `GET /storage/providers`, `POST` | [`Provider`](crate::volume::Provider)s; adds a [`NewProvider`](crate::volume::NewProvider) |
//! | `DELETE /storage/providers/{id}` | takes one without volumes off the list |
//! | `POST /storage/providers/{id}/volumes` | makes a [`NewVolume`](crate::volume::NewVolume) |
//! | `GET /storage/volumes`, `GET` and `DELETE /storage/volumes/{id}` | [`Volume`](crate::volume::Volume)s |
//! | `PUT /storage/volumes/{id}/snapshot`, `…/fork` | makes a [`Copy`](crate::volume::Copy) of it |
//! | `PUT /storage/volumes/{id}/rollback` | makes it what it was ([`Rollback`](crate::volume::Rollback)) |
//! | `PUT /storage/volumes/{id}/resize` | has it hold more, or less ([`Resize`](crate::volume::Resize)) |
//! | `PUT /storage/volumes/{id}/decommission` | sets it aside, under another id |
//! | `GET /storage/volumes/{id}/send?from=` | a snapshot, or what differs from an earlier one, as a stream |
//! | `POST /storage/providers/{id}/receive` | takes such a stream in |
//! | `POST /storage/gc` | removes what was decommissioned ([`Gc`](crate::volume::Gc)) |

mod job;
mod network;
mod streams;

pub use job::*;
pub use network::*;
pub use streams::*;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::Meta;

/// The port of the host API.
pub const PORT: u16 = 1113;

/// The root-only Unix socket of the host API.
pub const SOCKET: &str = "/run/flynn/host.sock";

/// What is to go on with the daemon's work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Update {
    /// A file on the host, by its absolute path, which is put in the place of the daemon's program if it can take over. When
    /// absent, what is in that place by now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binary: Option<String>,
}

/// Another daemon serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Updated {
    /// The version of the one before.
    pub from: String,
    /// Its own version.
    pub to: String,
    /// Its process.
    pub pid: u32,
}

/// Something that not every kernel has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct KernelFeature {
    /// Its name in the kernel's own words.
    pub name: String,
    /// Whether it is there, and so is used.
    pub present: bool,
    /// What it is used for, or what is done without it.
    pub detail: String,
}

/// What a host is and how it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostStatus {
    /// Its id: letters, digits and underscores; no dash.
    pub id: String,
    /// The daemon's pid.
    pub pid: u32,
    /// Version of `flynn-host`.
    pub version: String,
    /// Where its API is reached: `address:1113`.
    pub url: String,
    /// Tags for placement.
    #[serde(default)]
    pub tags: Meta,
    /// It is given no jobs, and those that it has go to other hosts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Its subnet, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// The gateway address of its containers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// Cores, in thousandths.
    pub cpu: u64,
    /// Memory in bytes.
    pub memory: u64,
    /// Free bytes in the state directory.
    pub disk_free: u64,
    /// What this host cannot do, and why.
    #[serde(default)]
    pub notices: Vec<String>,
    /// What the kernel has, and has not, of what the network and containers make use of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<KernelFeature>,
    /// The kernel's boot id.
    pub boot_id: String,
}
