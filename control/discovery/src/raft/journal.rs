//! The journal: one append-only file that holds the Raft log and the vote.
//!
//! The file is a header and then frames; a frame is one batch of records under one checksum, written at once:
//!
//! ```text
//! header:  "flynnlog"  version u32
//! frame:   "FRAM"  length u32  crc32 u32  synced u64  payload[length]
//! payload: (kind u8  length u32  JSON[length])*
//! ```
//!
//! Numbers are little-endian. `synced` is the length of the file that was known to be on disk when the frame was
//! written. A torn end of the file (a power cut: nobody was told that it was written) is cut off, and the log says so;
//! damage to what may have been acknowledged stops the start with an error that names the place. They are told apart by
//! what is there: a frame that cannot be read is damage when a later one says that it had been synced; the last one is torn
//! only when the file ends before it does, or when a sector of it was never written and holds zeros.
//!
//! A full disk is waited out: the frame that did not fit is taken back and tried again until there is room; meanwhile
//! [`Journal::disk_is_full`] says so. Any other failure to write or sync is final, because the page cache can no longer be
//! trusted: the process ends and starts again from the file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Entry, LogId, Vote};
use crate::metrics::Times;

const MAGIC: &[u8; 8] = b"flynnlog";
const VERSION: u32 = 1;
const HEADER: usize = 12;
const FRAME: &[u8; 4] = b"FRAM";
const FRAME_HEADER: usize = 20;
/// The longest frame that is written or read.
const MAX_FRAME: usize = 1 << 30;
/// Bytes that are gathered into one frame.
const BATCH_BYTES: usize = 4 << 20;
/// Between attempts while the disk is full.
const FULL_RETRY: Duration = Duration::from_millis(200);

/// One change of log or vote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// The vote was cast.
    Vote(Vote),
    /// An entry was appended.
    Entry(Entry),
    /// Entries after this one were taken back.
    TruncateAfter(Option<LogId>),
    /// Entries up to this one were dropped: a snapshot holds them.
    Purge(LogId),
    /// Entries up to this one are committed.
    Committed(Option<LogId>),
}

/// Records, encoded, ready to be written.
#[derive(Default)]
pub struct Encoded(Vec<u8>);

impl Encoded {
    /// Adds a record.
    pub fn push(&mut self, record: &Record) -> io::Result<()> {
        let (kind, json) = match record {
            Record::Vote(vote) => (1, serde_json::to_vec(vote)),
            Record::Entry(entry) => (2, serde_json::to_vec(entry)),
            Record::TruncateAfter(id) => (3, serde_json::to_vec(id)),
            Record::Purge(id) => (4, serde_json::to_vec(id)),
            Record::Committed(id) => (5, serde_json::to_vec(id)),
        };
        let json = json?;
        let length = u32::try_from(json.len()).map_err(io::Error::other)?;
        self.0.push(kind);
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(&json);
        Ok(())
    }

    /// The frame of these records, in a file of which `synced` bytes are known to be on disk.
    pub fn frame(&self, synced: u64) -> io::Result<Vec<u8>> {
        frame(&self.0, synced)
    }

    /// Adds what `others` holds.
    pub fn extend(&mut self, others: &Self) {
        self.0.extend_from_slice(&others.0);
    }

    fn decode(mut payload: &[u8], mut each: impl FnMut(Record)) -> Result<(), String> {
        while let Some((kind, rest)) = payload.split_first() {
            let (length, rest) = rest.split_first_chunk::<4>().ok_or("a record is cut short")?;
            let length = u32::from_le_bytes(*length) as usize;
            let json = rest.get(..length).ok_or("a record is cut short")?;
            payload = &rest[length..];
            let record = match kind {
                1 => serde_json::from_slice(json).map(Record::Vote),
                2 => serde_json::from_slice(json).map(Record::Entry),
                3 => serde_json::from_slice(json).map(Record::TruncateAfter),
                4 => serde_json::from_slice(json).map(Record::Purge),
                5 => serde_json::from_slice(json).map(Record::Committed),
                kind => return Err(format!("kind {kind} is not known: a newer release wrote it")),
            };
            each(record.map_err(|why| format!("a record cannot be read: {why}"))?);
        }
        Ok(())
    }
}

