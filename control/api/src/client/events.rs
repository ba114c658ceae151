//! Reads Server-Sent Events (the HTML standard, §9.2) whose data is JSON.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use hyper::body::{Body as _, Incoming};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, Sleep, sleep};

use crate::{Error, HEARTBEAT, Result};

/// The longest event that is taken.
const MAX_EVENT: usize = 16 << 20;
/// How long a server may be silent, its comments included, before it is taken for gone.
const SILENCE: Duration = HEARTBEAT.saturating_mul(3);

/// A stream of events: the id, if the event has one, and its data.
///
/// It ends when the server closes the connection; an item that is an error is the last. A server that has gone without
/// a word is such an error as well: it would have sent a comment.
pub struct EventStream<T> {
    body: Incoming,
    silence: Pin<Box<Sleep>>,
    parser: Parser,
    last: Option<String>,
    done: bool,
    data: PhantomData<fn() -> T>,
}

impl<T> EventStream<T> {
    pub(super) fn new(body: Incoming) -> Self {
        Self {
            body,
            silence: Box::pin(sleep(SILENCE)),
            parser: Parser::default(),
            last: None,
            done: false,
            data: PhantomData,
        }
    }

    /// The id that the server gave last, with an event or alone: a later stream resumes behind it.
    pub fn last_id(&self) -> Option<&str> {
        self.last.as_deref()
    }
}

impl<T: DeserializeOwned> Stream for EventStream<T> {
    type Item = Result<(Option<String>, T)>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(event) = this.parser.events.pop_front() {
                if event.id.is_some() {
                    this.last.clone_from(&event.id);
                }
                if event.data.is_empty() {
                    continue;
                }
                let data = serde_json::from_str(&event.data)
                    .map_err(|why| Error::internal(format!("an event cannot be read: {why}")));
                this.done |= data.is_err();
                return Poll::Ready(Some(data.map(|data| (event.id, data))));
            }
            if this.done {
                return Poll::Ready(None);
            }
            let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
                ready!(this.silence.as_mut().poll(cx));
                this.done = true;
                let message = format!("the stream broke off: nothing came for {} s", SILENCE.as_secs());
                return Poll::Ready(Some(Err(Error::unavailable(message))));
            };
            match frame {
                None => this.done = true,
                Some(Ok(frame)) => {
                    this.silence.as_mut().reset(Instant::now() + SILENCE);
                    let fits = frame.data_ref().is_none_or(|bytes| this.parser.push(bytes));
                    if !fits {
                        this.done = true;
                        return Poll::Ready(Some(Err(Error::internal("an event is longer than 16 MiB"))));
                    }
                }
                Some(Err(why)) => {
                    this.done = true;
                    return Poll::Ready(Some(Err(Error::unavailable(format!(
                        "the stream broke off: {why}"
                    )))));
                }
            }
        }
    }
}

/// An event, or, without data, an id alone.
#[derive(Debug, PartialEq)]
struct RawEvent {
    id: Option<String>,
    data: String,
}

/// Takes bytes in any pieces and gives whole events.
#[derive(Default)]
struct Parser {
    line: Vec<u8>,
    id: Option<String>,
    data: String,
    events: VecDeque<RawEvent>,
}

impl Parser {
    /// Takes a piece; false when an event grows too long.
    fn push(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.take_line(&line);
        }
        self.line.extend_from_slice(rest);
        self.line.len() + self.data.len() <= MAX_EVENT
    }

    fn take_line(&mut self, line: &[u8]) {
        let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line));
        if line.is_empty() {
            let id = self.id.take();
            if id.is_some() || !self.data.is_empty() {
                let data = std::mem::take(&mut self.data);
                self.events.push_back(RawEvent { id, data });
            }
            return;
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.id = Some(value.to_owned()),
            "data" => {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(value);
            }
            // Comments (an empty field), event names and retry times carry nothing for us.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_ids_comments_and_lines() {
        let mut parser = Parser::default();
        assert!(parser.push(b": hello\n\nid: 7\ndata: {\"a\":\ndata: 1}\r\n\r\ndata: 2\n\n"));
        let events: Vec<_> = parser.events.into();
        assert_eq!(
            events[0],
            RawEvent {
                id: Some("7".into()),
                data: "{\"a\":\n1}".into()
            }
        );
        assert_eq!(
            events[1],
            RawEvent {
                id: None,
                data: "2".into()
            }
        );
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(bytes in proptest::collection::vec(prop_oneof![
            Just(b'\n'), Just(b':'), Just(b'd'), any::<u8>()], 0..200), cut in 0usize..200) {
            let cut = cut.min(bytes.len());
            let (mut whole, mut pieces) = (Parser::default(), Parser::default());
            whole.push(&bytes);
            pieces.push(&bytes[..cut]);
            pieces.push(&bytes[cut..]);
            prop_assert_eq!(whole.events, pieces.events);
        }
    }
}
