//! The HTTP side: streams objects in and out of the store.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use bytes::Bytes;
use flynn_api::server::{Json, Keys};
use flynn_api::{Digest, Error, ErrorCode};
use futures::StreamExt as _;
use http::header::{
    ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use http::{HeaderMap, Method, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::mpsc;
use tokio_util::io::ReaderStream;

use crate::path::{BlobPath, decode};
use crate::range::{self, Wanted};
use crate::store::{Store, StoreError};

/// The longest object that is taken.
pub const MAX_OBJECT: u64 = 64 << 30;

/// Bytes read from the disk at a time.
const READ_SIZE: usize = 128 << 10;
/// Pieces of an upload that wait for the disk.
const QUEUE: usize = 16;

/// The blobstore's service.
#[derive(Clone)]
pub struct Blobstore {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    keys: Keys,
}

/// What goes to the thread that writes an object. Without `End` the upload was broken off.
enum Piece {
    Data(Bytes),
    End,
}

impl Blobstore {
    /// Serves `store`; `keys` may write.
    pub fn new(store: Store, keys: Keys) -> Self {
        Self {
            inner: Arc::new(Inner { store, keys }),
        }
    }

    /// All of its routes.
    pub fn router(self) -> Router {
        Router::new()
            .route("/.well-known/status", get(status))
            .fallback(object)
            .with_state(self)
    }

    /// Runs a call to the disk where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Failure> {
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || call(&inner.store)).await;
        done.map_err(|_| Error::internal("the disk call was broken off"))?
            .map_err(Failure::from)
    }

    async fn put(&self, path: BlobPath, body: Body) -> Result<Response, Failure> {
        let (sender, mut pieces) = mpsc::channel(QUEUE);
        let target = path.clone();
        let writing = self.blocking(move |store| {
            let mut incoming = store.begin()?;
            while let Some(piece) = pieces.blocking_recv() {
                match piece {
                    Piece::Data(bytes) => incoming.write(&bytes)?,
                    Piece::End => return store.commit(incoming, &target).map(Some),
                }
            }
            Ok(None)
        });
        let (sent, written) = tokio::join!(feed(body, sender), writing);
        // A full disk ends the writing, which then ends the feeding: the disk's reason comes first.
        match (written, sent) {
            (Err(why), _) | (Ok(None), Err(why)) => Err(why),
            (Ok(None), Ok(())) => Err(Error::internal("the object was not written").into()),
            (Ok(Some(digest)), _) => {
                tracing::debug!(%path, %digest, "stored");
                Ok((StatusCode::OK, [(ETAG, tag(digest))]).into_response())
            }
        }
    }

    async fn read(&self, path: BlobPath, head: bool, headers: &HeaderMap) -> Result<Response, Failure> {
        let missing = Error::not_found("object", &path);
        let content_type = content_type(&path);
        let object = self
            .blocking(move |store| store.get(&path))
            .await?
            .ok_or(missing)?;
        let etag = tag(object.digest);
        let header = |name| {
            headers
                .get(name)
                .and_then(|value: &http::HeaderValue| value.to_str().ok())
        };
        if header(IF_NONE_MATCH).is_some_and(|tags| matches(tags, &etag)) {
            return Ok((StatusCode::NOT_MODIFIED, [(ETAG, etag)]).into_response());
        }
        let range = header(RANGE).filter(|_| header(IF_RANGE).is_none_or(|known| known == etag));
        let (status, part) = match range::wanted(range, object.length) {
            Wanted::Whole => (StatusCode::OK, 0..object.length),
            Wanted::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
            Wanted::Unsatisfiable => {
                let error = Error::validation(format!(
                    "the object has {} bytes; ask for some of these",
                    object.length
                ));
                let range = [(CONTENT_RANGE, format!("bytes */{}", object.length))];
                return Ok((StatusCode::RANGE_NOT_SATISFIABLE, range, Json(error)).into_response());
            }
        };
        let mut response = Response::builder()
            .status(status)
            .header(ETAG, etag)
            .header(ACCEPT_RANGES, "bytes")
            .header(CONTENT_TYPE, content_type)
            .header(CONTENT_LENGTH, part.end - part.start);
        if status == StatusCode::PARTIAL_CONTENT {
            let range = format!("bytes {}-{}/{}", part.start, part.end - 1, object.length);
            response = response.header(CONTENT_RANGE, range);
        }
        let body = if head {
            Body::empty()
        } else {
            let mut file = tokio::fs::File::from_std(object.file);
            file.seek(std::io::SeekFrom::Start(part.start))
                .await
                .map_err(StoreError::from)?;
            Body::from_stream(ReaderStream::with_capacity(
                file.take(part.end - part.start),
                READ_SIZE,
            ))
        };
        response
            .body(body)
            .map_err(|_| Error::internal("the answer cannot be written").into())
    }
}

