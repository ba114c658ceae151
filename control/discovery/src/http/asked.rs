//! What a read asks for beside its path, and answers that name their index.

use axum::extract::FromRequestParts;
use axum::response::{IntoResponse as _, Response};
use flynn_api::Error;
use flynn_api::discovery::{Consistency, INDEX_HEADER, Position};
use flynn_api::server::{Json, wants_events};
use http::HeaderValue;
use http::request::Parts;
use serde::Serialize;

use crate::node::Node;
use crate::state::State;

/// How a read or a watch is wanted.
#[derive(Debug)]
pub(super) struct Asked {
    /// `?consistency=`
    pub(super) consistency: Option<Consistency>,
    /// `Last-Event-ID`, or else `?since=`: a browser that resumes sends both, and the header is the later one.
    pub(super) since: Option<Position>,
    /// A stream.
    pub(super) events: bool,
}

impl<S: Sync> FromRequestParts<S> for Asked {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let query = parts.uri.query().unwrap_or_default();
        let find = |name: &str| {
            let mut fields = query.split('&').filter_map(|field| field.split_once('='));
            fields.rfind(|(key, _)| *key == name).map(|(_, value)| value)
        };
        let last = parts.headers.get("last-event-id");
        let last = last
            .map(|value| value.to_str().unwrap_or("?"))
            .filter(|value| !value.is_empty());
        Ok(Self {
            consistency: find("consistency").map(str::parse).transpose()?,
            since: last.or_else(|| find("since")).map(str::parse).transpose()?,
            events: wants_events(&parts.headers),
        })
    }
}

/// Reads as fresh as is asked, or else `usual`.
pub(super) async fn read<T: Serialize>(
    node: &Node,
    asked: &Asked,
    usual: Consistency,
    look: impl FnOnce(&State) -> Result<T, Error>,
) -> Result<Response, Error> {
    node.ready_for(asked.consistency.unwrap_or(usual)).await?;
    let (index, found) = node.view.read_at(look);
    Ok(match found {
        Ok(found) => at(index, Json(found).into_response()),
        Err(error) => at(index, error.into_response()),
    })
}

/// An answer that reflects `index`, or comes from a write there.
pub(super) fn at(index: u64, mut answer: Response) -> Response {
    answer
        .headers_mut()
        .insert(INDEX_HEADER, HeaderValue::from(index));
    answer
}

#[cfg(test)]
mod tests {
    use flynn_api::ErrorCode;

    use super::*;

    async fn asked(uri: &str, last: Option<&str>) -> Result<Asked, Error> {
        let mut request = http::Request::get(uri);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        Asked::from_request_parts(&mut parts, &()).await
    }

    #[tokio::test]
    async fn what_is_asked_is_read_and_the_rest_refused() {
        let nothing = asked("/services/web", None).await.unwrap();
        assert!(nothing.consistency.is_none() && nothing.since.is_none() && !nothing.events);
        let one = asked("/services/web?x&since=7&consistency=lease", None)
            .await
            .unwrap();
        assert_eq!(one.consistency, Some(Consistency::Lease));
        assert_eq!(one.since, Some(Position::behind(7)));
        let resumed = asked("/services?since=7", Some("9.1")).await.unwrap();
        assert_eq!(resumed.since, Some(Position::within(9, 1)));
        assert_eq!(
            asked("/services?since=7", Some("")).await.unwrap().since,
            Some(Position::behind(7))
        );
        for (uri, last) in [("/?since=x", None), ("/?consistency=", None), ("/", Some("7.x"))] {
            assert_eq!(asked(uri, last).await.unwrap_err().code, ErrorCode::Validation);
        }
    }
}
