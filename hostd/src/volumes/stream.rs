//! A snapshot on its way to another host: what it is, its bytes in pieces, and a digest of all. Pure.
//!
//! ```text
//! FLYNNVOL 1        9 bytes: what this is, and in which form
//! length header     JSON of the header, its length before it (32 bits, big-endian)
//! length piece …    the bytes as btrfs has them
//! 0 digest          SHA-512/256 of header and pieces
//! ```
//!
//! What is cut short has no digest, and is no snapshot.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flynn_api::digest::Digester;
use flynn_api::{Digest, Error, Result};
use serde::{Deserialize, Serialize};

use super::record::Record;

const MAGIC: &[u8; 9] = b"FLYNNVOL\x01";

/// The longest header.
const MAX_HEADER: usize = 64 << 10;

/// The longest piece.
pub const MAX_PIECE: usize = 256 << 10;

const DIGEST: usize = 32;

/// What is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The snapshot's id.
    pub id: String,
    /// What is known of it.
    pub(super) record: Record,
    /// The snapshot that the receiver must have, where only what differs from it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

/// Writes the form.
#[derive(Default)]
pub struct Encoder {
    digester: Digester,
}

impl Encoder {
    /// What comes first.
    pub fn begin(&mut self, header: &Header) -> serde_json::Result<Bytes> {
        let header = serde_json::to_vec(header)?;
        let mut bytes = BytesMut::from(&MAGIC[..]);
        bytes.put(self.frame(&header));
        Ok(bytes.freeze())
    }

    /// A piece of 1 to [`MAX_PIECE`] bytes.
    pub fn piece(&mut self, piece: &[u8]) -> Bytes {
        self.frame(piece)
    }

    /// What comes last.
    pub fn end(self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(4 + DIGEST);
        bytes.put_u32(0);
        bytes.put_slice(self.digester.finish().as_bytes());
        bytes.freeze()
    }

    fn frame(&mut self, content: &[u8]) -> Bytes {
        self.digester.update(content);
        let mut bytes = BytesMut::with_capacity(4 + content.len());
        bytes.put_u32(u32::try_from(content.len()).unwrap_or(u32::MAX));
        bytes.put_slice(content);
        bytes.freeze()
    }
}

/// What has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// What it is.
    Header(Box<Header>),
    /// Bytes of it.
    Piece(Bytes),
    /// All of it, undamaged.
    End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Magic,
    Header,
    Piece,
    Digest,
    Nothing,
}

/// Reads the form, in whatever portions it comes.
pub struct Decoder {
    buffer: BytesMut,
    next: Next,
    digester: Digester,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            buffer: BytesMut::new(),
            next: Next::Magic,
            digester: Digester::default(),
        }
    }
}

impl Decoder {
    /// Takes what has come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next part, once all of it has come.
    pub fn part(&mut self) -> Result<Option<Part>> {
        if self.next == Next::Magic {
            let known = self.buffer.len().min(MAGIC.len());
            if self.buffer[..known] != MAGIC[..known] {
                return Err(Error::validation(
                    "this is no snapshot as flynn-host volume send writes it, or one of a later release",
                ));
            }
            if known < MAGIC.len() {
                return Ok(None);
            }
            self.buffer.advance(MAGIC.len());
            self.next = Next::Header;
        }
        match self.next {
            Next::Header => {
                let Some(header) = self.frame(MAX_HEADER)? else {
                    return Ok(None);
                };
                let header = serde_json::from_slice(&header)
                    .map_err(|error| damaged(&format!("its header cannot be read: {error}")))?;
                self.next = Next::Piece;
                Ok(Some(Part::Header(Box::new(header))))
            }
            Next::Piece => match self.frame(MAX_PIECE)? {
                Some(piece) if piece.is_empty() => {
                    self.next = Next::Digest;
                    self.part()
                }
                piece => Ok(piece.map(Part::Piece)),
            },
            Next::Digest => {
                if self.buffer.len() < DIGEST {
                    return Ok(None);
                }
                let sent = self.buffer.split_to(DIGEST);
                let digester = std::mem::take(&mut self.digester);
                if Digest::as_bytes(&digester.finish())[..] != sent[..] {
                    return Err(damaged("its digest is another one"));
                }
                self.next = Next::Nothing;
                Ok(Some(Part::End))
            }
            _ if self.buffer.is_empty() => Ok(None),
            _ => Err(damaged("there is more after its end")),
        }
    }

    /// Refuses what has ended in the middle.
    pub fn finish(&self) -> Result<()> {
        if self.next == Next::Nothing {
            return Ok(());
        }
        Err(damaged("it was cut short"))
    }

    fn frame(&mut self, longest: usize) -> Result<Option<Bytes>> {
        let Some(length) = self.buffer.first_chunk() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > longest {
            return Err(damaged("a part of it is longer than any can be"));
        }
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        self.buffer.advance(4);
        let content = self.buffer.split_to(length).freeze();
        self.digester.update(&content);
        Ok(Some(content))
    }
}

fn damaged(why: &str) -> Error {
    Error::validation(format!(
        "the snapshot was damaged on its way ({why}): send it again"
    ))
}

#[cfg(test)]
mod tests {
    use flynn_api::Meta;
    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::super::record::Form;
    use super::*;

    fn header(id: &str) -> Header {
        let record = Record::new(Timestamp::UNIX_EPOCH, Form::Subvolume, Some(7), Meta::new());
        Header {
            id: id.into(),
            record,
            from: None,
        }
    }

    fn encode(id: &str, pieces: &[Vec<u8>]) -> Vec<u8> {
        let mut encoder = Encoder::default();
        let mut bytes = encoder.begin(&header(id)).unwrap().to_vec();
        for piece in pieces {
            bytes.extend(encoder.piece(piece));
        }
        bytes.extend(encoder.end());
        bytes
    }

    /// All parts of bytes that come in such portions.
    fn decode(bytes: &[u8], portion: usize) -> Result<Vec<Part>> {
        let mut decoder = Decoder::default();
        let mut parts = Vec::new();
        for portion in bytes.chunks(portion) {
            decoder.push(portion);
            while let Some(part) = decoder.part()? {
                parts.push(part);
            }
        }
        decoder.finish()?;
        Ok(parts)
    }

    fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..8)
    }

    proptest! {
        #[test]
        fn what_is_sent_arrives(id in "[a-z]{1,9}", pieces in pieces(), portion in 1_usize..80) {
            let parts = decode(&encode(&id, &pieces), portion).unwrap();
            let mut wanted = vec![Part::Header(Box::new(header(&id)))];
            wanted.extend(pieces.into_iter().map(|piece| Part::Piece(piece.into())));
            wanted.push(Part::End);
            prop_assert_eq!(parts, wanted);
        }

        #[test]
        fn damage_is_noticed(
            pieces in pieces(), at in any::<prop::sample::Index>(), bit in 0_u8..8, how in 0..3, portion in 1_usize..80
        ) {
            let mut bytes = encode("one", &pieces);
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] ^= 1 << bit,
                1 => bytes.truncate(at),
                _ => bytes.push(bit),
            }
            prop_assert!(decode(&bytes, portion).is_err());
        }

        #[test]
        fn noise_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), known in any::<bool>()) {
            let bytes = if known { [MAGIC.to_vec(), bytes].concat() } else { bytes };
            prop_assert!(decode(&bytes, 64).is_err());
        }
    }
}
