//! The OCI image layout: `index.json` leads to a manifest, that to a configuration and layers, each by digest.

use flynn_api::Error;
use serde::Deserialize;

use super::store::Store;
use super::{Found, broken, choose, is_hex_digest, verify};

/// Indexes in indexes: multi-platform images have one level.
const MAX_DEPTH: usize = 4;
/// The annotation that names an image in a layout.
const NAME: &str = "org.opencontainers.image.ref.name";

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    digest: String,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

impl Descriptor {
    fn name(&self) -> Option<&String> {
        self.annotations.as_ref()?.get(NAME)
    }

    fn is_index(&self) -> bool {
        self.media_type.contains("index") || self.media_type.contains("manifest.list")
    }

    fn fits(&self) -> bool {
        self.platform
            .as_ref()
            .is_none_or(|platform| platform.architecture == "amd64" && platform.os == "linux")
    }

    /// Where its content lies.
    fn path(&self) -> Result<String, Error> {
        match self
            .digest
            .strip_prefix("sha256:")
            .filter(|hex| is_hex_digest(hex))
        {
            Some(hex) => Ok(format!("blobs/sha256/{hex}")),
            None => Err(broken(format!("{:?} is not a SHA-256 digest", self.digest))),
        }
    }

    /// Its content, checked.
    fn json<T: for<'de> Deserialize<'de>>(&self, store: &Store) -> Result<T, Error> {
        serde_json::from_slice(&self.bytes(store)?)
            .map_err(|why| broken(format!("the blob {} cannot be read: {why}", self.digest)))
    }

    fn bytes(&self, store: &Store) -> Result<Vec<u8>, Error> {
        let bytes = store.read_json(&self.path()?)?;
        verify("a blob", &bytes, &self.digest)?;
        Ok(bytes)
    }
}

/// Finds the image called `name`, or the only one, for Linux on amd64.
pub(super) fn find(store: &Store, name: Option<&str>) -> Result<Found, Error> {
    let json = store.read_json("index.json")?;
    let index: Index =
        serde_json::from_slice(&json).map_err(|why| broken(format!("index.json cannot be read: {why}")))?;
    let names: Vec<_> = index
        .manifests
        .iter()
        .filter_map(|manifest| manifest.name().cloned())
        .collect();
    let candidates: Vec<_> = index
        .manifests
        .iter()
        .filter(|manifest| name.is_none_or(|name| manifest.name().is_some_and(|found| found == name)))
        .collect();
    let mut chosen = match candidates.as_slice() {
        [] if name.is_some() => return Err(choose(name, &names)),
        [] => return Err(broken("it has no image")),
        [only] => (*only).clone(),
        several => match several
            .iter()
            .filter(|manifest| manifest.fits())
            .collect::<Vec<_>>()
            .as_slice()
        {
            [only] => (**only).clone(),
            _ => return Err(choose(None, &names)),
        },
    };
    let called = chosen.name().cloned();
    for _ in 0..MAX_DEPTH {
        if !chosen.is_index() {
            let manifest: Manifest = chosen.json(store)?;
            let paths = manifest
                .layers
                .iter()
                .map(Descriptor::path)
                .collect::<Result<_, _>>()?;
            return Ok(Found {
                name: called,
                config: manifest.config.bytes(store)?,
                paths,
            });
        }
        let index: Index = chosen.json(store)?;
        chosen = index.manifests.into_iter().find(Descriptor::fits).ok_or_else(|| {
            broken("it has no image for linux/amd64, which is what hosts run; build or pull it for that platform")
        })?;
    }
    Err(broken("its indexes lead from one to the next without end"))
}
