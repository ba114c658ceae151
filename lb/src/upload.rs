//! A request's body on its way, and how long its answer is waited for.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// When something of a request's body has last moved on. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Progress(Arc<Mutex<Instant>>);

impl Progress {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    /// Something has moved on.
    pub(crate) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What comes of `answer`, unless it takes longer than `limit` after the last piece of the body: an upload may
    /// take as long as it likes while it moves on.
    pub(crate) async fn within<T>(&self, limit: Duration, answer: impl Future<Output = T>) -> Option<T> {
        self.note();
        let mut answer = pin!(answer);
        loop {
            let due = self.last() + limit;
            if let Ok(answer) = tokio::time::timeout_at(due, &mut answer).await {
                return Some(answer);
            }
            if self.last() + limit <= Instant::now() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::Noted;
    use bytes::Bytes;
    use futures::StreamExt as _;
    use http_body::Frame;
    use http_body_util::{BodyExt as _, StreamBody};
    use std::convert::Infallible;

    const LIMIT: Duration = Duration::from_mins(10);

    /// An upload of some pieces with a pause before each, which is answered at its end.
    async fn answered(pieces: usize, pause: Duration) -> bool {
        let progress = Progress::new();
        let pieces = futures::stream::iter(0..pieces).then(async |_| {
            tokio::time::sleep(pause).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"piece")))
        });
        let noted = progress.clone();
        let upload = Noted::new(Box::pin(StreamBody::new(pieces)), move || noted.note());
        progress.within(LIMIT, upload.collect()).await.is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_may_take_long_while_it_moves_on() {
        assert!(answered(10, LIMIT / 2).await);
        assert!(!answered(1, LIMIT * 2).await);
    }
}
