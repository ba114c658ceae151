//! The supervisor's side of a log.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flynn_api::host::LogStream;
use flynn_api::server::disk;
use jiff::Timestamp;

use super::record::{Encoder, Framed, Id, Origin, framed};
use super::segment::{self, Segment};
use super::{HELD, KEPT, SEGMENT, SLOWEST};

/// What is gathered before it is written.
const GATHERED: usize = 256 << 10;

/// The sizes that bound a log, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of one file.
    pub segment: u64,
    /// Of all files that no sink waits for.
    pub kept: u64,
    /// Of all files.
    pub held: u64,
    /// A second, that a job may always write.
    pub slowest: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            segment: SEGMENT,
            kept: KEPT,
            held: HELD,
            slowest: SLOWEST,
        }
    }
}

/// Appends to a log.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    bounds: Bounds,
    encoder: Encoder,
    next: Id,
    /// Records that are not in the file yet, and the first one's number.
    gathered: Vec<u8>,
    first: u64,
    file: Option<File>,
    /// The files with their sizes; the last one is written.
    segments: VecDeque<(Segment, u64)>,
    dropped: u64,
    /// When the last file was begun, if what sinks have yet to take is much.
    rushing: Option<Instant>,
    pause: Duration,
}

impl Writer {
    /// A writer for this directory, which is made at the first line.
    pub fn new(dir: &Path, origin: &Origin) -> Self {
        Self::bounded(dir, origin, Bounds::default())
    }

    /// [`Self::new`] with bounds of one's own.
    pub fn bounded(dir: &Path, origin: &Origin, bounds: Bounds) -> Self {
        let size = |segment: Segment| Some((segment, fs::metadata(segment.path(dir)).ok()?.len()));
        // A log that cannot be looked at cannot be written either, which is said then.
        let segments: VecDeque<_> = segment::list(dir)
            .unwrap_or_default()
            .into_iter()
            .filter_map(size)
            .collect();
        let now = u64::try_from(Timestamp::now().as_microsecond()).unwrap_or(0);
        let before = segments.back().map_or(0, |(segment, _)| segment.0.run);
        let run = now.max(before + 1);
        Self {
            dir: dir.to_owned(),
            bounds,
            encoder: Encoder::new(origin, run),
            next: Id { run, seq: 1 },
            gathered: Vec::new(),
            first: 1,
            file: None,
            segments,
            dropped: 0,
            rushing: None,
            pause: Duration::ZERO,
        }
    }

    /// The time of the lines that follow.
    pub fn at(&mut self, time: Timestamp) {
        self.encoder.at(time);
    }

    /// Adds a piece of a line. It is in the file by the next [`Self::flush`].
    pub fn add(&mut self, stream: LogStream, text: &[u8], more: bool) {
        if self.gathered.len() > GATHERED {
            self.commit();
        }
        self.encoder
            .record(&mut self.gathered, stream, self.next.seq, text, more);
        self.next.seq += 1;
    }

    /// Writes what was added. Lines that do not fit on the disk are dropped; how many is said once there is room again.
    /// Comes back with how long the job should be kept waiting.
    pub fn flush(&mut self) -> Duration {
        self.commit();
        std::mem::take(&mut self.pause)
    }

    /// Lets go of memory that is wanted for writing only.
    pub fn rest(&mut self) {
        self.gathered.shrink_to(0);
    }

    fn commit(&mut self) {
        if self.gathered.is_empty() {
            return;
        }
        if self.dropped > 0 {
            let lost = self.dropped;
            let note = format!("{lost} lines of the log were lost: it could not be written");
            let mut bytes = Vec::new();
            // Under the number of one that was lost.
            let number = self.first - 1;
            self.encoder
                .record(&mut bytes, LogStream::Init, number, note.as_bytes(), false);
            if self.write(&bytes, number).is_ok() {
                self.dropped = 0;
            }
        }
        if self.dropped > 0 {
            self.dropped += self.next.seq - self.first;
        } else {
            let gathered = std::mem::take(&mut self.gathered);
            if let Err((error, written)) = self.write(&gathered, self.first) {
                tracing::warn!(%error, "cannot write the log; lines are dropped");
                self.dropped = self.next.seq - self.first - written;
            }
            self.gathered = gathered;
        }
        self.gathered.clear();
        self.first = self.next.seq;
    }

    /// Writes records; `first` is the number of the first one. An error comes with how many are in the file nonetheless.
    fn write(&mut self, records: &[u8], first: u64) -> Result<(), (io::Error, u64)> {
        let size = self.segments.back().map_or(0, |(_, size)| *size);
        if self.file.is_some() && size + records.len() as u64 > self.bounds.segment {
            self.file = None;
        }
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.begin(first).map_err(|error| (error, 0))?,
        };
        let mut written = 0;
        let result = loop {
            match file.write(&records[written..]) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
            if written == records.len() {
                break Ok(());
            }
        };
        if let Some((segment, size)) = self.segments.back_mut() {
            *size += written as u64;
            if *size == 0 {
                let _ = fs::remove_file(segment.path(&self.dir));
                self.segments.pop_back();
            }
        }
        match result {
            Ok(()) => {
                self.file = Some(file);
                Ok(())
            }
            // Nothing is added behind what is torn: the next record begins another file.
            Err(error) => Err((error, whole(&records[..written]))),
        }
    }

    /// Begins another file, and removes those that are too many.
    fn begin(&mut self, first: u64) -> io::Result<File> {
        if let Err(error) = self.tidy() {
            tracing::warn!(%error, "cannot remove old files of the log");
        }
        crate::files::private_dir(&self.dir)?;
        let segment = Segment(Id {
            run: self.next.run,
            seq: first,
        });
        let file = File::options()
            .append(true)
            .create(true)
            .open(segment.path(&self.dir))?;
        self.segments.push_back((segment, 0));
        Ok(file)
    }

    fn tidy(&mut self) -> io::Result<()> {
        let mut total: u64 = self.segments.iter().map(|(_, size)| size).sum();
        let held = segment::held(&self.dir)?;
        let holding = |(segment, _): &&(Segment, u64)| held.is_some_and(|held| held <= *segment);
        let waiting: u64 = self.segments.iter().filter(holding).map(|(_, size)| size).sum();
        self.pace(waiting);
        let room = self.bounds.segment;
        while total + room > self.bounds.kept {
            let Some(oldest) = self.segments.front() else {
                break;
            };
            if holding(&oldest) && total + room <= self.bounds.held && disk::check(&self.dir).is_ok() {
                break;
            }
            crate::files::remove_all(&oldest.0.path(&self.dir))?;
            total -= oldest.1;
            self.segments.pop_front();
        }
        Ok(())
    }

    /// Works out how long the job is kept waiting, once a segment is full: no longer than it takes to write one at the
    /// slowest.
    fn pace(&mut self, waiting: u64) {
        if waiting <= self.bounds.held / 2 {
            self.rushing = None;
            return;
        }
        let slowest = Duration::from_millis(self.bounds.segment * 1000 / self.bounds.slowest);
        if let Some(begun) = self.rushing {
            self.pause += slowest.saturating_sub(begun.elapsed());
        }
        self.rushing = Some(Instant::now() + self.pause);
    }
}

/// How many records are whole in bytes that may end within one.
fn whole(mut bytes: &[u8]) -> u64 {
    let mut count = 0;
    while let Framed::Whole { to, .. } = framed(bytes) {
        count += 1;
        bytes = &bytes[to..];
    }
    count
}
