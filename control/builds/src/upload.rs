//! Takes an upload: uncompresses it into a temporary file and computes its digest on the way.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Write as _};
use std::path::Path;

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::limits::MAX_LAYER;

/// The largest window of a zstd stream, as a power of two: 128 MiB.
const ZSTD_WINDOW: u32 = 27;

/// Why an upload was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    #[error("the upload broke off before its end; send it again")]
    BrokeOff,
    #[error("the layer cannot be uncompressed: {0}")]
    Compression(io::Error),
    #[error("the uncompressed layer is larger than {} GiB", MAX_LAYER >> 30)]
    TooLarge,
    #[error("the disk for layers under way is full")]
    Full,
    #[error("cannot keep the layer: {0}")]
    Io(io::Error),
}

/// An uncompressed layer.
#[derive(Debug)]
pub(crate) struct Upload {
    pub(crate) file: File,
    pub(crate) length: u64,
    /// `sha256:…`.
    pub(crate) id: String,
}

/// What comes in. Without `End` it was broken off.
pub(crate) enum Piece {
    Data(Bytes),
    End,
}

/// Takes an upload to its end. Blocks.
pub(crate) fn receive(pieces: mpsc::Receiver<Piece>, scratch: &Path) -> Result<Upload, UploadError> {
    let mut input = PieceReader {
        pieces,
        piece: Bytes::new(),
        ended: false,
    };
    let mut magic = Vec::new();
    input
        .by_ref()
        .take(4)
        .read_to_end(&mut magic)
        .map_err(read_error)?;
    let input = BufReader::with_capacity(128 << 10, Cursor::new(magic.clone()).chain(input));
    match magic.as_slice() {
        [0x1f, 0x8b, ..] => keep(MultiGzDecoder::new(input), scratch),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::Decoder::with_buffer(input).map_err(UploadError::Compression)?;
            decoder
                .window_log_max(ZSTD_WINDOW)
                .map_err(UploadError::Compression)?;
            keep(decoder, scratch)
        }
        _ => keep(input, scratch),
    }
}

fn keep(mut input: impl Read, scratch: &Path) -> Result<Upload, UploadError> {
    let mut file = tempfile::tempfile_in(scratch).map_err(write_error)?;
    let (mut hasher, mut length) = (Sha256::new(), 0);
    let mut buffer = vec![0; 128 << 10];
    loop {
        let read = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(why) if why.kind() == io::ErrorKind::Interrupted => continue,
            Err(why) => return Err(read_error(why)),
        };
        length += read as u64;
        if length > MAX_LAYER {
            return Err(UploadError::TooLarge);
        }
        hasher.update(&buffer[..read]);
        file.write_all(&buffer[..read]).map_err(write_error)?;
    }
    let mut id = "sha256:".to_owned();
    for byte in hasher.finalize() {
        // Writing to a string cannot fail.
        let _ = write!(id, "{byte:02x}");
    }
    Ok(Upload { file, length, id })
}

fn read_error(why: io::Error) -> UploadError {
    match why.kind() {
        io::ErrorKind::ConnectionAborted => UploadError::BrokeOff,
        _ => UploadError::Compression(why),
    }
}

fn write_error(why: io::Error) -> UploadError {
    match why.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => UploadError::Full,
        _ => UploadError::Io(why),
    }
}

struct PieceReader {
    pieces: mpsc::Receiver<Piece>,
    piece: Bytes,
    ended: bool,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.pieces.blocking_recv() {
                Some(Piece::Data(bytes)) => self.piece = bytes,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let count = buffer.len().min(self.piece.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn send(bytes: &[u8], pieces: usize, end: bool) -> Result<Upload, UploadError> {
        let (sender, receiver) = mpsc::channel(bytes.len() + 1);
        for piece in bytes.chunks(pieces.max(1)) {
            assert!(
                sender
                    .try_send(Piece::Data(Bytes::copy_from_slice(piece)))
                    .is_ok()
            );
        }
        if end {
            assert!(sender.try_send(Piece::End).is_ok());
        }
        drop(sender);
        receive(receiver, &std::env::temp_dir())
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn all_compressions_give_the_same() {
        let content = b"some content of a layer".repeat(1000);
        let plain = send(&content, 7, true).unwrap();
        let gzip = send(&gzip(&content), 7, true).unwrap();
        let zstd = send(&zstd::encode_all(content.as_slice(), 0).unwrap(), 7, true).unwrap();
        assert_eq!(plain.length, content.len() as u64);
        assert!(plain.id == gzip.id && plain.id == zstd.id);
        let abc = send(b"abc", 1, true).unwrap();
        assert_eq!(
            abc.id,
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(send(b"", 1, true).unwrap().length, 0);
    }

    #[test]
    fn an_upload_without_its_end_is_refused() {
        assert!(matches!(send(b"abcdefgh", 3, false), Err(UploadError::BrokeOff)));
        assert!(matches!(send(b"a", 3, false), Err(UploadError::BrokeOff)));
        assert!(matches!(
            send(&gzip(b"abc")[..9], 3, false),
            Err(UploadError::BrokeOff)
        ));
    }

    proptest! {
        #[test]
        fn a_compressed_layer_cut_short_is_refused(cut in 4usize..60) {
            let whole = gzip(&(0..=255u8).collect::<Vec<_>>());
            let cut = cut.min(whole.len() - 1);
            prop_assert!(matches!(send(&whole[..cut], 5, true), Err(UploadError::Compression(_))));
        }
    }
}
