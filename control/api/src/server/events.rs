//! Server-Sent Events.

use std::convert::Infallible;
use std::marker::PhantomData;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt as _};
use http::HeaderMap;
use http::header::ACCEPT;
use serde::Serialize;

use crate::HEARTBEAT;

/// Whether the client asks for a stream of events.
pub fn wants_events(headers: &HeaderMap) -> bool {
    headers
        .get(ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.contains("text/event-stream"))
}

/// Answers with a stream of events: an id, where resumption is possible, and the data. Ends with the stream.
/// A comment every 15 s keeps the connection alive, and each side finds out by it that the other has gone.
pub fn events<T: Serialize>(stream: impl Stream<Item = (Option<String>, T)> + Send + 'static) -> Response {
    let stream = stream.map(|(id, data)| {
        let event = id.map_or_else(Event::default, |id| Event::default().id(id));
        let event = event.json_data(&data).unwrap_or_else(|error| {
            tracing::error!(%error, "an event cannot be written");
            Event::default().comment("an event could not be written")
        });
        Ok::<_, Infallible>(event)
    });
    Sse::new(stream)
        .keep_alive(KeepAlive::new().interval(HEARTBEAT))
        .into_response()
}

/// A stream of events that are these, without ids.
#[derive(Debug)]
pub struct Events<T> {
    response: Response,
    of: PhantomData<fn() -> T>,
}

impl<T: Serialize> Events<T> {
    /// Sends these.
    pub fn new(stream: impl Stream<Item = T> + Send + 'static) -> Self {
        Self {
            response: events(stream.map(|event| (None, event))),
            of: PhantomData,
        }
    }
}

impl<T> IntoResponse for Events<T> {
    fn into_response(self) -> Response {
        self.response
    }
}

/// What is; or, for who asks for events, what happens.
#[derive(Debug)]
pub enum OrEvents<T, E> {
    /// What is.
    Is(T),
    /// What happens.
    Happens(Events<E>),
}

impl<T: IntoResponse, E> IntoResponse for OrEvents<T, E> {
    fn into_response(self) -> Response {
        match self {
            Self::Is(answer) => answer.into_response(),
            Self::Happens(events) => events.into_response(),
        }
    }
}
