//! A body on its way, watched.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http_body::{Body, Frame, SizeHint};

/// A body as it is, each piece and the end of which are noted by `note`; that lives as long as the body does.
pub(crate) struct Noted<B, N> {
    body: B,
    note: N,
}

impl<B, N: Fn()> Noted<B, N> {
    pub(crate) fn new(body: B, note: N) -> Self {
        Self { body, note }
    }
}

impl<B: Body + Unpin, N: Fn() + Unpin> Body for Noted<B, N> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        (self.note)();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
