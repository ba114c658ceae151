//! The host API's `/host/layers`: the store of layers, and the room that it takes.

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_LENGTH;
use flynn_api::image::{CollectedLayers, ImageManifest, Layer, LayerGc, StoredLayer, VerifiedLayers};
use flynn_api::server::openapi::{Calls, Done, Octets};
use flynn_api::server::{Json, StrictJson, disk};
use flynn_api::{Digest, Error, Result};
use jiff::Timestamp;
use tokio::task::{block_in_place, spawn_blocking};
use tokio::time::sleep;

use super::api::{Shared, done};
use super::images::pieces;
use super::{Daemon, disk_error};
use crate::layers::{Collected, Marks, Pins, Rule};

/// Between looks at the disk.
const LOOK: Duration = Duration::from_secs(10);

/// What was used so lately is not collected unless an operator asks: it is often about to be used again.
const LATELY: Duration = Duration::from_mins(10);

/// What was collected since the daemon began.
#[derive(Debug, Default)]
pub(super) struct Counters {
    layers: AtomicU64,
    bytes: AtomicU64,
}

/// Adds the calls.
pub(super) fn add(calls: Calls<Arc<Daemon>>) -> Calls<Arc<Daemon>> {
    flynn_api::calls! { calls;
        get "/host/layers" => layers: "The layers in the host's store";
        post "/host/layers/gc" => collect_layers: "Removes layers that nobody needs";
        post "/host/layers/verify" => verify_layers: "Reads all layers, and sets damaged ones aside";
        get "/host/layers/{digest}" => layer: "A layer: a squashfs";
        put "/host/layers/{digest}" => put_layer: "Puts a layer, a squashfs of this digest, into the store";
    }
}

/// Collects layers before the disk is full, for ever.
pub(super) async fn keep_room(daemon: Arc<Daemon>) {
    let mut said = String::new();
    loop {
        let result = daemon.room_for(0);
        let why = result.map_or_else(|error| error.message, |()| String::new());
        if !why.is_empty() && why != said {
            tracing::error!(error = why, "cannot collect layers");
        }
        said = why;
        sleep(LOOK).await;
    }
}

impl Daemon {
    /// Sees to it that so many bytes more find room, and is an error where they do not.
    pub(super) fn make_room(&self, coming: u64) -> Result<()> {
        // A disk of which nothing can be made free may do all the same.
        if let Err(error) = self.room_for(coming) {
            tracing::warn!(%error, "cannot collect layers");
        }
        disk::check(self.paths.state())?;
        let (free, _) = self.space()?;
        if free < coming {
            return Err(disk::full(format!(
                "a layer of {} MiB does not fit on the disk of {} ({} MiB are free)",
                coming >> 20,
                self.paths.state().display(),
                free >> 20
            )));
        }
        Ok(())
    }

    fn space(&self) -> Result<(u64, u64)> {
        disk::space(self.paths.state()).map_err(|error| disk_error("look at the disk", &error))
    }

    fn room_for(&self, coming: u64) -> Result<()> {
        let (free, size) = self.space()?;
        let bytes = Marks::of(size).wanted(free, coming);
        if bytes == 0 {
            return Ok(());
        }
        let rule = Rule {
            bytes,
            older_than: LATELY,
            dry_run: false,
        };
        let collected = block_in_place(|| self.collect(rule))?;
        if collected.bytes > 0 {
            let layers = collected.layers.len();
            tracing::info!(layers, bytes = collected.bytes, "collected what nobody needs");
        }
        Ok(())
    }

    /// Removes layers that nobody needs. Blocks.
    fn collect(&self, rule: Rule) -> Result<Collected> {
        // No job begins to hold a layer meanwhile.
        let mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        let collected = self.store.collect(&mounts, rule);
        drop(mounts);
        let collected = collected.map_err(|error| disk_error("collect layers", &error))?;
        if !rule.dry_run {
            let layers = collected.layers.len() as u64;
            self.collected.layers.fetch_add(layers, Ordering::Relaxed);
            self.collected.bytes.fetch_add(collected.bytes, Ordering::Relaxed);
        }
        Ok(collected)
    }

