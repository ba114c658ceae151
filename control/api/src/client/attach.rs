//! The frames of an attached connection ([`crate::host::attach`]) over any byte stream.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::host::attach::MAX;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// One of the constants in [`crate::host::attach`].
    pub kind: u8,
    /// Its payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame.
    pub fn new(kind: u8, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            kind,
            payload: payload.into(),
        }
    }
}

/// Reads the next frame; `None` at a clean end. Not safe to cancel half way.
pub async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let mut head = [0; 5];
    if stream.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut head[1..]).await?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes is too long"),
        ));
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await?;
    Ok(Some(Frame {
        kind: head[0],
        payload,
    }))
}

/// Writes a frame, cut into several when its payload is too long, and flushes.
pub async fn write_frame(stream: &mut (impl AsyncWrite + Unpin), kind: u8, payload: &[u8]) -> io::Result<()> {
    let mut rest = payload;
    loop {
        let (piece, after) = rest.split_at(rest.len().min(MAX));
        let mut head = [kind, 0, 0, 0, 0];
        // MAX fits into 32 bits.
        head[1..].copy_from_slice(&u32::try_from(piece.len()).unwrap_or(0).to_be_bytes());
        stream.write_all(&head).await?;
        stream.write_all(piece).await?;
        rest = after;
        if rest.is_empty() {
            return stream.flush().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_survive_and_ends_are_told_apart() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, 1, b"hello").await.unwrap();
        write_frame(&mut bytes, 3, b"").await.unwrap();
        let mut read = bytes.as_slice();
        assert_eq!(
            read_frame(&mut read).await.unwrap(),
            Some(Frame::new(1, b"hello".to_vec()))
        );
        assert_eq!(
            read_frame(&mut read).await.unwrap(),
            Some(Frame::new(3, b"".to_vec()))
        );
        assert_eq!(read_frame(&mut read).await.unwrap(), None);
        assert!(
            read_frame(&mut &bytes[..7]).await.is_err(),
            "a frame that breaks off is an error"
        );
        assert!(
            read_frame(&mut [1u8, 255, 255, 255, 255].as_slice())
                .await
                .is_err(),
            "too long"
        );
    }
}