/// Told when what was written is on disk, or why not.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

enum Order {
    /// Append these records. Synced if somebody wants to be told.
    Append(Encoded, Option<Done>),
    /// Replace the file by one that holds only these records. If that fails the old one stays.
    Rewrite(Encoded),
}

/// The open journal. Dropped, it stops once everything ordered is written.
pub struct Journal {
    orders: Option<mpsc::Sender<Order>>,
    writer: Option<std::thread::JoinHandle<()>>,
    full: Arc<AtomicBool>,
    length: Arc<AtomicU64>,
    syncs: Arc<Times>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens the journal at `path`, making it if need be, and gives each record that it holds to `each`.
    pub fn open(path: &Path, each: impl FnMut(Record)) -> io::Result<Self> {
        let (file, length) = recover(path, each)?;
        let full = Arc::new(AtomicBool::new(false));
        let syncs = Arc::<Times>::default();
        let shared_length = Arc::new(AtomicU64::new(length));
        let mut writer = Writer {
            path: path.to_owned(),
            file,
            length,
            synced: length,
            full: Arc::clone(&full),
            shared_length: Arc::clone(&shared_length),
            syncs: Arc::clone(&syncs),
        };
        let (orders, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .stack_size(256 << 10)
            .spawn(move || writer.run(&receiver))?;
        Ok(Self {
            orders: Some(orders),
            writer: Some(thread),
            full,
            length: shared_length,
            syncs,
        })
    }

    /// Appends records. With `done` they are synced before it is called; without, they are only written.
    pub fn append(&self, records: Encoded, done: Option<Done>) -> io::Result<()> {
        self.order(Order::Append(records, done))
    }

    /// Replaces the file by one that holds only `records`, which must amount to the same.
    pub fn rewrite(&self, records: Encoded) -> io::Result<()> {
        self.order(Order::Rewrite(records))
    }

    fn order(&self, order: Order) -> io::Result<()> {
        let orders = self.orders.as_ref().ok_or_else(stopped)?;
        orders.send(order).map_err(|_| stopped())
    }

    /// Whether a write waits for room on the disk.
    pub fn disk_is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// How long a batch takes to be written and synced.
    pub fn syncs(&self) -> &Times {
        &self.syncs
    }

    /// Bytes in the file.
    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.orders = None;
        // A writer that waits for room would wait for ever; nothing that it holds was acknowledged.
        if !self.full.load(Ordering::Relaxed)
            && let Some(writer) = self.writer.take()
        {
            let _ = writer.join();
        }
    }
}

fn stopped() -> io::Error {
    io::Error::other("the journal has stopped after a failure to write")
}

struct Writer {
    path: PathBuf,
    file: File,
    length: u64,
    synced: u64,
    full: Arc<AtomicBool>,
    shared_length: Arc<AtomicU64>,
    syncs: Arc<Times>,
}

impl Writer {
    fn run(&mut self, orders: &mpsc::Receiver<Order>) {
        let mut next = None;
        while let Some(order) = next.take().or_else(|| orders.recv().ok()) {
            let (payload, done) = match order {
                Order::Rewrite(records) => {
                    if let Err(error) = self.rewrite(&records.0) {
                        tracing::error!(path = %self.path.display(), %error, "the journal cannot be replaced");
                        return;
                    }
                    continue;
                }
                Order::Append(records, done) => (records.0, done),
            };
            // Whatever came while the last batch was being synced goes out as one: that is the group commit.
            let mut payload = payload;
            let mut waiting: Vec<_> = done.into_iter().collect();
            while payload.len() < BATCH_BYTES {
                match orders.try_recv() {
                    Ok(Order::Append(records, done)) => {
                        payload.extend_from_slice(&records.0);
                        waiting.extend(done);
                    }
                    Ok(order) => {
                        next = Some(order);
                        break;
                    }
                    Err(_) => break,
                }
            }
            let result = self.write(&payload, !waiting.is_empty());
            let failed = result.is_err();
            for done in waiting {
                done(
                    result
                        .as_ref()
                        .copied()
                        .map_err(|why| io::Error::new(why.kind(), why.to_string())),
                );
            }
            if failed {
                return;
            }
        }
    }

