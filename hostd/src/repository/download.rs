//! Brings a release's images into this host's store: `flynn-host download --repository`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use flynn_api::image::{ImageManifest, Layer};
use flynn_api::server::disk;
use flynn_api::{Digest, Error};
use futures::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;

use super::trust::{Repository, Wanted};
use super::{Release, layer_target};
use crate::download::opener;
use crate::layers::{Arriving, Store};
use crate::paths::Paths;

/// Layers that are fetched at once.
const AT_ONCE: usize = 4;

/// What is happening.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event<'a> {
    /// Which release it is.
    Release {
        /// Its version.
        version: &'a str,
        /// Bytes of all layers that are wanted, here or not.
        bytes: u64,
    },
    /// So much of a layer is here.
    Layer {
        /// Its digest.
        id: Digest,
        /// Bytes that are here.
        have: u64,
        /// Bytes of all of it.
        length: u64,
    },
    /// An image is here, with all of its layers.
    Image {
        /// Its name.
        name: &'a str,
        /// Its id.
        id: Digest,
    },
}

/// Fetches what is missing of the images of a release, all or those of these names, each layer verified before it is in
/// the store. An image is there, under its name, when all of it is. Gives the release.
pub async fn download(
    state: &Path,
    wanted: &Wanted,
    version: Option<&str>,
    names: &[String],
    tell: impl Fn(Event<'_>),
) -> anyhow::Result<Release> {
    let repository = Repository::open(state, wanted).await?;
    bring_in(&repository, state, version, names, tell).await
}

pub(super) async fn bring_in(
    repository: &Repository,
    state: &Path,
    version: Option<&str>,
    names: &[String],
    tell: impl Fn(Event<'_>),
) -> anyhow::Result<Release> {
    let release = repository.release(version).await?;
    if let Some(unknown) = names.iter().find(|name| !release.images.contains_key(*name)) {
        let known: Vec<&str> = release.images.keys().map(String::as_str).collect();
        bail!(
            "the release {} has no image {unknown}; it has {}",
            release.version,
            known.join(", ")
        );
    }
    let mut images = release.images.clone();
    images.retain(|name, _| names.is_empty() || names.contains(name));
    let layers: BTreeMap<Digest, &Layer> = images
        .values()
        .flat_map(ImageManifest::layers)
        .map(|layer| (layer.id, layer))
        .collect();
    tell(Event::Release {
        version: &release.version,
        bytes: layers.values().map(|layer| layer.length).sum(),
    });

    let paths = Paths::at(&std::path::absolute(state)?);
    let mut arriving = Vec::new();
    for (name, manifest) in &images {
        arriving.push((name, manifest.id(), Arriving::begin(&paths, name, manifest)?));
    }
    let store = Store::beside_daemon(&paths);
    let mut missing = Vec::new();
    for layer in layers.into_values() {
        repository.check_target(&layer_target(repository.channel(), layer.id), layer.length)?;
        if store.has_whole(layer)? {
            tell(Event::Layer {
                id: layer.id,
                have: layer.length,
                length: layer.length,
            });
        } else {
            missing.push(layer);
        }
    }
    room(&paths, missing.iter().map(|layer| layer.length).sum())?;
    let fetch = |layer| fetch(repository, &store, layer, &tell);
    futures::stream::iter(missing)
        .map(fetch)
        .buffer_unordered(AT_ONCE)
        .try_collect::<()>()
        .await?;
    for (name, id, arriving) in arriving {
        arriving
            .finish()
            .with_context(|| format!("cannot keep the image {name}"))?;
        tell(Event::Image { name, id });
    }
    Ok(release)
}

async fn fetch(
    repository: &Repository,
    store: &Store,
    layer: &Layer,
    tell: &impl Fn(Event<'_>),
) -> anyhow::Result<()> {
    let name = layer_target(repository.channel(), layer.id);
    let name = name.as_str();
    let open = opener(|from, _| repository.open_target(name, from));
    let progress = |have| {
        tell(Event::Layer {
            id: layer.id,
            have,
            length: layer.length,
        });
    };
    Ok(store.fetch(layer, repository.patience(), open, progress).await?)
}

/// Sees, before anything is begun, that all of it finds room.
fn room(paths: &Paths, bytes: u64) -> anyhow::Result<()> {
    disk::check(paths.state())?;
    let (free, _) = disk::space(paths.state())?;
    if free < bytes {
        let error: Error = disk::full(format!(
            "{} MiB are to be fetched, and {} MiB are free on the disk of {}",
            bytes >> 20,
            free >> 20,
            paths.state().display()
        ));
        return Err(error.into());
    }
    Ok(())
}
