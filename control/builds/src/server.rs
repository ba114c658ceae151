//! The HTTP side.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use flynn_api::client::blobs::BlobClient;
use flynn_api::client::controller::ControllerClient;
use flynn_api::image::{Artifact, Layer};
use flynn_api::receive::NewImage;
use flynn_api::server::{Json, Keys};
use flynn_api::{Error, ErrorCode, Result};
use futures::StreamExt as _;
use tempfile::TempDir;
use tokio::sync::{Semaphore, mpsc};

use crate::image;
use crate::library::{LAYER_URL, Library, Record};
use crate::limits::{CONVERSIONS, MAX_ACCOUNTS, UPLOADS};
use crate::squash::{self, SquashError};
use crate::tree::{Content, Tree, TreeError};
use crate::upload::{self, Piece, Upload, UploadError};

/// Pieces of an upload that wait for the disk.
const QUEUE: usize = 16;
/// The name of a squashfs file under way.
const SQUASHFS: &str = "layer.squashfs";
/// Begins the names of directories for files under way.
const PREFIX: &str = "flynn-layer-";

/// Clears away what a receiver that was killed has left under way.
pub(crate) fn clear(scratch: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(scratch)?;
    for entry in std::fs::read_dir(scratch)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The image receiving service.
#[derive(Clone)]
pub struct Receiver {
    inner: Arc<Inner>,
}

struct Inner {
    keys: Keys,
    library: Library,
    controller: ControllerClient,
    scratch: PathBuf,
    uploads: Semaphore,
    conversions: Semaphore,
}

/// A squashfs file, in a directory that goes with it, and what is known about it.
struct Converted {
    record: Record,
    directory: TempDir,
}

impl Receiver {
    /// Lets callers with one of `keys` in; keeps files under way in `scratch`.
    pub fn new(keys: Keys, blobstore: BlobClient, controller: ControllerClient, scratch: PathBuf) -> Self {
        let library = Library::new(blobstore);
        let (uploads, conversions) = (Semaphore::new(UPLOADS), Semaphore::new(CONVERSIONS));
        Self {
            inner: Arc::new(Inner {
                keys,
                library,
                controller,
                scratch,
                uploads,
                conversions,
            }),
        }
    }

    /// All of its routes.
    pub fn router(self) -> Router {
        Router::new()
            .route("/layer/{id}", get(find_layer).post(receive_layer))
            .route("/artifact", post(create_artifact))
            .route_layer(middleware::from_fn_with_state(self.clone(), check_key))
            .route("/.well-known/status", get(status))
            .fallback(unknown)
            .with_state(self)
    }

    async fn receive(&self, id: String, body: Body) -> Result<Layer, Failure> {
        let inner = &self.inner;
        let _upload = inner.uploads.try_acquire().map_err(|_| {
            Error::unavailable(format!(
                "{UPLOADS} layers are being received already; send it again in a while"
            ))
        })?;
        let upload = self.spool(body).await?;
        if upload.id != id {
            let message = format!(
                "the layer sent as {id} has the digest {}: it was damaged on the way or is another one. \
                 Check the image and send it again",
                upload.id
            );
            return Err(Error::validation(message).into());
        }
        if let Some(record) = inner.library.find(&id).await? {
            return Ok(record.layer);
        }
        let converted = self.convert(upload).await?;
        inner
            .library
            .store(&id, &converted.record, &converted.directory.path().join(SQUASHFS))
            .await
            .map_err(|error| match error.code {
                ErrorCode::LimitExceeded => Failure::Full(error.message),
                _ => error.into(),
            })?;
        tracing::info!(docker_id = %id, layer = %converted.record.layer.id, bytes = converted.record.layer.length, "a layer is received");
        Ok(converted.record.layer)
    }

    /// Takes the upload into a temporary file.
    async fn spool(&self, body: Body) -> Result<Upload, Failure> {
        let (sender, pieces) = mpsc::channel(QUEUE);
        let scratch = self.inner.scratch.clone();
        let receiving = tokio::task::spawn_blocking(move || upload::receive(pieces, &scratch));
        let mut body = body.into_data_stream();
        loop {
            let piece = match body.next().await {
                Some(Ok(bytes)) => Piece::Data(bytes),
                Some(Err(_)) => break,
                None => Piece::End,
            };
            let end = matches!(piece, Piece::End);
            // A closed channel says that receiving has failed, which is told below.
            if sender.send(piece).await.is_err() || end {
                break;
            }
        }
        drop(sender);
        Ok(receiving
            .await
            .map_err(|_| Error::internal("receiving was broken off"))??)
    }

    /// Makes a squashfs file of an upload; one of a few at a time.
    async fn convert(&self, upload: Upload) -> Result<Converted, Failure> {
        let _slot = self
            .inner
            .conversions
            .acquire()
            .await
            .map_err(|_| Error::internal("no more conversions"))?;
        let scratch = self.inner.scratch.clone();
        let converting = tokio::task::spawn_blocking(move || convert(upload, &scratch));
        converting
            .await
            .map_err(|_| Error::internal("the conversion was broken off"))?
    }

    async fn create(&self, new: NewImage) -> Result<Artifact> {
        image::check(&new.config)?;
        let mut records = Vec::new();
        for id in &new.config.rootfs.diff_ids {
            let missing = || {
                let mut error = Error::not_found("layer", id);
                error.message.push_str(" here; send it first");
                error
            };
            records.push(self.inner.library.find(id).await?.ok_or_else(missing)?);
        }
        let manifest = image::manifest(&new.config, records)?;
        let uri = self.inner.library.store_manifest(&manifest).await?;
        let mut artifact = Artifact::image(manifest, uri, Some(LAYER_URL.into()));
        artifact.meta = new.meta;
        self.inner.controller.create_artifact(&artifact).await
    }
}

/// Makes a squashfs file of an upload. Blocks.
fn convert(mut upload: Upload, scratch: &Path) -> Result<Converted, Failure> {
    let tree = Tree::read(&upload.file, upload.length)?;
    let (passwd, group) = (
        account_file(&tree, &upload, b"etc/passwd"),
        account_file(&tree, &upload, b"etc/group"),
    );
    // The tool wants to make the file itself.
    let directory = tempfile::Builder::new()
        .prefix(PREFIX)
        .tempdir_in(scratch)
        .map_err(SquashError::from)?;
    let squashfs = directory.path().join(SQUASHFS);
    let (digest, length) = squash::squash(&tree, &mut upload.file, &squashfs)?;
    let mut layer = Layer::squashfs(digest, length);
    layer.meta.insert("docker.layer_id".into(), upload.id);
    Ok(Converted {
        record: Record {
            layer,
            opaque: tree.opaque,
            passwd,
            group,
        },
        directory,
    })
}

/// The content of a file that says who is who, when it is there and of a sensible size.
fn account_file(tree: &Tree, upload: &Upload, path: &[u8]) -> Option<String> {
    use std::os::unix::fs::FileExt as _;
    let Content { offset, size } = tree
        .content(path)
        .filter(|content| content.size <= MAX_ACCOUNTS)?;
    let mut bytes = vec![0; usize::try_from(size).ok()?];
    upload.file.read_exact_at(&mut bytes, offset).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

async fn check_key(State(receiver): State<Receiver>, request: Request, next: Next) -> Response {
    match receiver.inner.keys.check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn find_layer(State(receiver): State<Receiver>, UrlPath(id): UrlPath<String>) -> Result<Json<Layer>> {
    image::check_id(&id)?;
    let record = receiver
        .inner
        .library
        .find(&id)
        .await?
        .ok_or_else(|| Error::not_found("layer", &id))?;
    Ok(Json(record.layer))
}

async fn receive_layer(
    State(receiver): State<Receiver>,
    UrlPath(id): UrlPath<String>,
    body: Body,
) -> Response {
    if let Err(error) = image::check_id(&id) {
        return error.into_response();
    }
    receiver
        .receive(id, body)
        .await
        .map_or_else(Failure::into_response, |layer| Json(layer).into_response())
}

async fn create_artifact(
    State(receiver): State<Receiver>,
    Json(new): Json<NewImage>,
) -> Result<Json<Artifact>> {
    receiver.create(new).await.map(Json)
}

async fn status() -> Json<serde_json::Value> {
    Json(serde_json::json!({ "status": "healthy" }))
}

async fn unknown(request: Request) -> Error {
    Error::not_found("call", format!("{} {}", request.method(), request.uri().path()))
}

/// Why a layer was not taken. A full disk has a status of its own.
enum Failure {
    Api(Error),
    Full(String),
}

impl Failure {
    fn into_response(self) -> Response {
        match self {
            Self::Api(error) => error.into_response(),
            Self::Full(message) => {
                tracing::warn!(message, "a disk is full");
                let status = axum::http::StatusCode::INSUFFICIENT_STORAGE;
                (status, Json(Error::new(ErrorCode::LimitExceeded, message))).into_response()
            }
        }
    }

    fn full(why: &dyn std::fmt::Display) -> Self {
        Self::Full(format!(
            "{why}; nothing was stored. Free space there, then send the layer again"
        ))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Api(error)
    }
}

impl From<UploadError> for Failure {
    fn from(error: UploadError) -> Self {
        let message = error.to_string();
        match error {
            UploadError::Full => Self::full(&message),
            UploadError::BrokeOff | UploadError::Compression(_) => Error::validation(message).into(),
            UploadError::TooLarge => Error::new(ErrorCode::LimitExceeded, message).into(),
            UploadError::Io(_) => Error::internal(message).into(),
        }
    }
}

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Self {
        match &error {
            TreeError::Tar(crate::tar_format::TarError::Io(_)) => Error::internal(error.to_string()).into(),
            TreeError::TooLarge => Error::new(ErrorCode::LimitExceeded, error.to_string()).into(),
            _ => Error::validation(error.to_string()).into(),
        }
    }
}

impl From<SquashError> for Failure {
    fn from(error: SquashError) -> Self {
        match &error {
            SquashError::Full => Self::full(&error),
            SquashError::Io(why) if why.kind() == std::io::ErrorKind::StorageFull => Self::full(&error),
            _ => Error::internal(error.to_string()).into(),
        }
    }
}
