//! Reading a log from some place on, and waiting for more of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flynn_api::host::{LogLine, LogStream};
use rustix::fs::inotify;

use super::record::{Framed, Record, framed};
use super::segment::{self, Position, Segment};

/// How much is read at once.
const CHUNK: usize = 256 << 10;

/// The longest line that is put together from its pieces; a longer one is shown as several.
const MAX_LINE: usize = 1 << 20;

/// Reads whole records.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    position: Option<Position>,
    file: Option<File>,
}

/// What one [`Reader::read`] has come by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Where it was; none: before the first record that there ever was.
    pub from: Option<Position>,
    /// Where it is.
    pub to: Option<Position>,
    /// How many records were read.
    pub records: u64,
    /// Records that were removed before they were read: at least so many.
    pub lost: u64,
}

impl Reader {
    /// From this position on, or from the first record that there ever was.
    pub fn new(dir: &Path, position: Option<Position>) -> Self {
        Self {
            dir: dir.to_owned(),
            position,
            file: None,
        }
    }

    /// Where it is.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// Goes on from elsewhere.
    pub fn seek(&mut self, position: Option<Position>) {
        self.position = position;
        self.file = None;
    }

    /// Reads the records that follow, some hundred kilobytes at most, into `records`. Empty: there are none yet.
    pub fn read(&mut self, records: &mut Vec<u8>) -> io::Result<Span> {
        records.clear();
        let mut span = Span {
            from: self.position,
            ..Span::default()
        };
        loop {
            span.lost += self.open()?;
            span.to = self.position;
            let Some(position) = self.position else {
                return Ok(span);
            };
            span.records = self.fill(position, records)?;
            if span.records > 0 {
                span.to = self.position;
                return Ok(span);
            }
            let segments = segment::list(&self.dir)?;
            let later = |segment: &&Segment| **segment > position.segment;
            let Some(next) = segments.iter().find(later).copied() else {
                return Ok(span);
            };
            // Nothing is added to a file that has a successor, but something may have been since it was read.
            span.records = self.fill(position, records)?;
            if span.records > 0 {
                span.to = self.position;
                return Ok(span);
            }
            // Where that one has gone, those that followed it may have.
            if !segments.contains(&position.segment) {
                let before = if position.segment.0.run == next.0.run {
                    position.next
                } else {
                    1
                };
                span.lost += next.0.seq.saturating_sub(before);
            }
            self.seek(Some(Position::start(next)));
        }
    }

    /// Opens the file of the position, or the one after it where that is gone; gives how many records are.
    fn open(&mut self) -> io::Result<u64> {
        let mut lost = 0;
        while self.file.is_none() {
            let wanted = self.position.map(|position| position.segment);
            let there = |segment: &Segment| wanted.is_none_or(|wanted| *segment >= wanted);
            let Some(found) = segment::list(&self.dir)?.into_iter().find(there) else {
                break;
            };
            if wanted != Some(found) {
                lost += match self.position {
                    None => found.0.seq - 1,
                    Some(before) if before == Position::default() => found.0.seq - 1,
                    Some(before) if before.segment.0.run == found.0.run => {
                        found.0.seq.saturating_sub(before.next)
                    }
                    // How many there were at the end of another run, nobody knows any more.
                    Some(_) => found.0.seq,
                };
                self.position = Some(Position::start(found));
            }
            match File::open(found.path(&self.dir)) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(lost)
    }

    /// Reads what the open file has from there on; gives how many records that is.
    fn fill(&mut self, position: Position, records: &mut Vec<u8>) -> io::Result<u64> {
        let Some(file) = &self.file else { return Ok(0) };
        records.resize(CHUNK, 0);
        let count = file.read_at(records, position.offset)?;
        let (mut end, mut number) = (0, 0);
        // What is broken or torn ends the file.
        while let Framed::Whole { to, .. } = framed(&records[end..count]) {
            end += to;
            number += 1;
        }
        records.truncate(end);
        self.position = Some(Position {
            offset: position.offset + end as u64,
            next: position.next + number,
            ..position
        });
        Ok(number)
    }
}

/// The records in some bytes that [`Reader::read`] gave.
pub(super) fn records(mut bytes: &[u8]) -> impl Iterator<Item = (&[u8], Record<'_>)> {
    std::iter::from_fn(move || {
        while let Framed::Whole { from, to } = framed(bytes) {
            let (whole, rest) = bytes.split_at(to);
            bytes = rest;
            if let Some(record) = Record::parse(&whole[from..]) {
                return Some((whole, record));
            }
        }
        None
    })
}

/// Reads a log's lines, each put together from its pieces.
#[derive(Debug)]
pub struct Follower {
    reader: Reader,
    records: Vec<u8>,
    /// Lines that are older than those wanted.
    surplus: usize,
    /// By stream: the pieces of a line whose end has not come, and the run that they are of.
    pieces: [(u64, Vec<u8>); 3],
    changes: crate::sys::Polled,
}

impl Follower {
    /// Opens the log in `dir`, beginning with its `last` lines, or with all there are. Needs a runtime with I/O.
    pub fn open(dir: &Path, last: Option<usize>) -> io::Result<Self> {
        crate::files::private_dir(dir)?;
        let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(
            &changes,
            dir,
            inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE,
        )?;
        let (position, surplus) = match last {
            Some(last) => tail(dir, last)?,
            None => (None, 0),
        };
        Ok(Self {
            reader: Reader::new(dir, position),
            records: Vec::new(),
            surplus,
            pieces: Default::default(),
            changes: crate::sys::polled(changes)?,
        })
    }

