//! The queries that nearly all clients send, read and answered without building messages: one question, at most EDNS
//! beside it. What is not so plain is left to [`super::zone`].

/// Bytes of a message's header.
const HEADER: usize = 12;
/// The longest name.
const MAX_NAME: usize = 255;
/// What an OPT record takes without options.
const OPT: usize = 11;
const TYPE_OPT: u16 = 41;
const CLASS_IN: u16 = 1;

/// A plain query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query<'q> {
    bytes: &'q [u8],
    /// Where the question ends.
    end: usize,
    /// The type that is asked for.
    pub kind: u16,
    /// Whether it came with EDNS.
    edns: bool,
}

/// The name of a query in small letters, as it is on the wire, and the type: what answers are kept under.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    bytes: [u8; MAX_NAME + 2],
    length: usize,
}

impl Key {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl<'q> Query<'q> {
    /// Reads a query of class IN, if it is a plain one.
    pub fn read(bytes: &'q [u8]) -> Option<Self> {
        let header = bytes.first_chunk::<HEADER>()?;
        // A query of opcode 0, not truncated, and no bits that are not for queries.
        if header[2] & 0b1111_1110 != 0 || header[3] & 0b1100_1111 != 0 || header[4..10] != [0, 1, 0, 0, 0, 0]
        {
            return None;
        }
        let mut at = HEADER;
        loop {
            let length = usize::from(*bytes.get(at)?);
            if length > 63 {
                return None;
            }
            at += 1 + length;
            if length == 0 {
                break;
            }
        }
        if at - HEADER > MAX_NAME {
            return None;
        }
        let kind = u16_at(bytes, at)?;
        if u16_at(bytes, at + 2)? != CLASS_IN {
            return None;
        }
        let end = at + 4;
        let edns = match header[10..] {
            [0, 0] => {
                if bytes.len() != end {
                    return None;
                }
                false
            }
            [0, 1] => {
                // The root's name, the type, the client's size, extended code and version 0, flags, and the options,
                // none of which is ours to act upon.
                let opt = bytes.get(end..)?;
                let options = usize::from(u16_at(opt, 9)?);
                if opt[0] != 0
                    || u16_at(opt, 1)? != TYPE_OPT
                    || opt[5..7] != [0, 0]
                    || opt.len() != OPT + options
                {
                    return None;
                }
                true
            }
            _ => return None,
        };
        Some(Self {
            bytes,
            end,
            kind,
            edns,
        })
    }

    /// Whether the name is under `discoverd`.
    pub fn may_be_ours(&self) -> bool {
        const ZONE: &[u8] = b"\x09discoverd\0";
        let name = self.name();
        name.len() >= ZONE.len() && name[name.len() - ZONE.len()..].eq_ignore_ascii_case(ZONE)
    }

    /// The name, on the wire.
    pub fn name(&self) -> &'q [u8] {
        &self.bytes[HEADER..self.end - 4]
    }

    /// What answers to it are kept under.
    pub fn key(&self) -> Key {
        let name = self.name();
        let mut key = Key {
            bytes: [0; MAX_NAME + 2],
            length: name.len() + 2,
        };
        key.bytes[..name.len()].copy_from_slice(name);
        // The lengths of labels are below the letters.
        key.bytes[..name.len()].make_ascii_lowercase();
        key.bytes[name.len()..name.len() + 2].copy_from_slice(&self.kind.to_be_bytes());
        key
    }

    /// Writes the answer: these records, each without its name, which is that of the question, and these whole records
    /// as authority.
    pub fn answer<'r>(
        &self,
        into: &mut Vec<u8>,
        code: u8,
        records: impl ExactSizeIterator<Item = &'r [u8]>,
        authority: Option<&[u8]>,
        payload: u16,
    ) {
        into.clear();
        into.extend_from_slice(&self.bytes[..self.end]);
        // A response, authoritative; recursion is desired if it was, and available.
        into[2] = 0b1000_0100 | (self.bytes[2] & 1);
        into[3] = 0b1000_0000 | code;
        let count = |length: usize| u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
        into[6..8].copy_from_slice(&count(records.len()));
        into[8..10].copy_from_slice(&count(authority.iter().len()));
        into[10..12].copy_from_slice(&count(usize::from(self.edns)));
        for record in records {
            // A pointer to the question's name.
            into.extend_from_slice(&[0xc0, 12]);
            into.extend_from_slice(record);
        }
        into.extend_from_slice(authority.unwrap_or_default());
        if self.edns {
            into.push(0);
            into.extend_from_slice(&TYPE_OPT.to_be_bytes());
            into.extend_from_slice(&payload.to_be_bytes());
            into.extend_from_slice(&[0; 6]);
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
