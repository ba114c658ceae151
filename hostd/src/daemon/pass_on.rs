//! What still comes to a daemon that has handed its work over: it goes to the successor, by connections of clients who
//! need not notice.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, HeaderValue, TRANSFER_ENCODING, UPGRADE};
use axum::http::request::Parts;
use axum::http::{Method, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use flynn_api::client::{Http, Upgraded};
use flynn_api::{Result, host};
use http_body_util::BodyExt as _;
use serde::Serialize;

use super::Daemon;

/// Lets requests that act pass the gate, and sends what comes too late on.
pub(super) async fn admit(State(daemon): State<Arc<Daemon>>, request: Request, next: Next) -> Response {
    // Those who want their connection upgraded look for themselves: nothing waits until they are done.
    if request.headers().contains_key(UPGRADE) {
        return next.run(request).await;
    }
    let gate = &daemon.gate;
    let acts = request.method() != Method::GET && request.method() != Method::HEAD;
    // Who has this daemon replaced waits outside.
    if !acts || request.uri().path() == super::update::PATH {
        return if gate.is_left() {
            forward(request).await
        } else {
            next.run(request).await
        };
    }
    let what = format!("{} {}", request.method(), request.uri().path());
    match gate.enter(&what).await {
        Some(_pass) => next.run(request).await,
        None => forward(request).await,
    }
}

fn successor() -> Result<Http> {
    Http::new(&format!("unix:{}", host::SOCKET))
}

/// Has the successor answer. Who asks was authorised here.
async fn forward(request: Request) -> Response {
    let version = request.version();
    let mut response = match send(request).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    };
    if version == Version::HTTP_11 {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn send(request: Request) -> Result<Response> {
    let (mut parts, body) = request.into_parts();
    for name in [CONNECTION, TRANSFER_ENCODING] {
        parts.headers.remove(name);
    }
    parts.version = Version::HTTP_11;
    let body = body.map_err(Into::into).boxed_unsync();
    let response = successor()?.send_raw(Request::from_parts(parts, body)).await?;
    let (mut parts, body) = response.into_parts();
    for name in [CONNECTION, TRANSFER_ENCODING] {
        parts.headers.remove(name);
    }
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// An upgraded connection to the successor, for the same wish.
pub(super) async fn upgrade(parts: &Parts, protocol: &str, wish: &impl Serialize) -> Result<Upgraded> {
    successor()?.upgrade(parts.uri.path(), protocol, wish).await
}
