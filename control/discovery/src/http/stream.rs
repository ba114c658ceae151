//! Watches as event streams.
//!
//! A change carries its [`Position`]; what is there when a watch begins carries none, for nobody can resume in the midst
//! of it. A stream in which nothing is told for a while tells the position alone, so that whoever watches what seldom
//! changes can still resume after everything else has changed a lot.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse as _, Response};
use flynn_api::discovery::{Event, EventKind, Position};
use flynn_api::{Error, HEARTBEAT};
use futures::stream::{Stream, StreamExt as _, iter, unfold};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep};

use crate::history::{Change, frame};
use crate::node::Node;
use crate::view::{Begin, View, Watch};

/// All services, or one of them: what is there (told as the reader takes it) or what was missed since, `current`, and
/// what changes.
pub(super) async fn stream(
    node: &Node,
    service: Option<&str>,
    since: Option<Position>,
    wanted: fn(EventKind) -> bool,
) -> Result<Response, Error> {
    if let Some(since) = since {
        node.ready_since(since).await?;
    }
    let view = &node.view;
    if let Some(service) = service {
        return Ok(answer(view, service, view.watch(service, since)?, wanted));
    }
    let Watch {
        begin,
        index,
        changes,
    } = view.watch_all(since)?;
    let begin = match begin {
        Begin::Anew(present) => Begin::Anew(present.everything()),
        Begin::Missed(missed) => Begin::Missed(missed),
    };
    Ok(answer(
        view,
        "",
        Watch {
            begin,
            index,
            changes,
        },
        wanted,
    ))
}

fn answer<P>(view: &Arc<View>, service: &str, watch: Watch<P>, wanted: fn(EventKind) -> bool) -> Response
where
    P: IntoIterator<Item = Event, IntoIter: Send + 'static> + Send + 'static,
{
    let (present, missed) = match watch.begin {
        Begin::Anew(present) => (Some(present), Vec::new()),
        Begin::Missed(missed) => (None, missed),
    };
    let present = present
        .into_iter()
        .flatten()
        .filter(move |event| wanted(event.kind));
    let present = present.map(|event| frame(&event, None));
    let missed = missed.into_iter().filter(move |change| wanted(change.event.kind));
    let missed = missed.map(|change| change.frame());
    let position = Position::behind(watch.index);
    let current = frame(
        &Event::new(service, EventKind::Current, watch.index),
        Some(position),
    );
    let changes = Changes {
        view: Arc::clone(view),
        queue: watch.changes,
        wanted,
        position,
        told: Instant::now(),
        alarm: Box::pin(sleep(HEARTBEAT)),
    };
    let events = iter(present.chain(missed).chain([current])).chain(changes.stream());
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    let body = Body::from_stream(events.map(Ok::<_, Infallible>));
    (headers, body).into_response()
}

/// What comes after `current`.
struct Changes {
    view: Arc<View>,
    queue: mpsc::Receiver<Arc<Change>>,
    wanted: fn(EventKind) -> bool,
    position: Position,
    /// When something was told last.
    told: Instant,
    /// Rings when nothing may have been told for long. It is not set anew for each event: a thousand watchers would spend
    /// more time on that than on the event.
    alarm: Pin<Box<Sleep>>,
}

impl Changes {
    fn stream(self) -> impl Stream<Item = Bytes> {
        unfold(self, |mut changes| async {
            let event = changes.next().await?;
            changes.told = Instant::now();
            Some((event, changes))
        })
    }

    /// The next that is wanted, or the position when it is time to say it.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            tokio::select! {
                biased;
                () = &mut self.alarm => {
                    let due = self.told + HEARTBEAT;
                    if Instant::now() >= due {
                        return Some(self.say_position());
                    }
                    self.alarm.as_mut().reset(due);
                }
                change = self.queue.recv() => {
                    let change = change?;
                    self.position = change.position;
                    if (self.wanted)(change.event.kind) {
                        return Some(change.frame());
                    }
                }
            }
        }
    }

    /// Where this watch stands.
    fn say_position(&mut self) -> Bytes {
        self.alarm.as_mut().reset(Instant::now() + HEARTBEAT);
        // Changes are sent while the view is locked: if none waits now, none is missing up to its index, unless this watch was cut off.
        let (index, all) = self
            .view
            .read_at(|_| self.queue.is_empty() && !self.queue.is_closed());
        if all {
            self.position = Position::behind(index);
        }
        format!("id: {}\n\n", self.position).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever was cut off is not told of a position beyond what it was told of.
    #[tokio::test]
    async fn no_position_is_said_after_the_end() {
        let view = Arc::new(View::default());
        let watch = view.watch_all(None).unwrap();
        let mut changes = Changes {
            view: Arc::clone(&view),
            queue: watch.changes,
            wanted: |_| true,
            position: Position::behind(watch.index),
            told: Instant::now(),
            alarm: Box::pin(sleep(HEARTBEAT)),
        };
        view.apply_all([(5, None)]);
        let said = format!("id: {}\n\n", Position::behind(5));
        assert_eq!(changes.say_position(), said);
        view.disconnect();
        view.apply_all([(9, None)]);
        assert_eq!(changes.say_position(), said);
        assert!(changes.next().await.is_none());
    }
}
