//! Lines: one connection to another member that carries many calls at once.
//!
//! A leader of a hundred members makes a thousand calls a second that say next to nothing. Over HTTP, most of what such a
//! call costs is HTTP; and a call that is given up takes its connection with it, so that a member that is a little slow is
//! shaken hands with over and over. A line begins as a request, `POST /raft/{id}/calls`, by which the other side knows who
//! speaks and for whom, and goes on with frames ([`frame`]) both ways: calls are numbered, and answered in any order.
//!
//! - [`caller`]: the end that calls; [`answerer`]: the end that is called

pub mod answerer;
pub mod caller;
pub mod frame;

use std::io;

use bytes::{Bytes, BytesMut};
use futures::SinkExt;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio_util::codec::{FramedWrite, LengthDelimitedCodec};

/// The call over HTTP by which a line begins: `/raft/{id}/calls`.
pub const NAME: &str = "calls";

/// The name of the protocol, as an upgrade has it.
pub const PROTOCOL: &str = "flynn-calls";

/// The longest frame.
pub const MAX_FRAME: usize = 1 << 30;

/// Frames that wait to be sent.
const WAITING: usize = 1024;

/// Each frame goes after its length, four bytes in network order.
fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME)
        .new_codec()
}

/// A buffer that is larger is not kept for the next frame: a leader has a hundred lines.
const KEPT: usize = 16 << 10;

/// Gives a buffer's memory back once it is empty, if a long frame has made it large.
fn forget(buffer: &mut BytesMut) {
    if buffer.is_empty() && buffer.capacity() > KEPT {
        *buffer = BytesMut::new();
    }
}

/// Sends what waits, and what comes, until nobody is left who could send more. Frames that wait together go together.
async fn send(
    mut waiting: mpsc::Receiver<Bytes>,
    mut frames: FramedWrite<impl AsyncWrite + Unpin, LengthDelimitedCodec>,
) -> io::Result<()> {
    while let Some(frame) = waiting.recv().await {
        frames.feed(frame).await?;
        while let Ok(frame) = waiting.try_recv() {
            frames.feed(frame).await?;
        }
        SinkExt::<Bytes>::flush(&mut frames).await?;
        forget(frames.write_buffer_mut());
    }
    SinkExt::<Bytes>::close(&mut frames).await
}

#[cfg(test)]
mod tests;