    fn write(&mut self, payload: &[u8], sync: bool) -> io::Result<()> {
        let frame = frame(payload, self.synced)?;
        loop {
            let result = self.try_write(&frame, sync);
            match result {
                Ok(()) => {
                    self.full.store(false, Ordering::Relaxed);
                    return Ok(());
                }
                Err(error) if is_full(&error) => {
                    // Shortening needs no room. What was synced before stays.
                    self.file.set_len(self.length)?;
                    if !self.full.swap(true, Ordering::Relaxed) {
                        tracing::error!(path = %self.path.display(), "the disk is full: writes wait until there is room");
                    }
                    std::thread::sleep(FULL_RETRY);
                }
                Err(error) => {
                    tracing::error!(path = %self.path.display(), %error, "the journal cannot be written");
                    return Err(error);
                }
            }
        }
    }

    fn try_write(&mut self, frame: &[u8], sync: bool) -> io::Result<()> {
        let began = Instant::now();
        self.file.seek(SeekFrom::Start(self.length))?;
        self.file.write_all(frame)?;
        if sync {
            // Final also where the disk was full: what else was to be synced may be lost with it.
            self.file
                .sync_data()
                .map_err(|why| io::Error::other(format!("it cannot be synced: {why}")))?;
        }
        self.length += frame.len() as u64;
        if sync {
            self.synced = self.length;
            self.syncs.add(began.elapsed());
        }
        self.shared_length.store(self.length, Ordering::Relaxed);
        Ok(())
    }

    /// Fails only when the new file has the old one's name but may lose it again in a power cut.
    fn rewrite(&mut self, payload: &[u8]) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let write = || {
            let mut file = create(&temporary)?;
            file.write_all(&header())?;
            file.write_all(&frame(payload, HEADER as u64)?)?;
            file.sync_all()?;
            let length = file.stream_position()?;
            std::fs::rename(&temporary, &self.path)?;
            Ok::<_, io::Error>((file, length))
        };
        let (file, length) = match write() {
            Ok(written) => written,
            Err(error) => {
                tracing::warn!(%error, "the journal could not be shortened; the long one is kept");
                let _ = std::fs::remove_file(&temporary);
                return Ok(());
            }
        };
        (self.file, self.length, self.synced) = (file, length, length);
        self.shared_length.store(length, Ordering::Relaxed);
        sync_directory(&self.path)
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// What an empty journal holds.
pub fn header() -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header
}

fn frame(payload: &[u8], synced: u64) -> io::Result<Vec<u8>> {
    if payload.len() > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a batch is longer than a frame may be",
        ));
    }
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(FRAME_HEADER + payload.len());
    frame.extend_from_slice(FRAME);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&checksum(length, synced, payload).to_le_bytes());
    frame.extend_from_slice(&synced.to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

fn checksum(length: u32, synced: u64, payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&length.to_le_bytes());
    crc.update(&synced.to_le_bytes());
    crc.update(payload);
    crc.finalize()
}

/// The frame that begins `bytes`: what was synced when it was written, and its payload.
fn parse(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<FRAME_HEADER>()?;
    let number = |at: usize| head[at..at + 4].try_into().map(u32::from_le_bytes).ok();
    let length = number(4)?;
    let synced = u64::from_le_bytes(head[12..20].try_into().ok()?);
    let payload = rest.get(..length as usize)?;
    (&head[..4] == FRAME && number(8)? == checksum(length, synced, payload)).then_some((synced, payload))
}

