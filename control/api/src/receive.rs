//! The image receiving API (`images.<domain>`): docker layers in, artifacts out.
//!
//! Authentication: HTTP basic, any user name, the password one of the cluster's keys.
//!
//! | call | what |
//! | --- | --- |
//! | `GET /layer/{id}` | the [`Layer`](crate::image::Layer) made from a docker layer before; 404 when it must be sent |
//! | `POST /layer/{id}` | takes the docker layer: a tar, plain or compressed with gzip or zstd |
//! | `POST /artifact` | makes an [`Artifact`](crate::image::Artifact) of layers that are there ([`NewImage`]) |
//!
//! A docker layer's id is the SHA-256 digest of its uncompressed tar, `sha256:<64 hex digits>`, as images list them
//! in `rootfs.diff_ids`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Meta;

/// Asks for an artifact.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewImage {
    /// The image's configuration, as it is.
    pub config: DockerImage,
    /// Labels for the artifact.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
}

/// The parts of an image's configuration (docker's and OCI's) that mean something here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DockerImage {
    /// `amd64`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub architecture: String,
    /// `linux`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub os: String,
    /// How containers are started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<DockerConfig>,
    /// Its layers.
    pub rootfs: DockerRootfs,
}

/// The layers of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DockerRootfs {
    /// `layers`.
    #[serde(rename = "type", default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Ids of the layers, lowest first.
    pub diff_ids: Vec<String>,
}

/// How containers of an image are started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DockerConfig {
    /// `user`, `user:group`, names or numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// `NAME=value`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<Vec<String>>,
    /// The program with its first arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// More arguments, or the program with its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Where it is started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// `80/tcp`, ….
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
}

impl DockerImage {
    /// The TCP ports that the image says it listens on, in order.
    pub fn tcp_ports(&self) -> Vec<u16> {
        let ports = self
            .config
            .as_ref()
            .and_then(|config| config.exposed_ports.as_ref());
        let mut ports: Vec<u16> = ports
            .into_iter()
            .flat_map(BTreeMap::keys)
            .filter_map(|port| port.strip_suffix("/tcp").unwrap_or(port).parse().ok())
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }
}