/// Hands an upload to the thread that writes it, at the disk's pace.
async fn feed(body: Body, sender: mpsc::Sender<Piece>) -> Result<(), Failure> {
    let mut body = body.into_data_stream();
    let mut length = 0;
    while let Some(bytes) = body.next().await {
        let bytes = bytes.map_err(|_| {
            Error::validation("the upload broke off before its end; nothing was stored. Send it again")
        })?;
        length += bytes.len() as u64;
        if length > MAX_OBJECT {
            let message = format!(
                "an object may have at most {} GiB; nothing was stored",
                MAX_OBJECT >> 30
            );
            return Err(Error::new(ErrorCode::LimitExceeded, message).into());
        }
        if sender.send(Piece::Data(bytes)).await.is_err() {
            // The writer has given up and says why.
            return Ok(());
        }
    }
    // If the writer has given up meanwhile, it says why.
    let _ = sender.send(Piece::End).await;
    Ok(())
}

async fn status() -> Json<serde_json::Value> {
    Json(serde_json::json!({ "status": "healthy" }))
}

async fn object(State(blobs): State<Blobstore>, request: Request) -> Response {
    answer(blobs, request)
        .await
        .unwrap_or_else(Failure::into_response)
}

async fn answer(blobs: Blobstore, request: Request) -> Result<Response, Failure> {
    let (head, body) = request.into_parts();
    if head.uri.path() == "/" && head.method == Method::GET {
        return list(&blobs, head.uri.query()).await;
    }
    if matches!(head.method, Method::PUT | Method::DELETE) {
        blobs.inner.keys.check(&head.headers)?;
    }
    let path = BlobPath::from_url(head.uri.path()).map_err(|why| {
        Error::validation(format!(
            "{:?} is not the path of an object: {why}",
            head.uri.path()
        ))
    })?;
    match head.method {
        Method::GET => blobs.read(path, false, &head.headers).await,
        Method::HEAD => blobs.read(path, true, &head.headers).await,
        Method::PUT => blobs.put(path, body).await,
        Method::DELETE => {
            let missing = Error::not_found("object", &path);
            let there = blobs.blocking(move |store| store.delete(&path)).await?;
            if there {
                Ok(StatusCode::OK.into_response())
            } else {
                Err(missing.into())
            }
        }
        _ => {
            let error = Error::validation("objects have the methods GET, HEAD, PUT and DELETE");
            Ok((
                StatusCode::METHOD_NOT_ALLOWED,
                [(ALLOW, "GET, HEAD, PUT, DELETE")],
                Json(error),
            )
                .into_response())
        }
    }
}

async fn list(blobs: &Blobstore, query: Option<&str>) -> Result<Response, Failure> {
    let refuse = |why: String| Error::invalid_field("dir", why);
    let directory = query
        .unwrap_or_default()
        .split('&')
        .find_map(|pair| pair.strip_prefix("dir="));
    let directory = decode(directory.unwrap_or_default()).map_err(refuse)?;
    let directory = match directory.trim_matches('/') {
        "" => None,
        path => Some(BlobPath::new(path).map_err(refuse)?),
    };
    let names = blobs
        .blocking(move |store| store.list(directory.as_ref()))
        .await?;
    Ok(Json(names).into_response())
}

fn tag(digest: Digest) -> String {
    format!("\"{digest}\"")
}

/// Whether an `If-None-Match` header names this tag.
fn matches(tags: &str, etag: &str) -> bool {
    tags.split(',')
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

fn content_type(path: &BlobPath) -> &'static str {
    let json = std::path::Path::new(path.relative())
        .extension()
        .is_some_and(|extension| extension == "json");
    if json {
        "application/json"
    } else {
        "application/octet-stream"
    }
}

/// What went wrong, as an answer. A full disk has a status of its own.
enum Failure {
    Api(Error),
    Store(StoreError),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Api(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Failure {
    fn into_response(self) -> Response {
        let error = match self {
            Self::Api(error) => error,
            Self::Store(why @ StoreError::Full) => {
                tracing::warn!("the disk is full");
                let error = Error::new(ErrorCode::LimitExceeded, why.to_string());
                return (StatusCode::INSUFFICIENT_STORAGE, Json(error)).into_response();
            }
            Self::Store(why @ StoreError::Taken(_)) => Error::conflict(why.to_string()),
            Self::Store(why @ StoreError::WrongDigest { .. }) => Error::validation(why.to_string()),
            Self::Store(why @ StoreError::TooMany(_)) => {
                Error::new(ErrorCode::LimitExceeded, why.to_string())
            }
            Self::Store(why @ StoreError::Io(_)) => Error::internal(why.to_string()),
        };
        error.into_response()
    }
}
