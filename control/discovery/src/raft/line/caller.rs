//! The end of a line that calls.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use flynn_api::Error;
use futures::StreamExt as _;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::codec::{FramedRead, FramedWrite};

use super::frame::{Answer, Call};
use super::{WAITING, codec};

/// A line of which nothing was heard for so long, although something was asked, is of no use: the connection may have died
/// in silence, and TCP would look after it ever more rarely. Whoever wants to call opens another one.
const SILENCE: Duration = Duration::from_secs(1);

/// A line. It ends when it is dropped.
#[derive(Debug)]
pub struct Line {
    outgoing: mpsc::Sender<Bytes>,
    calls: Arc<Calls>,
    /// What reads and what writes, until this goes: the other end may be gone without a word, and would be waited for.
    _ends: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Calls(Mutex<UnderWay>);

#[derive(Debug, Default)]
struct UnderWay {
    next: u64,
    answers: HashMap<u64, oneshot::Sender<Result<Bytes, Error>>>,
    /// When the first call was made since something was heard last.
    asked: Option<Instant>,
    is_over: bool,
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, answer: Answer) {
        let mut under_way = self.lock();
        under_way.asked = None;
        // Whoever asked may have given up.
        if let Some(asker) = under_way.answers.remove(&answer.number) {
            let _ = asker.send(answer.said);
        }
    }

    fn end(&self) {
        let mut under_way = self.lock();
        under_way.is_over = true;
        under_way.answers.clear();
    }
}

/// A call that is under way, or given up.
struct Asked<'a> {
    calls: &'a Calls,
    number: u64,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.calls.lock().answers.remove(&self.number);
    }
}

fn lost() -> Error {
    Error::unavailable("the connection to the other discoverd broke off").or_done()
}

impl Line {
    /// A line over a connection that is there.
    pub fn over(connection: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (reading, writing) = tokio::io::split(connection);
        let (outgoing, waiting) = mpsc::channel::<Bytes>(WAITING);
        let calls = Arc::new(Calls::default());
        let mut ends = JoinSet::new();
        let heard = Arc::clone(&calls);
        ends.spawn(async move {
            let mut frames = FramedRead::new(reading, codec());
            while let Some(Ok(frame)) = frames.next().await {
                let Some(answer) = Answer::decode(frame.freeze()) else {
                    break;
                };
                heard.hear(answer);
                super::forget(frames.read_buffer_mut());
            }
            heard.end();
        });
        let sent = Arc::clone(&calls);
        ends.spawn(async move {
            let _ = super::send(waiting, FramedWrite::new(writing, codec())).await;
            sent.end();
        });
        Self {
            outgoing,
            calls,
            _ends: ends,
        }
    }

    /// Whether it is of no use any more. What is under way may be answered yet.
    pub fn is_over(&self) -> bool {
        let under_way = self.calls.lock();
        under_way.is_over || under_way.asked.is_some_and(|asked| asked.elapsed() > SILENCE)
    }

    /// Calls. Who waits no more may drop the future; the call may be done all the same.
    ///
    /// # Errors
    ///
    /// What the other end says, or that the connection broke off: the call may have been done then.
    pub async fn call(&self, name: &str, body: &impl Serialize) -> Result<Bytes, Error> {
        let (answer, answered) = oneshot::channel();
        let asked = {
            let mut under_way = self.calls.lock();
            if under_way.is_over {
                return Err(lost());
            }
            let number = under_way.next;
            under_way.next += 1;
            under_way.asked.get_or_insert_with(Instant::now);
            under_way.answers.insert(number, answer);
            Asked {
                calls: &self.calls,
                number,
            }
        };
        let frame = Call::encode(asked.number, name, body)
            .map_err(|why| Error::internal(format!("{name} cannot be written: {why}")))?;
        self.outgoing.send(frame).await.map_err(|_| lost())?;
        answered.await.unwrap_or_else(|_| Err(lost()))
    }
}
