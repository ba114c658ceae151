//! Streams as `btrfs send` writes them, and as only somebody would who means harm.

use std::path::Path;

use flynn_hostd::volumes::{Encoder, Header};

/// Commands of a stream.
const SUBVOLUME: u16 = 1;
const MAKE_FILE: u16 = 3;
const MAKE_NODE: u16 = 5;
const LINK: u16 = 8;
const WRITE: u16 = 15;
const END: u16 = 21;

/// And their arguments.
const UUID: u16 = 1;
const TRANSACTION: u16 = 2;
const NUMBER: u16 = 3;
const MODE: u16 = 5;
const DEVICE: u16 = 8;
const PATH: u16 = 15;
const LINKED: u16 = 17;
const OFFSET: u16 = 18;
const DATA: u16 = 19;

/// A stream that makes the subvolume `data`.
pub(super) struct Stream(Vec<u8>);

impl Stream {
    pub(super) fn new() -> Self {
        let mut stream = Self(b"btrfs-stream\0\x01\0\0\0".to_vec());
        let transaction = 1_u64.to_le_bytes();
        stream.command(
            SUBVOLUME,
            &[(PATH, b"data"), (UUID, &[7; 16]), (TRANSACTION, &transaction)],
        );
        stream
    }

    /// Writes a file, which it makes first.
    pub(super) fn file(mut self, path: &str) -> Self {
        self.command(MAKE_FILE, &[(PATH, path.as_bytes()), (NUMBER, &[0; 8])]);
        self.write(path)
    }

    pub(super) fn write(mut self, path: &str) -> Self {
        let offset = 0_u64.to_le_bytes();
        self.command(
            WRITE,
            &[(PATH, path.as_bytes()), (OFFSET, &offset), (DATA, b"written")],
        );
        self
    }

    pub(super) fn link(mut self, path: &str, to: &Path) -> Self {
        let to = to.to_str().unwrap().as_bytes();
        self.command(LINK, &[(PATH, path.as_bytes()), (NUMBER, &[0; 8]), (LINKED, to)]);
        self
    }

    /// A character device.
    pub(super) fn device(mut self, path: &str, major: u32, minor: u32) -> Self {
        let mode = u64::from(libc::S_IFCHR | 0o666).to_le_bytes();
        let device = u64::from((major << 8) | minor).to_le_bytes();
        self.command(
            MAKE_NODE,
            &[
                (PATH, path.as_bytes()),
                (NUMBER, &[0; 8]),
                (MODE, &mode),
                (DEVICE, &device),
            ],
        );
        self
    }

    fn command(&mut self, command: u16, arguments: &[(u16, &[u8])]) {
        let mut body = Vec::new();
        for (kind, value) in arguments {
            body.extend(kind.to_le_bytes());
            body.extend(u16::try_from(value.len()).unwrap().to_le_bytes());
            body.extend(*value);
        }
        let mut bytes = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend(command.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        let sum = checksum(&bytes).to_le_bytes();
        bytes[6..10].copy_from_slice(&sum);
        self.0.extend(bytes);
    }

    /// All of it, as `flynn-host volume send` would send it as the snapshot `id`.
    pub(super) fn sent_as(mut self, id: &str) -> Vec<u8> {
        self.command(END, &[]);
        let record = serde_json::json!({
            "version": 2, "created_at": "2026-01-02T03:04:05Z", "form": "subvolume", "type": "snapshot",
        });
        let header: Header =
            serde_json::from_value(serde_json::json!({ "id": id, "record": record })).unwrap();
        let mut encoder = Encoder::default();
        let mut sent = encoder.begin(&header).unwrap().to_vec();
        sent.extend(encoder.piece(&self.0));
        sent.extend(encoder.end());
        sent
    }
}

/// CRC-32C without its usual inversions.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(sum & 1))
        })
    })
}
