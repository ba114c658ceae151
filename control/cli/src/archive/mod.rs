//! Images on disk: what `docker save` writes (docker-archive) and the OCI image layout, each as a directory or as a tar,
//! plain or compressed with gzip or zstd.
//!
//! Every size and name in an archive is checked before it is believed; layers are read where they lie.

mod docker;
mod oci;
mod store;

use std::io::Read;
use std::path::Path;

use flynn_api::receive::DockerImage;
use flynn_api::{Error, ErrorCode};
use sha2::{Digest as _, Sha256};

use self::store::Store;

/// The longest manifest or configuration that is read.
const MAX_JSON: u64 = 8 << 20;

/// An image that has been found in an archive.
pub(crate) struct Image {
    /// What it is called there, if it is.
    pub(crate) name: Option<String>,
    /// Its configuration.
    pub(crate) config: DockerImage,
    /// Its layers, lowest first.
    pub(crate) layers: Vec<Layer>,
    store: Store,
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// The digest of its uncompressed tar: `sha256:…`.
    pub(crate) id: String,
    /// Bytes as they lie there.
    pub(crate) size: u64,
    path: String,
}

impl Image {
    /// Opens the image called `name`, or the only one, in a file or directory.
    pub(crate) fn open(path: &Path, name: Option<&str>) -> Result<Self, Error> {
        Self::find(Store::open(path)?, name)
    }

    /// Opens the image in an archive that is read to its end first.
    pub(crate) fn from_reader(reader: impl Read, name: Option<&str>) -> Result<Self, Error> {
        Self::find(Store::from_reader(reader)?, name)
    }

    fn find(store: Store, name: Option<&str>) -> Result<Self, Error> {
        let found = if store.has("manifest.json") {
            docker::find(&store, name)?
        } else if store.has("index.json") {
            oci::find(&store, name)?
        } else {
            return Err(broken(
                "it is neither a docker-archive (it has no manifest.json) nor an OCI layout (no index.json). \
                 Write one with `docker save`, `buildah push IMAGE docker-archive:FILE` or `skopeo copy`",
            ));
        };
        let Found { name, config, paths } = found;
        let config: DockerImage = serde_json::from_slice(&config)
            .map_err(|why| broken(format!("the image's configuration cannot be read: {why}")))?;
        let ids = &config.rootfs.diff_ids;
        if ids.len() != paths.len() {
            let message = format!(
                "it has {} layers, but the image's configuration lists {}",
                paths.len(),
                ids.len()
            );
            return Err(broken(message));
        }
        let layers = ids
            .iter()
            .zip(paths)
            .map(|(id, path)| {
                Ok(Layer {
                    id: id.clone(),
                    size: store.size(&path)?,
                    path,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            name,
            config,
            layers,
            store,
        })
    }

    /// A layer's bytes as they lie there.
    pub(crate) fn read(&self, layer: &Layer) -> Result<Box<dyn Read + Send>, Error> {
        self.store.read(&layer.path)
    }
}

/// An image's configuration and where its layers lie.
struct Found {
    name: Option<String>,
    config: Vec<u8>,
    paths: Vec<String>,
}

/// The archive is not what it should be.
fn broken(why: impl std::fmt::Display) -> Error {
    Error::validation(format!("the image archive cannot be used: {why}"))
}

/// There is no image of this name in the archive, or a name is needed.
fn choose(name: Option<&str>, names: &[String]) -> Error {
    let names = if names.is_empty() {
        "none with a name".to_owned()
    } else {
        names.join(", ")
    };
    match name {
        Some(name) => Error::new(
            ErrorCode::NotFound,
            format!("the archive has no image {name}; it has: {names}"),
        ),
        None => Error::validation(format!(
            "the archive has several images; name one of them: {names}"
        )),
    }
}

/// `sha256:` and the digest.
fn sha256(bytes: &[u8]) -> String {
    let digest: Vec<String> = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{}", digest.concat())
}

/// Whether `text` is 64 lower-case hex digits.
fn is_hex_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Checks content against the digest that it is named by.
fn verify(what: &str, bytes: &[u8], digest: &str) -> Result<(), Error> {
    let found = sha256(bytes);
    if found == digest {
        return Ok(());
    }
    Err(broken(format!(
        "{what} has the digest {found}, not {digest}; the archive is damaged: make it again"
    )))
}

#[cfg(test)]
mod tests;
