//! `/events`.

use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use flynn_api::controller::{Event, EventKind};
use flynn_api::server::{Json, wants_events};
use flynn_api::{Error, Result};
use futures::StreamExt as _;
use http::HeaderMap;
use serde::Deserialize;

use super::State;
use super::query::Query;
use crate::data::events::{self, Filter};
use crate::data::{apps, of_word};

/// Events of the past that one call gives, at most.
const MAX_PAST: i64 = 1000;

/// What `GET /events` takes.
#[derive(Deserialize)]
pub(crate) struct Listing {
    app_id: Option<String>,
    /// Comma-separated.
    object_types: Option<String>,
    object_id: Option<String>,
    /// In a stream: events of the past first.
    #[serde(default)]
    past: bool,
    /// Events of the past, at most.
    count: Option<i64>,
    before_id: Option<i64>,
    since_id: Option<i64>,
}

/// `GET /events`: a list, the newest first; or a stream in order, after `Last-Event-Id` if the client names one.
pub(crate) async fn list(state: State, Query(query): Query<Listing>, headers: HeaderMap) -> Result<Response> {
    let client = state.database.client().await?;
    let filter = filter(&client, &query).await?;
    let count = query.count.unwrap_or(MAX_PAST).clamp(0, MAX_PAST);
    let since = query.since_id.unwrap_or(0);
    let newest = events::newest(&client).await?;
    let to = query
        .before_id
        .map_or(newest, |before| before.saturating_sub(1).min(newest));
    if !wants_events(&headers) {
        return Ok(Json(events::past(&client, to, since, count, &filter).await?).into_response());
    }
    let (from, first) = if let Some(last) = last_event_id(&headers)? {
        events::check_resumable(&client, last).await?;
        (last, Vec::new())
    } else if query.past {
        let mut past = events::past(&client, newest, since, count, &filter).await?;
        past.reverse();
        (newest, past)
    } else {
        (newest, Vec::new())
    };
    drop(client);
    let stream = state.feed.subscribe(from, filter, first).into_stream();
    Ok(flynn_api::server::events(
        stream.map(|event| (Some(event.id.to_string()), event)),
    ))
}

/// `GET /events/{id}`.
pub(crate) async fn get(state: State, Path(id): Path<String>) -> Result<Json<Event>> {
    let id = id
        .parse()
        .map_err(|_| Error::not_found("event", format!("{id:?}: an id is a number")))?;
    Ok(Json(events::find(&state.database.client().await?, id).await?))
}

async fn filter(c: &impl deadpool_postgres::GenericClient, query: &Listing) -> Result<Filter> {
    let app_id = match query.app_id.as_deref().filter(|app| !app.is_empty()) {
        Some(app) => Some(apps::find_any(c, app).await?.id),
        None => None,
    };
    let kind = |word: &str| {
        let unknown =
            || Error::invalid_field("object_types", format!("there are no events of type {word:?}"));
        let kind = of_word::<EventKind>(word)?;
        (kind != EventKind::Other).then_some(kind).ok_or_else(unknown)
    };
    let kinds = query.object_types.as_deref().unwrap_or_default();
    let kinds = kinds
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty())
        .map(kind);
    let object_id = query.object_id.clone().filter(|id| !id.is_empty());
    Ok(Filter {
        app_id,
        kinds: kinds.collect::<Result<_>>()?,
        object_id,
    })
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<i64>> {
    let Some(value) = headers.get("last-event-id") else {
        return Ok(None);
    };
    let id = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    id.map(Some)
        .ok_or_else(|| Error::validation("Last-Event-Id must be the id of an event, a number"))
}
