//! Routes and certificates: what the router serves.

use std::ops::RangeInclusive;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The kind of a route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    /// By host name and path.
    #[default]
    Http,
    /// By port.
    Tcp,
    /// By port, for datagrams.
    Udp,
}

impl RouteKind {
    /// Its word in ids and paths.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Ports of hosts that no TCP route may have, with who has them: a route would take what comes there from them.
pub const SYSTEM_PORTS: [(RangeInclusive<u16>, &str); 6] = [
    (1..=1023, "the system (ssh, DNS, the router's HTTP and HTTPS, …)"),
    (1110..=1119, "the platform (discoverd, the host API, heartbeats)"),
    (5000..=5002, "the platform (the status of its components)"),
    (5432..=5433, "PostgreSQL"),
    (8472..=8472, "the cluster network"),
    (51820..=51820, "the encryption between hosts"),
];

/// Who has a port of the system, which no TCP route may have.
pub fn system_port(port: u16) -> Option<&'static str> {
    SYSTEM_PORTS
        .iter()
        .find_map(|(ports, owner)| ports.contains(&port).then_some(*owner))
}

/// Sends requests that match to a service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// The kind.
    #[serde(rename = "type", default)]
    pub kind: RouteKind,
    /// `http/<uuid>`, `tcp/<uuid>` or `udp/<uuid>`, given by the controller.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// What it belongs to: `controller/apps/<app id>`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub parent_ref: String,
    /// The service in discoverd.
    pub service: String,
    /// The port that it listens on; 0 = the default (HTTP), or one that the controller chooses (TCP, UDP).
    #[serde(default)]
    pub port: u16,
    /// Only to the service's leader.
    #[serde(default)]
    pub leader: bool,
    /// HTTP: the host name, `*.example.com`, or `*`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// HTTP: the path prefix, beginning and ending with `/`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// HTTP: its certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Certificate>,
    /// Keep a client on its backend: by a cookie (HTTP), by its address (TCP, UDP).
    #[serde(default)]
    pub sticky: bool,
    /// Let requests under way finish when a backend goes.
    #[serde(default)]
    pub drain_backends: bool,
    /// HTTP: close each client connection after its request.
    #[serde(default)]
    pub disable_keep_alives: bool,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When it was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
}

/// A certificate chain with its key.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Given by the controller.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// PEM, leaf first.
    pub cert: String,
    /// PEM. Only the router and the controller ever see it; listings for people leave it empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate")
            .field("id", &self.id)
            .field("cert", &self.cert)
            .finish_non_exhaustive()
    }
}