    /// Lines that have not been given out; none when there are no more now.
    pub fn read(&mut self) -> io::Result<Vec<LogLine>> {
        let mut lines = Vec::new();
        let mut buffer = std::mem::take(&mut self.records);
        loop {
            self.reader.read(&mut buffer)?;
            if buffer.is_empty() {
                break;
            }
            for (_, record) in records(&buffer) {
                lines.extend(self.line(&record));
            }
            if !lines.is_empty() {
                self.records = buffer;
                break;
            }
        }
        Ok(lines)
    }

    /// All lines that there are now.
    pub fn read_all(&mut self) -> io::Result<Vec<LogLine>> {
        let mut all = Vec::new();
        loop {
            let lines = self.read()?;
            if lines.is_empty() {
                return Ok(all);
            }
            all.extend(lines);
        }
    }

    fn line(&mut self, record: &Record<'_>) -> Option<LogLine> {
        let (run, pieces) = &mut self.pieces[index(record.stream())];
        if *run != record.id.run {
            // Its supervisor was killed before the line's end.
            pieces.clear();
            *run = record.id.run;
        }
        if record.more && pieces.len() < MAX_LINE {
            pieces.extend_from_slice(record.text);
            return None;
        }
        let line = if pieces.is_empty() {
            record.line(record.text)
        } else {
            let mut text = std::mem::take(pieces);
            text.extend_from_slice(record.text);
            record.line(&text)
        };
        if self.surplus > 0 {
            self.surplus -= 1;
            return None;
        }
        line
    }

    /// Waits until the files change. Wakes at once for changes since the last call.
    pub async fn changed(&self) -> io::Result<()> {
        let mut guard = self.changes.readable().await?;
        let mut buffer = [0; 4096];
        while rustix::io::read(self.changes.get_ref(), &mut buffer).is_ok_and(|count| count > 0) {}
        guard.clear_ready();
        Ok(())
    }
}

fn index(stream: LogStream) -> usize {
    match stream {
        LogStream::Stdout => 0,
        LogStream::Stderr => 1,
        LogStream::Init => 2,
    }
}

/// Where to begin for the last lines, and how many lines more there are from there on. Begins at the log's end for none.
fn tail(dir: &Path, last: usize) -> io::Result<(Option<Position>, usize)> {
    let mut buffer = Vec::new();
    let mut found = 0;
    let mut begin = None;
    let segments = segment::list(dir)?;
    for segment in segments.into_iter().rev() {
        let start = Position::start(segment);
        let mut reader = Reader::new(dir, Some(start));
        let mut lines = 0;
        reader.read(&mut buffer)?;
        while !buffer.is_empty()
            && reader
                .position
                .is_some_and(|position| position.segment == segment)
        {
            lines += records(&buffer).filter(|(_, record)| !record.more).count();
            if last == 0 {
                begin = reader.position;
            }
            reader.read(&mut buffer)?;
        }
        if last == 0 {
            return Ok((begin.or(Some(start)), 0));
        }
        begin = Some(start);
        found += lines;
        if found >= last {
            break;
        }
    }
    Ok((begin, found.saturating_sub(last)))
}
