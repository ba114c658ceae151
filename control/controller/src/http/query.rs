//! Query strings.

use axum::extract::FromRequestParts;
use flynn_api::Error;
use http::request::Parts;
use serde::de::DeserializeOwned;

/// A query string, with an error that says what is wrong with it.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(query)| Self(query))
            .map_err(|why| Error::validation(format!("the query cannot be read: {}", why.body_text())))
    }
}
