//! The supervisor's side of a log.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flynn_api::host::{LogLine, LogStream};

use super::{CURRENT, MAX_FILE, PREVIOUS};

/// Appends to a log.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    max_file: u64,
    file: Option<File>,
    size: u64,
    dropped: u64,
}

impl Writer {
    /// A writer for this directory, which is made at the first line.
    pub fn new(dir: &Path) -> Self {
        Self::open(dir, MAX_FILE)
    }

    pub(super) fn open(dir: &Path, max_file: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            max_file,
            file: None,
            size: 0,
            dropped: 0,
        }
    }

    /// Writes lines. Those that do not fit on the disk are dropped; how many is said once there is room again.
    pub fn append(&mut self, lines: &[LogLine]) {
        let Some(first) = lines.first() else { return };
        let count = lines.len() as u64;
        if self.dropped > 0 {
            let msg = format!(
                "{} lines of the log were lost: it could not be written",
                self.dropped
            );
            let note = LogLine {
                msg,
                stream: LogStream::Init,
                ..first.clone()
            };
            if self.write(&[note]).is_err() {
                self.dropped += count;
                return;
            }
            self.dropped = 0;
        }
        if let Err(error) = self.write(lines) {
            if self.dropped == 0 {
                tracing::warn!(%error, "cannot write the log; lines are dropped");
            }
            self.dropped += count;
        }
    }

    fn write(&mut self, lines: &[LogLine]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut bytes, line)?;
            bytes.push(b'\n');
        }
        if self.size > 0 && self.size + bytes.len() as u64 > self.max_file {
            self.file = None;
            fs::rename(self.dir.join(CURRENT), self.dir.join(PREVIOUS))?;
            self.size = 0;
        }
        let file = if let Some(file) = &mut self.file {
            file
        } else {
            let (file, size) = open(&self.dir)?;
            self.size = size;
            self.file.insert(file)
        };
        if let Err(error) = file.write_all(&bytes) {
            // No torn lines: what was written of these is taken back.
            let _ = file.set_len(self.size);
            let _ = file.seek(SeekFrom::End(0));
            return Err(error);
        }
        self.size += bytes.len() as u64;
        Ok(())
    }
}

/// Opens the current file at its end. A line that a crash has torn is closed, so that the next one is whole.
fn open(dir: &Path) -> io::Result<(File, u64)> {
    crate::files::private_dir(dir)?;
    let mut file = File::options()
        .read(true)
        .append(true)
        .create(true)
        .open(dir.join(CURRENT))?;
    let size = file.seek(SeekFrom::End(0))?;
    if size > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
            return Ok((file, size + 1));
        }
    }
    Ok((file, size))
}
