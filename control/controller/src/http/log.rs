//! `GET /apps/{app}/log`.

use axum::body::Body;
use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use flynn_api::Result;
use flynn_api::server::wants_events;
use futures::StreamExt as _;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde::Deserialize;

use super::State;
use super::query::Query;
use crate::data::apps;
use crate::logs::{self, MAX_LINES, Wanted};
use crate::rules;

/// What `GET /apps/{app}/log` takes.
#[derive(Deserialize)]
pub(crate) struct Listing {
    #[serde(default)]
    follow: bool,
    job_id: Option<String>,
    lines: Option<u32>,
    process_type: Option<String>,
}

/// The app's log: the last `lines` lines of all of its jobs by their time, and with `follow` what comes after.
/// Server-Sent Events if the client accepts them, JSON by the line otherwise.
pub(crate) async fn log(
    state: State,
    Path(app): Path<String>,
    Query(query): Query<Listing>,
    headers: HeaderMap,
) -> Result<Response> {
    let app = apps::find(&state.database.client().await?, &app).await?;
    let job = query.job_id.filter(|id| !id.is_empty());
    let wanted = Wanted {
        job: job
            .map(|id| rules::job::split_id(&id).map(|(_, uuid)| uuid.to_string()))
            .transpose()?,
        process_type: query.process_type,
        lines: query.lines.unwrap_or(MAX_LINES).min(MAX_LINES),
        follow: query.follow,
    };
    let lines = logs::stream(&state, &app, wanted).await?;
    if wants_events(&headers) {
        return Ok(flynn_api::server::events(lines.map(|line| (None, line))));
    }
    let lines = lines.map(|line| {
        let mut json = serde_json::to_vec(&line)?;
        json.push(b'\n');
        Ok::<_, serde_json::Error>(Bytes::from(json))
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}
