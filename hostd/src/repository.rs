//! Where releases come from: repositories after The Update Framework, local directories or at an HTTP server.
//!
//! In: a repository, and the root of trust that the operator gave this host once. Out: images and programs of a release
//! that whoever holds the channel's key has published, and nobody else, and not one that was withdrawn.
//!
//! | below the repository | what |
//! | --- | --- |
//! | `metadata/N.root.json` | whose keys are trusted; signed offline |
//! | `metadata/N.targets.json` | the channels and their keys; signed offline |
//! | `metadata/N.CHANNEL.json` | the files of a channel, by name, length and SHA-256 |
//! | `metadata/N.snapshot.json`, `metadata/timestamp.json` | which of these are the newest; signed online, for days |
//! | `targets/CHANNEL/release.json` | the channel's release: a [`Release`] |
//! | `targets/CHANNEL/VERSION/release.json` | each release of the channel |
//! | `targets/CHANNEL/VERSION/NAME` | its programs |
//! | `targets/CHANNEL/layers/ID.squashfs` | layers of all releases |
//!
//! Files are named `SHA256.NAME` in their directory, so that an old one never stands where a new one is looked for.
//!
//! Invariants:
//! - What a host has seen is kept on its disk, and nothing older is taken for new ([`trust`]).
//! - Nothing is used before it is verified: a layer by the SHA-512/256 that is its name, in a manifest that is signed.
//! - All that comes from outside has a bound, in bytes and in silence.

pub mod command;
pub mod download;
mod explain;
mod maker;
mod signer;
mod source;
#[cfg(test)]
mod tests;
mod trust;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use flynn_api::image::ImageManifest;
use serde::{Deserialize, Serialize};

pub use source::Source;
pub use trust::{Repository, Wanted};

/// The form of [`Release`] that there is.
const RELEASE_V1: &str = "application/vnd.flynn.release.v1+json";

/// The longest [`Release`].
const MAX_RELEASE: u64 = 4 << 20;

/// The channel of a host that names none.
pub const DEFAULT_CHANNEL: &str = "stable";

/// One version of the platform.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// The form of this document.
    #[serde(rename = "_type")]
    pub kind: String,
    /// Its name: `0.1.0`.
    pub version: String,
    /// The platform's images. Their layers are in `CHANNEL/layers`.
    pub images: BTreeMap<String, ImageManifest>,
    /// Its programs, `flynn-host` and `flynn`, in `CHANNEL/VERSION`.
    pub programs: Vec<String>,
}

impl Release {
    /// Reads one, which is signed, and all the same must not name files outside of where its own belong.
    fn read(json: &[u8]) -> anyhow::Result<Self> {
        let release: Self = serde_json::from_slice(json)?;
        anyhow::ensure!(
            release.kind == RELEASE_V1,
            "it is of the form {:?}, and this flynn-host knows {RELEASE_V1}: take a newer one",
            release.kind
        );
        let names = release.images.keys().chain(&release.programs);
        for name in names.chain([&release.version]) {
            check_name(name)?;
        }
        Ok(release)
    }
}

/// Sees that a name can be that of a file, and of nothing else.
fn check_name(name: &str) -> anyhow::Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    anyhow::ensure!(
        !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(fits),
        "{name:?} is no name: up to 64 letters, digits, dashes, underscores, dots and plus signs, with no dot in front"
    );
    Ok(())
}

/// Where a channel's release is, or one of its releases.
fn release_target(channel: &str, version: Option<&str>) -> String {
    match version {
        Some(version) => format!("{channel}/{version}/release.json"),
        None => format!("{channel}/release.json"),
    }
}

/// Where a layer of a channel is.
fn layer_target(channel: &str, layer: flynn_api::Digest) -> String {
    format!("{channel}/layers/{layer}.squashfs")
}

fn hex(bytes: &[u8]) -> String {
    let mut hex = String::new();
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// A target's file below `targets`: each content has a file of its own.
fn target_file(name: &str, sha256: &[u8]) -> String {
    let hex = hex(sha256);
    match name.rsplit_once('/') {
        Some((dir, base)) => format!("{dir}/{hex}.{base}"),
        None => format!("{hex}.{name}"),
    }
}
