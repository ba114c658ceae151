//! Calls over HTTP/1.1 with JSON bodies.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connect::Connector;
use super::events::EventStream;
use crate::tls::{Identity, TlsError};
use crate::{Error, ErrorCode, IDEMPOTENCY_KEY, Result};

/// A request body.
pub type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// An upgraded connection: bytes both ways.
pub type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// The longest answer that is read whole.
const MAX_ANSWER: usize = 64 << 20;

/// How long an idle connection is kept for another call. Servers close theirs after 30 s: it must not be taken up in
/// that very moment.
const IDLE: Duration = Duration::from_secs(15);

/// Calls one server. Cheap to clone; connections are kept alive and shared between clones.
#[derive(Clone)]
pub struct Http {
    client: Client<Connector, Body>,
    base: String,
    authorization: Option<HeaderValue>,
    timeout: Duration,
}

impl std::fmt::Debug for Http {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Http")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

/// An empty body.
pub(super) fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed_unsync()
}

/// A body of these bytes.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

impl Http {
    /// A client of the server at `base`: `http://host:port`, `https://host:port` (with [`Http::tls`] or
    /// [`Http::identity`]) or `unix:/path`.
    pub fn new(base: &str) -> Result<Self> {
        let refuse = |why: &str| Error::validation(format!("{base:?} is not a server's URL: {why}"));
        let (connector, base) = if let Some(path) = base.strip_prefix("unix:") {
            (
                Connector::Unix(PathBuf::from(path)),
                "http://localhost".to_owned(),
            )
        } else {
            let uri: http::Uri = base.parse().map_err(|_| refuse("it cannot be read"))?;
            if uri.authority().is_none() {
                return Err(refuse("it names no host"));
            }
            match uri.scheme_str() {
                Some("http" | "https") => (Connector::Tcp, base.trim_end_matches('/').to_owned()),
                _ => return Err(refuse("it must begin with http://, https:// or unix:")),
            }
        };
        Ok(Self {
            client: pool(connector),
            base,
            authorization: None,
            timeout: Duration::from_secs(30),
        })
    }

    /// With this TLS configuration, for `https://`.
    #[must_use]
    pub fn tls(mut self, config: Arc<rustls::ClientConfig>) -> Self {
        self.client = pool(Connector::Tls(config));
        self
    }

    /// With mutual TLS: shows this identity, trusts its CA alone.
    pub fn identity(self, identity: &Identity) -> Result<Self, TlsError> {
        Ok(self.tls(identity.client_config()?))
    }

