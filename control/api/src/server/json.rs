//! JSON in and out, queries, and errors as answers.

use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::request::Parts;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::disk;
use crate::{Error, ErrorCode};

/// The longest JSON body that is taken.
pub const MAX_BODY: usize = 4 << 20;

/// JSON as another component sends it (fields that are not known are ignored), and JSON as an answer.
#[derive(Clone, Debug)]
pub struct Json<T>(pub T);

/// JSON as a person's program sends it: fields that are not known are refused with their path, so that a typing
/// mistake loses nothing.
#[derive(Clone, Debug)]
pub struct StrictJson<T>(pub T);

/// The query of a call, refused as any other input is.
#[derive(Clone, Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let query = axum::extract::Query::from_request_parts(parts, state).await;
        let refused = |why| Error::validation(format!("the query is not what is wanted here: {why}"));
        query.map(|query| Self(query.0)).map_err(refused)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Error;

    async fn from_request(request: Request, _: &S) -> Result<Self, Error> {
        let bytes = body(request).await?;
        serde_json::from_slice(&bytes)
            .map(Self)
            .map_err(|why| unreadable(&why))
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for StrictJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, _: &S) -> Result<Self, Error> {
        strict(&body(request).await?).map(Self)
    }
}

async fn body(request: Request) -> Result<bytes::Bytes, Error> {
    to_bytes(request.into_body(), MAX_BODY).await.map_err(|_| {
        Error::new(
            ErrorCode::LimitExceeded,
            format!("the body is cut short or longer than {} MiB", MAX_BODY >> 20),
        )
    })
}

fn unreadable(why: &serde_json::Error) -> Error {
    Error::validation(format!("the body is not the JSON that is wanted here: {why}"))
}

fn strict<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let mut unknown = Vec::new();
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_ignored::deserialize(&mut deserializer, |path| {
        if unknown.len() < 10 {
            unknown.push(path.to_string());
        }
    })
    .map_err(|why| unreadable(&why))?;
    deserializer.end().map_err(|why| unreadable(&why))?;
    match unknown.first() {
        None => Ok(value),
        Some(first) => {
            let names = unknown.join(", ");
            let mut error = Error::validation(format!("unknown fields: {names}. Check their spelling"));
            error.detail = Some(serde_json::json!({ "field": first }));
            Err(error)
        }
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(bytes) => (
                [(CONTENT_TYPE, HeaderValue::from_static("application/json"))],
                bytes,
            )
                .into_response(),
            Err(why) => Error::internal(format!("the answer cannot be written: {why}")).into_response(),
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        if self.code == ErrorCode::Internal {
            tracing::error!(message = %self.message, "a request failed");
        }
        // A full disk has a status of its own.
        let status = if disk::is_full(&self) {
            StatusCode::INSUFFICIENT_STORAGE
        } else {
            self.code.status()
        };
        let mut response = (status, Json(&self)).into_response();
        if self.retry {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::Release;

    #[test]
    fn unknown_fields_are_named() {
        let error = strict::<Release>(br#"{"processes":{"web":{"arg":["x"]}},"evn":{}}"#).unwrap_err();
        assert_eq!(
            error.message,
            "unknown fields: processes.web.arg, evn. Check their spelling"
        );
    }

    #[test]
    fn what_follows_the_json_is_refused() {
        assert!(strict::<Release>(b"{} {}").is_err());
        assert!(strict::<Release>(b"{\"env\":").is_err());
        assert!(strict::<Release>(b"").is_err());
        assert!(strict::<Release>(b" {} ").is_ok());
    }
}
