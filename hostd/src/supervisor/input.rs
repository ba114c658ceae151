//! Input on its way from clients to a program.
//!
//! A client may have a window of it under way, whatever the program does with its input, so that what follows is read: signals, and
//! that the client has left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use flynn_api::client::attach::Frame;
use flynn_api::host::attach;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// What a piece takes up at least: keys come one by one.
const LEAST: usize = 64;

/// A client hears of what was taken when it is this much: one that sends little hears nothing.
const NOTICE: u32 = 256 << 10;

/// The input of one client that has not been taken yet.
#[derive(Debug)]
pub(super) struct Window {
    room: Arc<Semaphore>,
    /// Bytes, since the client heard of it.
    taken: AtomicU32,
    changed: Notify,
}

impl Window {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            room: Arc::new(Semaphore::new(attach::WINDOW)),
            taken: AtomicU32::new(0),
            changed: Notify::new(),
        })
    }

    /// A piece of input, empty at its end. One of a client that sends more than is agreed waits.
    pub(super) async fn piece(self: &Arc<Self>, bytes: Vec<u8>) -> Piece {
        // Fits into 32 bits, as a window does.
        let size = u32::try_from(bytes.len().clamp(LEAST, attach::WINDOW)).unwrap_or(u32::MAX);
        Piece {
            bytes,
            // It is never closed.
            _room: Arc::clone(&self.room).acquire_many_owned(size).await.ok(),
            window: Arc::clone(self),
        }
    }

    /// What the client is to hear next of what was taken.
    pub(super) async fn taken(&self) -> Frame {
        while self.taken.load(Ordering::Relaxed) < NOTICE {
            self.changed.notified().await;
        }
        Frame::new(attach::TAKEN, self.taken.swap(0, Ordering::Relaxed).to_be_bytes())
    }
}

/// A piece of input; taken once it is dropped.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) bytes: Vec<u8>,
    _room: Option<OwnedSemaphorePermit>,
    window: Arc<Window>,
}

impl Drop for Piece {
    fn drop(&mut self) {
        let size = u32::try_from(self.bytes.len()).unwrap_or(0);
        self.window.taken.fetch_add(size, Ordering::Relaxed);
        // The one who waits looks how much it is by now.
        self.window.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test]
    async fn a_window_is_all_that_is_under_way() {
        let window = Window::new();
        let mut pieces = Vec::new();
        let quarter = attach::WINDOW / 4;
        for _ in 0..4 {
            pieces.push(window.piece(vec![0; quarter]).now_or_never().unwrap());
        }
        assert!(window.piece(vec![0]).now_or_never().is_none());
        assert!(window.taken().now_or_never().is_none());

        pieces.pop();
        let taken = u32::try_from(quarter).unwrap();
        assert_eq!(
            window.taken().now_or_never(),
            Some(Frame::new(attach::TAKEN, taken.to_be_bytes()))
        );
        assert!(window.taken().now_or_never().is_none(), "it is said once");
        pieces.push(window.piece(vec![0; quarter]).now_or_never().unwrap());
        drop(pieces);
        assert_eq!(
            window.taken().await,
            Frame::new(attach::TAKEN, (4 * taken).to_be_bytes())
        );
    }

    #[tokio::test]
    async fn many_small_pieces_are_not_many_more() {
        let window = Window::new();
        let piece = || tokio::task::unconstrained(window.piece(vec![0]));
        let pieces = std::iter::from_fn(|| piece().now_or_never());
        assert_eq!(pieces.collect::<Vec<_>>().len(), attach::WINDOW / LEAST);
    }
}
