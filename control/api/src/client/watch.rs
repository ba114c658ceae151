//! A watch that goes on at another host when it breaks off.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{BoxStream, Stream, StreamExt as _, unfold};
use tokio::time::{Instant, sleep, timeout};

use super::EventStream;
use super::discovery::DiscoveryClient;
use crate::discovery::{Event, EventKind};
use crate::{Error, ErrorCode, Result};

/// A watch that is quiet for this long asks whether its host is still there, if there are others.
const QUIET: Duration = Duration::from_secs(3);
/// How long a watch tries to go on.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between attempts; longer each time.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// One item of a watch: the id, if the event has one, and the event.
type Told = (Option<String>, Event);

/// A stream of changes, which resumes behind the last that it has told: at the same host, or at another one that the
/// client knows. Nothing is told twice or left out.
///
/// A watch that breaks off before its first id (that of `current`), or cannot be resumed, ends; an item that is an error
/// is the last. After `gone` it must be begun anew.
pub struct Watch {
    events: BoxStream<'static, (Option<String>, Result<Told>)>,
    last: Option<String>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

impl Watch {
    pub(super) async fn begin(client: DiscoveryClient, path: String, last: Option<String>) -> Result<Self> {
        let (base, stream) = client.events(&path, last.as_deref()).await?;
        let following = Following {
            client,
            path,
            last: last.clone(),
            stream: Some(stream),
            base,
            resumed: false,
            pause: PAUSE,
        };
        let events = unfold(following, |mut following| async {
            let told = following.next().await?;
            Some(((following.last.clone(), told), following))
        });
        Ok(Self {
            events: events.boxed(),
            last,
        })
    }

    /// The id that was given last: a later watch resumes behind it.
    pub fn last_id(&self) -> Option<&str> {
        self.last.as_deref()
    }
}

impl Stream for Watch {
    type Item = Result<Told>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_next_unpin(cx).map(|told| {
            let (last, told) = told?;
            self.last = last;
            Some(told)
        })
    }
}

struct Following {
    client: DiscoveryClient,
    path: String,
    last: Option<String>,
    /// None after the end.
    stream: Option<EventStream<Event>>,
    /// Where it comes from.
    base: String,
    /// It has not come to its `current` since it was resumed.
    resumed: bool,
    /// Before the next attempt to go on; as at first once there was a change.
    pause: Duration,
}

impl Following {
    async fn next(&mut self) -> Option<Result<Told>> {
        loop {
            let broken = match self.heard().await? {
                Some(Ok((_, event))) if self.resumed && event.kind == EventKind::Current => {
                    self.resumed = false;
                    continue;
                }
                Some(Ok(told)) => {
                    self.pause = PAUSE;
                    return Some(Ok(told));
                }
                Some(Err(error)) if error.code != ErrorCode::Unavailable => {
                    self.stream = None;
                    return Some(Err(error));
                }
                Some(Err(error)) => Some(error),
                None => None,
            };
            if self.last.is_none() {
                // Nobody can resume in the midst of what is told first.
                self.stream = None;
                return broken.map(Err);
            }
            if let Err(error) = self.resume().await {
                self.stream = None;
                return Some(Err(error));
            }
        }
    }

    /// The stream's next, or that its host is there no more; `None` after the end.
    async fn heard(&mut self) -> Option<Option<Result<Told>>> {
        let stream = self.stream.as_mut()?;
        let hosts = self.client.hosts();
        let next = loop {
            if !hosts.several() {
                break stream.next().await;
            }
            match timeout(QUIET, stream.next()).await {
                Ok(next) => break next,
                Err(_) if hosts.is_there(&self.base).await => {}
                Err(_) => {
                    let message = format!("the watch broke off: {} does not answer any more", self.base);
                    break Some(Err(Error::unavailable(message)));
                }
            }
        };
        if let Some(last) = stream.last_id() {
            self.last = Some(last.to_owned());
        }
        if matches!(next, Some(Ok(_))) {
            hosts.heard(&self.base);
        }
        Some(next)
    }

    async fn resume(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            sleep(self.pause).await;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            match self.client.events(&self.path, self.last.as_deref()).await {
                Ok((base, stream)) => {
                    (self.base, self.stream) = (base, Some(stream));
                    self.resumed = true;
                    return Ok(());
                }
                Err(error) if error.retry && Instant::now() < deadline => {}
                Err(error) => return Err(error),
            }
        }
    }
}
