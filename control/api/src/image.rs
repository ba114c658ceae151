//! Images: a manifest that names squashfs layers by digest, and the artifacts that point to manifests.

use serde::{Deserialize, Serialize};

use crate::{Digest, Env, Meta};

/// The only manifest version there is (`_type`).
pub const MANIFEST_V1: &str = "application/vnd.flynn.image.manifest.v1+json";

/// The media type of the only kind of layer there is.
pub const LAYER_SQUASHFS: &str = "application/vnd.flynn.image.squashfs.v1";

/// The name of the entrypoint that is used when none is asked for.
pub const DEFAULT_ENTRYPOINT: &str = "_default";

/// What an image consists of. Its id is the digest of its canonical JSON ([`ImageManifest::id`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ImageManifest {
    /// `application/vnd.flynn.image.manifest.v1+json` ([`MANIFEST_V1`]).
    #[serde(rename = "_type")]
    pub kind: String,
    /// Labels.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// What to run, by name; [`DEFAULT_ENTRYPOINT`] unless another is asked for.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub entrypoints: std::collections::BTreeMap<String, Entrypoint>,
    /// Root file systems, one per platform.
    pub rootfs: Vec<Rootfs>,
}

/// How an image wants to be started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Entrypoint {
    /// Environment beneath the app's own.
    #[serde(default, skip_serializing_if = "Env::is_empty")]
    pub env: Env,
    /// Working directory; `/` when absent.
    #[serde(
        rename = "cwd",
        alias = "working_dir",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub working_dir: Option<String>,
    /// Program and arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Capabilities beyond the default set.
    #[serde(rename = "linux_capabilities", default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// User id; 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group id; 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
}

/// The layers of one platform, lowest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Rootfs {
    /// For which machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Lowest first.
    pub layers: Vec<Layer>,
}

/// A kind of machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Platform {
    /// `amd64`.
    pub architecture: String,
    /// `linux`.
    pub os: String,
}

/// One squashfs file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Layer {
    /// The digest of the squashfs file: its name everywhere.
    pub id: Digest,
    /// `application/vnd.flynn.image.squashfs.v1` ([`LAYER_SQUASHFS`]).
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes.
    pub length: u64,
    /// The digest again, as Flynn writes it.
    pub hashes: Hashes,
    /// Labels, such as the digest of the docker layer that it was made from.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
}

/// Digests by algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Hashes {
    /// SHA-512/256.
    pub sha512_256: Digest,
}

impl Layer {
    /// A squashfs layer of this digest and length.
    pub fn squashfs(id: Digest, length: u64) -> Self {
        Self {
            id,
            kind: LAYER_SQUASHFS.into(),
            length,
            hashes: Hashes { sha512_256: id },
            meta: Meta::new(),
        }
    }
}

impl ImageManifest {
    /// A manifest for Linux on amd64 with one default entrypoint.
    pub fn new(entrypoint: Entrypoint, layers: Vec<Layer>) -> Self {
        let platform = Platform {
            architecture: "amd64".into(),
            os: "linux".into(),
        };
        Self {
            kind: MANIFEST_V1.into(),
            meta: Meta::new(),
            entrypoints: [(DEFAULT_ENTRYPOINT.to_owned(), entrypoint)].into(),
            rootfs: vec![Rootfs {
                platform: Some(platform),
                layers,
            }],
        }
    }

    /// The canonical JSON: fields in the order of the type, maps sorted, no white space.
    pub fn canonical_json(&self) -> Vec<u8> {
        // Only maps with keys that are not strings can fail to serialise; there are none here.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The digest of the canonical JSON.
    pub fn id(&self) -> Digest {
        Digest::of(&self.canonical_json())
    }

    /// The default entrypoint, if there is one.
    pub fn default_entrypoint(&self) -> Option<&Entrypoint> {
        self.entrypoints.get(DEFAULT_ENTRYPOINT)
    }

    /// The layers for Linux on amd64, lowest first.
    pub fn layers(&self) -> &[Layer] {
        let fits = |platform: &Platform| platform.architecture == "amd64" && platform.os == "linux";
        self.rootfs
            .iter()
            .find(|rootfs| rootfs.platform.as_ref().is_none_or(fits))
            .map_or(&[], |rootfs| &rootfs.layers)
    }
}

/// The kind of an artifact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ArtifactKind {
    /// An image: `raw_manifest` is an [`ImageManifest`].
    #[default]
    Flynn,
    /// A plain file at `uri`.
    File,
    /// Flynn's old way of naming a docker image; read, never made.
    Docker,
}

/// Something that a release is made of. Immutable.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Artifact {
    /// A UUID, given by the controller.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// What it is.
    #[serde(rename = "type", default)]
    pub kind: ArtifactKind,
    /// Where its manifest (or file) can be fetched.
    #[serde(default)]
    pub uri: String,
    /// Labels.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// The manifest itself, for images.
    #[serde(rename = "manifest", default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<ImageManifest>,
    /// Digests of the manifest (or file).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hashes: Option<Hashes>,
    /// Bytes of the manifest (or file).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Where a layer is fetched: `{id}` is replaced by its digest. Absent for images whose layers each host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_url_template: Option<String>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<jiff::Timestamp>,
}

impl Artifact {
    /// An artifact for an image.
    pub fn image(
        manifest: ImageManifest,
        uri: impl Into<String>,
        layer_url_template: Option<String>,
    ) -> Self {
        let json = manifest.canonical_json();
        Self {
            uri: uri.into(),
            hashes: Some(Hashes {
                sha512_256: Digest::of(&json),
            }),
            size: Some(json.len() as u64),
            manifest: Some(manifest),
            layer_url_template,
            ..Self::default()
        }
    }
}

/// A layer in a host's store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct StoredLayer {
    /// Its digest.
    pub id: Digest,
    /// Bytes.
    pub length: u64,
    /// When it came, or a job last began or ended to use it.
    pub used_at: jiff::Timestamp,
    /// The jobs that use it, or wait for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub jobs: Vec<String>,
    /// The images of the host that name it, so that it stays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<String>,
}

/// Which layers that nobody needs shall be removed from a host's store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LayerGc {
    /// Those that were not used for so many seconds.
    #[serde(default)]
    pub older_than: u64,
    /// Only until so many bytes are made free, the longest unused first; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Only say which.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was removed from a host's store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CollectedLayers {
    /// Layers.
    pub layers: Vec<Digest>,
    /// All that was made free, with what was unfinished or damaged.
    pub bytes: u64,
}

/// What reading all of a host's layers has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VerifiedLayers {
    /// How many were read.
    pub layers: u64,
    /// Bytes.
    pub bytes: u64,
    /// Those that were damaged, and are set aside.
    pub damaged: Vec<Digest>,
    /// Those of them that came again, whole, from where jobs have them.
    pub fetched: Vec<Digest>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_that_of_the_canonical_json_and_survives_the_wire() {
        let layer = Layer::squashfs(Digest::of(b"layer"), 5);
        let entrypoint = Entrypoint {
            args: vec!["/bin/app".into()],
            ..Entrypoint::default()
        };
        let manifest = ImageManifest::new(entrypoint, vec![layer]);
        let read: ImageManifest = serde_json::from_slice(&manifest.canonical_json()).unwrap();
        assert_eq!(read.id(), manifest.id());
        assert_eq!(read.layers().len(), 1);
    }
}