    /// Reads all layers, and sets damaged ones aside. Blocks.
    fn read_layers(&self) -> Result<VerifiedLayers> {
        let failed = |error| disk_error("read the layers", &error);
        let mut verified = VerifiedLayers::default();
        for layer in self.store.list().map_err(failed)? {
            match self.store.verify(layer.id) {
                Ok(true) => {}
                Ok(false) => {
                    tracing::error!(layer = %layer.id, "a layer is damaged, and set aside");
                    self.store.set_aside(layer.id)?;
                    verified.damaged.push(layer.id);
                }
                // It was collected meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            }
            verified.layers += 1;
            verified.bytes += layer.length;
        }
        Ok(verified)
    }

    /// Looks for damage in the layers that a job holds, one of which cannot be mounted. Whether some was found; those
    /// layers are set aside.
    pub(super) fn set_damaged_aside(&self, job: &str) -> Result<bool> {
        let mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        let held = mounts.held_by(job);
        drop(mounts);
        let mut found = false;
        for layer in held {
            if let Ok(false) = block_in_place(|| self.store.verify(layer)) {
                tracing::error!(job, %layer, "a layer is damaged, and set aside");
                self.store.set_aside(layer)?;
                found = true;
            }
        }
        Ok(found)
    }

    /// Sets damaged layers aside, and fetches them again where one of the host's jobs says from where. Jobs that have
    /// them mounted go on with what they have.
    pub(super) async fn verify_layers(self: &Arc<Self>) -> Result<VerifiedLayers> {
        let daemon = Arc::clone(self);
        let verified = spawn_blocking(move || daemon.read_layers()).await;
        let mut verified = verified.map_err(|error| Error::internal(error.to_string()))??;
        for digest in verified.damaged.clone() {
            let Some((layer, template)) = self.source_of(digest) else {
                continue;
            };
            if let Err(error) = self.layer(&layer, Some(&template)).await {
                tracing::warn!(layer = %digest, %error, "a damaged layer does not come again");
                continue;
            }
            let mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
            let renewed = mounts.renew(&self.paths, digest);
            drop(mounts);
            renewed.map_err(|error| disk_error("mount the layer that came again", &error))?;
            verified.fetched.push(digest);
        }
        Ok(verified)
    }

    /// Where a layer is to be had, by a job that uses it.
    fn source_of(&self, digest: Digest) -> Option<(Layer, String)> {
        self.table.all().iter().find_map(|entry| {
            entry.job.artifacts.iter().find_map(|artifact| {
                let mut layers = artifact.manifest.iter().flat_map(ImageManifest::layers);
                let layer = layers.find(|layer| layer.id == digest)?;
                Some((layer.clone(), artifact.layer_url_template.clone()?))
            })
        })
    }

    /// What was found damaged, for `flynn-host status`.
    pub(super) fn damaged_layers(&self) -> Option<String> {
        let damaged = self.store.damaged().unwrap_or_default();
        let first = damaged.first()?;
        Some(format!(
            "{} damaged layers were set aside, as {}: look at the disk; what is not fetched again by itself comes with \
             `flynn-host download`",
            damaged.len(),
            first.display()
        ))
    }

    fn list_layers(&self) -> Result<Vec<StoredLayer>> {
        let failed = |error| disk_error("look at the layers", &error);
        let mut stored = self.store.list().map_err(failed)?;
        stored.sort_by_key(|layer| layer.id);
        let pins = Pins::read(&self.paths).map_err(failed)?;
        let mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = |layer: crate::layers::Stored| StoredLayer {
            id: layer.id,
            length: layer.length,
            used_at: Timestamp::try_from(layer.used).unwrap_or_default(),
            jobs: mounts.users(layer.id),
            images: pins.of(layer.id).to_vec(),
        };
        Ok(stored.into_iter().map(shown).collect())
    }

    /// The store's part of `GET /metrics`.
    pub(super) fn layer_metrics(&self) -> String {
        let stored = self.store.list().unwrap_or_default();
        let bytes = stored.iter().map(|layer| layer.length).sum::<u64>();
        let figures = [
            (
                "flynn_host_layers",
                "gauge",
                "Layers in the store",
                stored.len() as u64,
            ),
            (
                "flynn_host_layers_bytes",
                "gauge",
                "Bytes of the layers in the store",
                bytes,
            ),
            (
                "flynn_host_layers_damaged",
                "gauge",
                "Damaged layers that were set aside",
                self.store.damaged().unwrap_or_default().len() as u64,
            ),
            (
                "flynn_host_layers_collected_total",
                "counter",
                "Layers that were removed since nobody needed them",
                self.collected.layers.load(Ordering::Relaxed),
            ),
            (
                "flynn_host_layers_collected_bytes_total",
                "counter",
                "Bytes that were made free by removing layers, unfinished and damaged ones as well",
                self.collected.bytes.load(Ordering::Relaxed),
            ),
        ];
        let mut text = String::new();
        for (name, kind, help, value) in figures {
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "# HELP {name} {help}.\n# TYPE {name} {kind}\n{name} {value}"
            );
        }
        text
    }
}

