//! Reading a log, and waiting for more of it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use flynn_api::host::LogLine;
use rustix::fs::inotify;

use super::{CURRENT, PREVIOUS};

/// How much is read at once.
const CHUNK: usize = 64 << 10;

/// Reads a log from some point on. The files are small enough to be looked through from their start.
#[derive(Debug)]
pub struct Follower {
    dir: PathBuf,
    file: Option<File>,
    partial: Vec<u8>,
    /// Lines found when it was opened and not given out yet.
    backlog: Vec<LogLine>,
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
        let mut follower = Self {
            dir: dir.to_owned(),
            file: None,
            partial: Vec::new(),
            backlog: Vec::new(),
            changes: crate::sys::polled(changes)?,
        };
        let mut lines = Vec::new();
        if last == Some(0) {
            follower.file = follower.current()?;
            if let Some(file) = &mut follower.file {
                file.seek(SeekFrom::End(0))?;
            }
        } else {
            if let Some(previous) = open(&dir.join(PREVIOUS))? {
                follower.file = Some(previous);
                lines = follower.read_file()?;
                follower.file = None;
            }
            lines.extend(follower.read_files()?);
            if let Some(last) = last {
                lines.drain(..lines.len().saturating_sub(last));
            }
        }
        follower.backlog = lines;
        Ok(follower)
    }

    /// The lines that are there now and have not been given out.
    pub fn read(&mut self) -> io::Result<Vec<LogLine>> {
        let mut lines = std::mem::take(&mut self.backlog);
        lines.extend(self.read_files()?);
        Ok(lines)
    }

    /// Waits until the files change. Wakes at once for changes since the last call.
    pub async fn changed(&self) -> io::Result<()> {
        let mut guard = self.changes.readable().await?;
        let mut buffer = [0; 4096];
        while rustix::io::read(self.changes.get_ref(), &mut buffer).is_ok_and(|count| count > 0) {}
        guard.clear_ready();
        Ok(())
    }

    /// Reads the open file to its end, and goes on with the next one if there is one.
    fn read_files(&mut self) -> io::Result<Vec<LogLine>> {
        let mut lines = Vec::new();
        for _ in 0..3 {
            lines.extend(self.read_file()?);
            let Some(current) = self.current()? else { break };
            let same = |open: &File| -> io::Result<bool> {
                let (open, current) = (open.metadata()?, current.metadata()?);
                Ok((open.dev(), open.ino()) == (current.dev(), current.ino()))
            };
            if self.file.as_ref().map_or(Ok(false), same)? {
                break;
            }
            // Rotated: nothing is added to the old file, but something may have been since it was read.
            lines.extend(self.read_file()?);
            self.partial.clear();
            self.file = Some(current);
        }
        Ok(lines)
    }

    fn current(&self) -> io::Result<Option<File>> {
        open(&self.dir.join(CURRENT))
    }

    fn read_file(&mut self) -> io::Result<Vec<LogLine>> {
        let Some(file) = &mut self.file else {
            return Ok(Vec::new());
        };
        let mut lines = Vec::new();
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = file.read(&mut chunk)?;
            if count == 0 {
                return Ok(lines);
            }
            let mut rest = &chunk[..count];
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                self.partial.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                // A line that is none was torn by a crash.
                lines.extend(serde_json::from_slice::<LogLine>(&self.partial).ok());
                self.partial.clear();
            }
            self.partial.extend_from_slice(rest);
        }
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match fs::File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