fn create(path: &Path) -> io::Result<File> {
    // Commands carry the cluster CA's key: nobody else may read them.
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Syncs the directory that holds `path`, so that a name given there stays.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path
        .parent()
        .ok_or_else(|| io::Error::other("a file without a directory"))?;
    File::open(directory)?.sync_all()
}

fn recover(path: &Path, mut each: impl FnMut(Record)) -> io::Result<(File, u64)> {
    let damaged = |at: usize, why: &str| {
        let message = format!(
            "{} is damaged at byte {at}: {why}. Take this member out of the cluster, move its data directory away \
             and let it join anew; a sole member needs a backup",
            path.display()
        );
        io::Error::new(io::ErrorKind::InvalidData, message)
    };
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((start(path)?, HEADER as u64)),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let Some(at) = scan(&bytes, &mut each).map_err(|(at, why)| damaged(at, &why))? else {
        drop(file);
        return Ok((start(path)?, HEADER as u64));
    };
    if at < bytes.len() {
        tracing::warn!(
            path = %path.display(),
            at,
            cut = bytes.len() - at,
            "the journal ends with a write that was not finished, and that nobody was told of: cut off"
        );
        file.set_len(at as u64)?;
    }
    // What was written but not synced before a crash is taken as read from here on, so it must not go away again.
    file.sync_all()?;
    Ok((file, at as u64))
}

/// Gives each record in a journal's `bytes` to `each`, and returns where a torn end begins; `None` when the journal was
/// never used. Fails where it is damaged, with the reason.
pub fn scan(bytes: &[u8], mut each: impl FnMut(Record)) -> Result<Option<usize>, (usize, String)> {
    let damaged = |at: usize, why: &str| Err((at, why.to_owned()));
    if bytes.len() <= HEADER && (bytes.len() < HEADER || bytes.iter().all(|byte| *byte == 0)) {
        // The header is synced before anything is acknowledged: this file was never used.
        return Ok(None);
    }
    if &bytes[..8] != MAGIC {
        return damaged(0, "it is not a journal");
    }
    if bytes[8..12] != VERSION.to_le_bytes() {
        return damaged(8, "its version is not known: a newer release wrote it");
    }
    let mut at = HEADER;
    while let Some((_, payload)) = parse(&bytes[at..]) {
        Encoded::decode(payload, &mut each).map_err(|why| (at, why))?;
        at += FRAME_HEADER + payload.len();
    }
    let later_says_synced = (at + 1..bytes.len()).any(|later| {
        bytes[later..].starts_with(FRAME)
            && parse(&bytes[later..]).is_some_and(|(synced, _)| synced > at as u64)
    });
    if later_says_synced {
        return damaged(at, "a frame cannot be read, though later ones can");
    }
    if at < bytes.len() && !is_torn(at, &bytes[at..]) {
        return damaged(at, "the last frame is whole, but its checksum does not fit");
    }
    Ok(Some(at))
}

/// Whether the bytes at the end of the file, which begin at `at` and cannot be read, were not all written.
fn is_torn(at: usize, bytes: &[u8]) -> bool {
    const SECTOR: usize = 512;
    let Some((head, rest)) = bytes.split_first_chunk::<FRAME_HEADER>() else {
        return true;
    };
    let to_boundary = (SECTOR - at % SECTOR).min(bytes.len());
    let (first, others) = bytes.split_at(to_boundary);
    let zeros = |sector: &[u8]| sector.iter().all(|byte| *byte == 0);
    if zeros(first) || others.chunks(SECTOR).any(zeros) {
        return true;
    }
    let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
    if &head[..4] != FRAME || length <= rest.len() {
        return false;
    }
    // The file ends before the frame does; unless it is the length that is damaged.
    let mut whole = bytes.to_vec();
    u32::try_from(rest.len()).is_ok_and(|length| {
        whole[4..8].copy_from_slice(&length.to_le_bytes());
        parse(&whole).is_none()
    })
}

fn start(path: &Path) -> io::Result<File> {
    let mut file = create(path)?;
    file.write_all(&header())?;
    file.sync_all()?;
    sync_directory(path)?;
    Ok(file)
}