/// The error of a layer that cannot be mounted.
pub(super) fn unmountable(error: &io::Error) -> Error {
    let mut error = Error::internal(error.to_string());
    error.detail = Some(serde_json::json!({ "resource": "layer" }));
    error
}

/// Whether an error is [`unmountable`]'s.
pub(super) fn is_unmountable(error: &Error) -> bool {
    let detail = error.detail.as_ref();
    detail.is_some_and(|detail| detail["resource"] == "layer")
}

async fn layers(State(daemon): Shared) -> Result<Json<Vec<StoredLayer>>> {
    let listed = spawn_blocking(move || daemon.list_layers()).await;
    let listed = listed.map_err(|error| Error::internal(error.to_string()))?;
    listed.map(Json)
}

async fn collect_layers(
    State(daemon): Shared,
    StrictJson(gc): StrictJson<LayerGc>,
) -> Result<Json<CollectedLayers>> {
    let rule = Rule {
        bytes: gc.bytes.unwrap_or(u64::MAX),
        older_than: Duration::from_secs(gc.older_than),
        dry_run: gc.dry_run,
    };
    // It goes on when the caller hangs up.
    let pass = daemon.gate.beside("collecting layers");
    let collected = spawn_blocking(move || {
        let _pass = pass;
        daemon.collect(rule)
    })
    .await;
    let Collected { layers, bytes } = collected.map_err(|error| Error::internal(error.to_string()))??;
    Ok(Json(CollectedLayers { layers, bytes }))
}

async fn verify_layers(State(daemon): Shared) -> Result<Json<VerifiedLayers>> {
    // A task of its own: it goes on when the caller hangs up.
    let pass = daemon.gate.beside("verifying layers");
    let verified = tokio::spawn(async move {
        let _pass = pass;
        daemon.verify_layers().await
    })
    .await;
    let verified = verified.map_err(|error| Error::internal(error.to_string()))?;
    verified.map(Json)
}

fn parse_digest(text: &str) -> Result<Digest> {
    text.parse()
        .map_err(|error| Error::invalid_field("digest", error))
}

async fn put_layer(
    State(daemon): Shared,
    Path(digest): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Done>> {
    let digest = parse_digest(&digest)?;
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse().ok());
    let stored = match daemon.make_room(length.unwrap_or(0)) {
        Ok(()) => daemon.store.put(digest, length, pieces(body)).await,
        refused => refused,
    };
    done(stored)
}

async fn layer(State(daemon): Shared, Path(digest): Path<String>) -> Result<Octets> {
    let digest = parse_digest(&digest)?;
    let file = tokio::fs::File::open(daemon.paths.layer(digest)).await;
    let file = file.map_err(|_| Error::not_found("layer", digest))?;
    let length = file
        .metadata()
        .await
        .map_err(|error| disk_error("read the layer", &error))?
        .len();
    let chunks = futures::stream::unfold(file, |mut file| async move {
        use tokio::io::AsyncReadExt;
        let mut chunk = bytes::BytesMut::with_capacity(256 << 10);
        match file.read_buf(&mut chunk).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(chunk.freeze()), file)),
            Err(error) => Some((Err(error), file)),
        }
    });
    Ok(Octets {
        length: Some(length),
        body: Body::from_stream(chunks),
    })
}
