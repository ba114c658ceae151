//! The end of a line that is called.

use std::sync::Arc;

use bytes::Bytes;
use flynn_api::Error;
use flynn_api::server::CancellationToken;
use futures::StreamExt as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::codec::{FramedRead, FramedWrite};

use super::frame::{Answer, Call};
use super::{WAITING, codec};

/// Calls of one line that are answered at a time. With more, it is read no further.
const AT_ONCE: usize = 1024;

/// Has `handle` answer all that is called by its name and body, until the other end is gone or `closing`.
pub async fn answer<F>(
    connection: impl AsyncRead + AsyncWrite + Send + 'static,
    closing: CancellationToken,
    handle: impl Fn(String, Bytes) -> F,
) where
    F: Future<Output = Result<Vec<u8>, Error>> + Send + 'static,
{
    let (reading, writing) = tokio::io::split(connection);
    let (answers, waiting) = mpsc::channel::<Bytes>(WAITING);
    let written = tokio::spawn({
        let closing = closing.clone();
        async move {
            let sending = super::send(waiting, FramedWrite::new(writing, codec()));
            closing.run_until_cancelled(sending).await
        }
    });
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let mut frames = FramedRead::new(reading, codec());
    let read = async {
        while let Ok(slot) = Arc::clone(&slots).acquire_owned().await
            && let Some(Ok(frame)) = frames.next().await
            && let Some(Call { number, name, body }) = Call::decode(frame.freeze())
        {
            super::forget(frames.read_buffer_mut());
            let (said, answers) = (handle(name, body), answers.clone());
            tokio::spawn(async move {
                let answer = Answer::encode(number, said.await);
                let _ = answers.send(answer).await;
                drop(slot);
            });
        }
    };
    closing.run_until_cancelled(read).await;
    drop(answers);
    // What is still being answered is sent.
    let _ = written.await;
}
