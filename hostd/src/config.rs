//! Who this host is: `host.json` in the state directory.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;

use flynn_api::Meta;
use flynn_api::host::NetworkConfig;
use serde::{Deserialize, Serialize};

use crate::encryption::Mode;
use crate::files;

/// The file's name in the state directory.
pub const FILE: &str = "host.json";

/// What a host knows of itself and keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostConfig {
    /// The form of this file.
    pub version: u32,
    /// Letters, digits and underscores.
    pub id: String,
    /// Where the host is reached.
    pub address: Ipv4Addr,
    /// Tags for placement.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub tags: Meta,
    /// Whether its jobs are to go to other hosts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// The host's part of the cluster's network, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkConfig>,
    /// Whether what goes to other hosts is encrypted, where the operator has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Mode>,
    /// What other commands of other versions keep here stays.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

/// What was said on the command line.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The host's id.
    pub id: Option<String>,
    /// Where it is reached.
    pub address: Option<Ipv4Addr>,
    /// Tags.
    pub tags: Option<Meta>,
    /// Whether what goes to other hosts is encrypted.
    pub encryption: Option<Mode>,
}

impl HostConfig {
    /// Reads the file, makes what is missing, applies the overrides, and writes what has changed. An id can be chosen
    /// only once: jobs, leases and certificates carry it.
    pub fn load(state: &Path, overrides: &Overrides) -> io::Result<Self> {
        let path = state.join(FILE);
        let stored: Option<Self> = files::read_json(&path)?;
        let mut config = match stored.clone() {
            Some(config) => config,
            None => Self {
                version: 1,
                id: overrides.id.clone().map_or_else(default_id, Ok)?,
                address: overrides.address.map_or_else(default_address, Ok)?,
                tags: Meta::new(),
                draining: false,
                network: None,
                encryption: None,
                other: serde_json::Map::new(),
            },
        };
        if let Some(id) = &overrides.id
            && *id != config.id
        {
            return Err(invalid(format!(
                "this host is {} by {}; its jobs and certificates carry that id. Leave --id out, or start with an \
                 empty state directory",
                config.id,
                path.display()
            )));
        }
        check_id(&config.id)?;
        if let Some(address) = overrides.address {
            config.address = address;
        }
        if let Some(tags) = &overrides.tags {
            config.tags.clone_from(tags);
        }
        config.encryption = overrides.encryption.or(config.encryption);
        if stored.as_ref() != Some(&config) {
            config.save(state)?;
        }
        Ok(config)
    }

    /// What is known of a host, if there is one with this state directory. Nothing is written.
    pub fn peek(state: &Path) -> Option<Self> {
        files::read_json(&state.join(FILE)).ok().flatten()
    }

    /// Writes the file.
    pub fn save(&self, state: &Path) -> io::Result<()> {
        files::write_json(&state.join(FILE), self)
    }
}

/// Whether a text can be a host's id: it is the part of a job's id before the dash, and a label in certificates.
fn check_id(id: &str) -> io::Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if !id.is_empty() && id.len() <= 24 && id.chars().all(fits) {
        return Ok(());
    }
    Err(invalid(format!(
        "{id:?} cannot be a host's id: give --id one to 24 letters, digits and underscores (no dash)"
    )))
}

fn default_id() -> io::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    let name = id_of_hostname(name.trim());
    if let Some(name) = name {
        return Ok(name);
    }
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    match machine.trim().get(..12) {
        Some(start) => Ok(format!("host_{start}")),
        None => Err(invalid(
            "this machine has neither a host name nor a machine id: give --id".into(),
        )),
    }
}

/// The first label of a host name in the letters of an id; none when it says nothing.
fn id_of_hostname(name: &str) -> Option<String> {
    let label = name.split('.').next().unwrap_or_default();
    let id: String = label
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '_'
            }
        })
        .take(24)
        .collect();
    (!matches!(id.as_str(), "" | "localhost")).then_some(id)
}

/// The address that this machine would speak to the outside with. No packet is sent.
pub(crate) fn default_address() -> io::Result<Ipv4Addr> {
    let outside = || -> io::Result<std::net::SocketAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    };
    match outside() {
        Ok(std::net::SocketAddr::V4(address)) if !address.ip().is_unspecified() => Ok(*address.ip()),
        _ => Err(invalid(
            "this machine has no default route to tell its address by: give --address".into(),
        )),
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_become_ids() {
        assert_eq!(id_of_hostname("Node-1.example.com").as_deref(), Some("node_1"));
        assert_eq!(id_of_hostname("localhost.localdomain"), None);
        assert!(check_id("node_1").is_ok() && check_id("node-1").is_err() && check_id("").is_err());
    }

    #[test]
    fn the_id_stays_and_foreign_settings_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let overrides = Overrides {
            id: Some("one".into()),
            address: Some(Ipv4Addr::new(192, 0, 2, 7)),
            tags: None,
            encryption: None,
        };
        HostConfig::load(dir.path(), &overrides).unwrap();
        let text = std::fs::read_to_string(dir.path().join(FILE))
            .unwrap()
            .replace('}', r#","new":1}"#);
        std::fs::write(dir.path().join(FILE), text).unwrap();
        let mut config = HostConfig::load(dir.path(), &Overrides::default()).unwrap();
        assert_eq!(
            (config.id.as_str(), config.other["new"].as_i64()),
            ("one", Some(1))
        );
        config.network = Some(NetworkConfig {
            network: "n".into(),
            subnet: "s".into(),
            network6: "n6".into(),
        });
        config.save(dir.path()).unwrap();
        assert_eq!(
            HostConfig::load(dir.path(), &Overrides::default()).unwrap(),
            config
        );
        let other = Overrides {
            id: Some("two".into()),
            ..Overrides::default()
        };
        assert!(HostConfig::load(dir.path(), &other).is_err());
    }
}
