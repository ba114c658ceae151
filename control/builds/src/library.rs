//! Layers in the blobstore, and the records by which docker's ids lead to them.

use std::path::Path;

use bytes::Bytes;
use flynn_api::client::blobs::BlobClient;
use flynn_api::client::{Body, full};
use flynn_api::image::{ImageManifest, Layer};
use flynn_api::{Error, ErrorCode, Result};
use futures::TryStreamExt as _;
use http_body::Frame;
use http_body_util::{BodyExt as _, Limited, StreamBody};
use serde::{Deserialize, Serialize};
use tokio_util::io::ReaderStream;

/// Where anything in the cluster fetches a layer.
pub(crate) const LAYER_URL: &str = "http://blobstore.discoverd/layers/{id}.squashfs";
/// Where anything in the cluster fetches a manifest.
const MANIFEST_URL: &str = "http://blobstore.discoverd/images";
/// The longest record.
const MAX_RECORD: usize = 1 << 20;

/// What a docker layer has become.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) layer: Layer,
    /// It hides all layers below it.
    #[serde(default)]
    pub(crate) opaque: bool,
    /// Its `/etc/passwd`, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) passwd: Option<String>,
    /// Its `/etc/group`, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<String>,
}

/// The layers and manifests in the blobstore.
#[derive(Clone, Debug)]
pub(crate) struct Library {
    blobs: BlobClient,
}

impl Library {
    pub(crate) fn new(blobs: BlobClient) -> Self {
        Self { blobs }
    }

    /// What has become of a docker layer; `None` when it must be sent (again).
    pub(crate) async fn find(&self, id: &str) -> Result<Option<Record>> {
        let body = match self.blobs.get(&record_path(id)).await {
            Ok(body) => body,
            Err(error) if error.code == ErrorCode::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let bytes = Limited::new(body, MAX_RECORD)
            .collect()
            .await
            .map_err(|why| Error::unavailable(format!("the record of layer {id} cannot be fetched: {why}")))?
            .to_bytes();
        let Ok(record) = serde_json::from_slice::<Record>(&bytes) else {
            tracing::warn!(id, "the record of a layer cannot be read; it will be made anew");
            return Ok(None);
        };
        // A record may outlive its layer.
        let there = self.blobs.exists(&layer_path(&record.layer)).await?;
        Ok(there.then_some(record))
    }

    /// Stores a layer, and then the record that leads to it.
    pub(crate) async fn store(&self, id: &str, record: &Record, squashfs: &Path) -> Result<()> {
        let path = layer_path(&record.layer);
        if !self.blobs.exists(&path).await? {
            self.blobs.put(&path, file(squashfs).await?).await?;
        }
        let json = serde_json::to_vec(record)
            .map_err(|why| Error::internal(format!("cannot write a record: {why}")))?;
        self.blobs.put(&record_path(id), full(json)).await
    }

    /// Stores a manifest and returns its URL.
    pub(crate) async fn store_manifest(&self, manifest: &ImageManifest) -> Result<String> {
        let id = manifest.id();
        self.blobs
            .put(&format!("/images/{id}.json"), full(manifest.canonical_json()))
            .await?;
        Ok(format!("{MANIFEST_URL}/{id}.json"))
    }
}

fn layer_path(layer: &Layer) -> String {
    format!("/layers/{}.squashfs", layer.id)
}

fn record_path(id: &str) -> String {
    format!("/layers/by-docker-id/{id}.json")
}

/// A file as a body, read as it is sent.
async fn file(path: &Path) -> Result<Body> {
    let file = tokio::fs::File::open(path)
        .await
        .map_err(|why| Error::internal(format!("a converted layer cannot be read: {why}")))?;
    let pieces = ReaderStream::with_capacity(file, 128 << 10)
        .map_ok(Frame::<Bytes>::data)
        .map_err(|why| Box::new(why) as Box<dyn std::error::Error + Send + Sync>);
    Ok(StreamBody::new(pieces).boxed_unsync())
}
