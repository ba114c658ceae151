//! Brings images of a directory into the host's store: `flynn-host download --from`, and bootstrap's first step.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, bail};
use flynn_api::ErrorCode;
use flynn_api::client::{Http, host::HostClient};
use flynn_api::image::{ImageManifest, Layer};
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::io::AsyncReadExt as _;

use crate::layers::Arriving;
use crate::paths::Paths;

/// Takes every `<name>.json` in `from`, with its layers in `from/layers`, into the daemon's store.
/// Layers that are there already are not sent again. Returns the names.
pub async fn import(host: &HostClient, state: &Path, from: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    let mut sent = BTreeSet::new();
    let paths = Paths::at(state);
    let entries = std::fs::read_dir(from).with_context(|| {
        format!(
            "no images in {}; make them with `cargo xtask image`",
            from.display()
        )
    })?;
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()) else {
            continue;
        };
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let manifest = read(&path)?;
        // From now on none of its layers that is there is collected.
        let arriving = Arriving::begin(&paths, name, &manifest)?;
        for layer in manifest.layers() {
            if sent.insert(layer.id) {
                send(
                    host.http(),
                    layer,
                    &from.join("layers").join(format!("{}.squashfs", layer.id)),
                )
                .await?;
            }
        }
        arriving.finish()?;
        names.push(name.to_owned());
    }
    if names.is_empty() {
        bail!(
            "no images in {}; make them with `cargo xtask image`",
            from.display()
        );
    }
    names.sort();
    Ok(names)
}

/// The image of this name.
pub(super) fn find(state: &Path, name: &str) -> anyhow::Result<ImageManifest> {
    let path = Paths::at(state).images().join(format!("{name}.json"));
    if !path.exists() {
        bail!(
            "this host has no image {name}; bring it in with `flynn-host download` (--repository URL|DIR, or --from DIR)"
        );
    }
    read(&path)
}

fn read(path: &Path) -> anyhow::Result<ImageManifest> {
    let json = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&json).with_context(|| format!("{} is not an image's manifest", path.display()))
}

async fn send(host: &Http, layer: &Layer, file: &Path) -> anyhow::Result<()> {
    let path = format!("/host/layers/{}", layer.id);
    let head = http::Request::head(&path).body(flynn_api::client::full(""))?;
    if host.send_raw(head).await?.status().is_success() {
        return Ok(());
    }
    let file = tokio::fs::File::open(file)
        .await
        .with_context(|| format!("layer {}: {}", layer.id, file.display()))?;
    let chunks = futures::stream::try_unfold(file, |mut file| async move {
        let mut chunk = vec![0; 256 << 10];
        let length = file.read(&mut chunk).await?;
        chunk.truncate(length);
        let frame = (length > 0).then(|| (Frame::data(bytes::Bytes::from(chunk)), file));
        Ok::<_, std::io::Error>(frame)
    });
    let body = StreamBody::new(chunks.boxed()).map_err(Into::into).boxed_unsync();
    match host.send(http::Request::put(&path).body(body)?).await {
        Err(error) if error.code == ErrorCode::Validation => {
            bail!(
                "layer {} is damaged ({error}); make the images anew with `cargo xtask image`",
                layer.id
            )
        }
        result => result
            .map(drop)
            .with_context(|| format!("cannot store layer {}", layer.id)),
    }
}