    /// With HTTP basic authentication: no user name, this password.
    #[must_use]
    pub fn password(mut self, password: &str) -> Self {
        let value = format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode(format!(":{password}"))
        );
        self.authorization = HeaderValue::from_str(&value).ok().map(|mut value| {
            value.set_sensitive(true);
            value
        });
        self
    }

    /// How long a call may take until its answer is whole (streams: until they begin); 30 s by default.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long a call may take.
    pub(super) fn patience(&self) -> Duration {
        self.timeout
    }

    /// The server's URL.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// `GET`, answered by JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, None, empty()).await
    }

    /// `PUT` of JSON, answered by JSON (or nothing, for `()`).
    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &(impl Serialize + ?Sized)) -> Result<T> {
        self.call(Method::PUT, path, None, json(body)?).await
    }

    /// [`Http::put`], which the server does once however often it is called with the same key.
    pub(super) async fn put_once<T: DeserializeOwned>(
        &self,
        path: &str,
        key: &str,
        body: &(impl Serialize + ?Sized),
    ) -> Result<T> {
        self.call(Method::PUT, path, Some(key), json(body)?).await
    }

    /// `POST` of JSON, answered by JSON (or nothing, for `()`).
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &(impl Serialize + ?Sized)) -> Result<T> {
        self.call(Method::POST, path, None, json(body)?).await
    }

    /// `GET`, answered by a file of no more than `limit` bytes.
    pub async fn get_bytes(&self, path: &str, limit: usize) -> Result<Bytes> {
        let request = Request::get(path)
            .body(empty())
            .map_err(|why| bad_request(path, &why))?;
        let answer = async {
            let response = self.send(request).await?;
            read(response.into_body(), limit)
                .await
                .map_err(|why| self.broken(path, why.as_ref()))
        };
        tokio::time::timeout(self.timeout, answer)
            .await
            .unwrap_or_else(|_| Err(self.late(&Method::GET, path)))
    }

    /// `POST` of a file, answered by JSON.
    pub async fn post_bytes<T: DeserializeOwned>(&self, path: &str, body: Bytes) -> Result<T> {
        self.post_body(path, full(body)).await
    }

    /// `POST` of a file as it comes, answered by JSON.
    pub async fn post_body<T: DeserializeOwned>(&self, path: &str, body: Body) -> Result<T> {
        let request = Request::post(path).header(CONTENT_TYPE, "application/octet-stream");
        let request = request.body(body).map_err(|why| bad_request(path, &why))?;
        self.ask(request).await
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.call(Method::DELETE, path, None, empty()).await
    }

    /// `DELETE`, answered by JSON.
    pub async fn delete_for<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::DELETE, path, None, empty()).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Body,
    ) -> Result<T> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = key {
            request = request.header(IDEMPOTENCY_KEY, key);
        }
        self.ask(request.body(body).map_err(|why| bad_request(path, &why))?)
            .await
    }

    async fn ask<T: DeserializeOwned>(&self, request: Request<Body>) -> Result<T> {
        let (method, path) = (request.method().clone(), request.uri().to_string());
        let path = path.as_str();
        let answer = async {
            let response = self.send(request).await?;
            let bytes = read(response.into_body(), MAX_ANSWER)
                .await
                .map_err(|why| self.broken(path, why.as_ref()))?;
            // An empty answer stands for nothing, and so does `{}`.
            if bytes.is_empty() || std::mem::size_of::<T>() == 0 {
                return serde_json::from_slice(b"null")
                    .map_err(|_| Error::internal(format!("{}{path} answered nothing", self.base)));
            }
            serde_json::from_slice(&bytes).map_err(|why| {
                Error::internal(format!(
                    "{}{path} answered something that cannot be read: {why}",
                    self.base
                ))
            })
        };
        tokio::time::timeout(self.timeout, answer)
            .await
            .unwrap_or_else(|_| Err(self.late(&method, path)))
    }

    fn late(&self, method: &Method, path: &str) -> Error {
        Error::new(
            ErrorCode::Timeout,
            format!("{method} {}{path} took too long", self.base),
        )
    }

    /// Sends `request`, whose URI is a path, and gives the answer's head; an error status becomes an [`Error`].
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let response = self.send_raw(request).await?;
        let status = response.status();
        if status.is_success()
            || status == StatusCode::SWITCHING_PROTOCOLS
            || status == StatusCode::NOT_MODIFIED
        {
            return Ok(response);
        }
        let bytes = read(response.into_body(), 1 << 20).await.unwrap_or_default();
        Err(Error::from_response(status, &bytes))
    }

    /// Sends `request`, whose URI is a path, and gives the answer whatever its status.
    pub async fn send_raw(&self, mut request: Request<Body>) -> Result<Response<Incoming>> {
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str())
            .to_owned();
        let uri = format!("{}{path}", self.base);
        *request.uri_mut() = uri.parse().map_err(|why| bad_request(&uri, &why))?;
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        if self.base == "http://localhost" {
            request
                .headers_mut()
                .insert(HOST, HeaderValue::from_static("localhost"));
        }
        self.client.request(request).await.map_err(|why| {
            if why.is_connect() {
                self.unreachable(&path, &why)
            } else {
                self.broken(&path, &why)
            }
        })
    }

    /// A stream of Server-Sent Events. It ends when the server ends it; whoever needs more calls again.
    pub async fn events<T: DeserializeOwned>(&self, path: &str) -> Result<EventStream<T>> {
        self.events_after(path, None).await
    }

    /// A stream of Server-Sent Events after the one with this id.
    pub async fn events_after<T: DeserializeOwned>(
        &self,
        path: &str,
        last: Option<&str>,
    ) -> Result<EventStream<T>> {
        let mut request = Request::builder().uri(path).header(ACCEPT, "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let request = request.body(empty()).map_err(|why| bad_request(path, &why))?;
        let response = tokio::time::timeout(self.timeout, self.send(request))
            .await
            .unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorCode::Timeout,
                    format!("{}{path} took too long", self.base),
                ))
            })?;
        Ok(EventStream::new(response.into_body()))
    }

    /// `POST`s JSON and takes the connection over for `protocol`.
    pub async fn upgrade(&self, path: &str, protocol: &str, body: &impl Serialize) -> Result<Upgraded> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, protocol)
            .header(CONTENT_TYPE, "application/json")
            .body(json(body)?)
            .map_err(|why| bad_request(path, &why))?;
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Error::internal(format!(
                "{}{path} did not switch to {protocol}",
                self.base
            )));
        }
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|why| self.broken(path, &why))?;
        Ok(TokioIo::new(upgraded))
    }

    /// No connection could be made: nothing was sent.
    fn unreachable(&self, path: &str, why: &(dyn std::error::Error + 'static)) -> Error {
        let mut message = format!("no answer from {}{path}: {why}", self.base);
        let mut cause = why.source();
        while let Some(why) = cause {
            message.push_str(": ");
            message.push_str(&why.to_string());
            cause = why.source();
        }
        Error::unavailable(message)
    }

    /// The connection broke when the call may have been read.
    fn broken(&self, path: &str, why: &(dyn std::error::Error + 'static)) -> Error {
        self.unreachable(path, why).or_done()
    }
}

fn pool(connector: Connector) -> Client<Connector, Body> {
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(8)
        .build(connector)
}

fn json(body: &(impl Serialize + ?Sized)) -> Result<Body> {
    let bytes =
        serde_json::to_vec(body).map_err(|why| Error::internal(format!("cannot write JSON: {why}")))?;
    Ok(full(bytes))
}

fn bad_request(path: &str, why: &dyn std::fmt::Display) -> Error {
    Error::validation(format!("{path:?} cannot be called: {why}"))
}

async fn read(
    body: Incoming,
    limit: usize,
) -> std::result::Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    Ok(Limited::new(body, limit).collect().await?.to_bytes())
}

/// Percent-encodes one segment of a path, or one value of a query.
pub fn encode(segment: &str) -> String {
    let mut encoded = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
