//! The files of a log: `<run>-<first>.syslog`, each named after its first record, so that names order them. The ending is
//! the format's name. A writer that goes on after a failure or a restart begins a new one: what a crash has torn at the
//! end of a file is never added to.
//!
//! Beside them, `held.<sink>` names the segment which a sink reads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::record::Id;

const ENDING: &str = ".syslog";
const HELD: &str = "held.";

/// One file of a log: the id of its first record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Segment(pub Id);

impl Segment {
    /// Its file in the log's directory.
    pub fn path(self, dir: &Path) -> PathBuf {
        dir.join(self.name())
    }

    fn name(self) -> String {
        format!("{:020}-{:020}{ENDING}", self.0.run, self.0.seq)
    }

    fn parse(name: &str) -> Option<Self> {
        let (run, seq) = name.strip_suffix(ENDING)?.split_once('-')?;
        let id = Id {
            run: run.parse().ok()?,
            seq: seq.parse().ok()?,
        };
        (id.seq > 0).then_some(Self(id))
    }
}

/// The segments of a log, oldest first. None where there is no log.
pub fn list(dir: &Path) -> io::Result<Vec<Segment>> {
    let mut segments: Vec<_> = names(dir)?
        .iter()
        .filter_map(|name| Segment::parse(name))
        .collect();
    segments.sort_unstable();
    Ok(segments)
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

/// A place in a log, between two records.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(from = "[u64; 4]", into = "[u64; 4]")]
pub struct Position {
    /// The file.
    pub segment: Segment,
    /// In the file.
    pub offset: u64,
    /// The number of the record that follows.
    pub next: u64,
}

impl Position {
    /// A segment's start.
    pub fn start(segment: Segment) -> Self {
        Self {
            segment,
            offset: 0,
            next: segment.0.seq,
        }
    }
}

/// Run, first, offset, next.
impl From<[u64; 4]> for Position {
    fn from([run, seq, offset, next]: [u64; 4]) -> Self {
        Self {
            segment: Segment(Id { run, seq }),
            offset,
            next,
        }
    }
}

impl From<Position> for [u64; 4] {
    fn from(position: Position) -> Self {
        let Segment(first) = position.segment;
        [first.run, first.seq, position.offset, position.next]
    }
}

/// Says which segment a sink reads: that one and those after it are held for it.
pub fn hold(dir: &Path, sink: &str, segment: Segment) -> io::Result<()> {
    crate::files::write_for_boot(&dir.join(format!("{HELD}{sink}")), segment.name().as_bytes())
}

/// The oldest segment that a sink reads; none when no sink does. What cannot be read holds all.
pub fn held(dir: &Path) -> io::Result<Option<Segment>> {
    let sinks = names(dir)?.into_iter().filter(|name| is_hold(name));
    let segment = |name| {
        let name = fs::read_to_string(dir.join(name)).unwrap_or_default();
        Segment::parse(&name).unwrap_or_default()
    };
    Ok(sinks.map(segment).min())
}

/// Lets go of what is held for sinks that are not among these.
pub fn release(dir: &Path, sinks: &dyn Fn(&str) -> bool) -> io::Result<()> {
    for name in names(dir)? {
        if is_hold(&name) && !name.strip_prefix(HELD).is_some_and(sinks) {
            crate::files::remove_all(&dir.join(name))?;
        }
    }
    Ok(())
}

/// A file that is being written is none yet.
fn is_hold(name: &str) -> bool {
    name.starts_with(HELD) && name.strip_suffix(crate::files::UNFINISHED).is_none()
}
