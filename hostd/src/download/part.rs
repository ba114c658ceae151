//! What has come of a file.

use std::fs::{File, TryLockError};
use std::io::{self, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flynn_api::{Error, Result};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use super::{Expected, Hash, Hasher};
use crate::files::disk_error;

/// Between looks whether another process is done with it.
const LOOK: Duration = Duration::from_millis(50);

/// Read from the disk at once.
const PIECE: usize = 256 << 10;

/// An unfinished file that this process alone writes.
pub(crate) struct Part {
    path: PathBuf,
    file: tokio::fs::File,
    length: u64,
    hasher: Option<Hasher>,
}

impl Part {
    /// Opens the one at this path, or makes it, and waits for other processes that write it. None when one of them has
    /// finished it meanwhile.
    pub(crate) async fn lock(path: &Path) -> Result<Option<Self>> {
        let failed = |error: io::Error| disk_error(&format!("keep {}", path.display()), &error);
        let open = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path);
        let file = open.map_err(failed)?;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOOK).await,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
        let own = file.metadata().map_err(failed)?;
        let there =
            std::fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino()));
        Ok(there.then(|| Self {
            path: path.to_owned(),
            file: tokio::fs::File::from_std(file),
            length: 0,
            hasher: None,
        }))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves no empty file behind.
    pub(super) fn remove_empty(&self) {
        if self.length == 0 {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Reads what is there; what cannot be of such a file goes.
    pub(super) async fn read(&mut self, expected: &Expected) -> Result<()> {
        let length = self
            .file
            .metadata()
            .await
            .map_err(|error| self.failed(&error))?
            .len();
        if length > expected.length {
            return self.empty(expected).await;
        }
        let read = async {
            let mut hasher = Hasher::new(expected.hash);
            self.file.seek(SeekFrom::Start(0)).await?;
            let mut piece = vec![0; PIECE];
            let mut length = 0;
            loop {
                let read = self.file.read(&mut piece).await?;
                if read == 0 {
                    return io::Result::Ok((hasher, length));
                }
                hasher.update(&piece[..read]);
                length += read as u64;
            }
        };
        match read.await {
            Ok((hasher, length)) => {
                self.length = length;
                self.hasher = Some(hasher);
                Ok(())
            }
            // What the disk does not give back is fetched again.
            Err(_) => self.empty(expected).await,
        }
    }

    /// Throws away what is there.
    pub(super) async fn empty(&mut self, expected: &Expected) -> Result<()> {
        let emptied = async {
            self.file.set_len(0).await?;
            self.file.seek(SeekFrom::Start(0)).await.map(drop)
        };
        emptied.await.map_err(|error| self.failed(&error))?;
        self.length = 0;
        self.hasher = Some(Hasher::new(expected.hash));
        Ok(())
    }

    pub(super) async fn write(&mut self, piece: &[u8], expected: &Expected) -> Result<()> {
        let written = async {
            self.file.write_all(piece).await?;
            // Errors come with the call that they belong to.
            self.file.flush().await
        };
        if let Err(error) = written.await {
            // It may have taken a piece of the piece.
            let _ = self.file.set_len(self.length).await;
            let _ = self.file.seek(SeekFrom::Start(self.length)).await;
            return Err(disk_error(&format!("store {}", expected.what), &error));
        }
        self.length += piece.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(piece);
        }
        Ok(())
    }

    /// Sees that it is what it must be, and on the disk.
    pub(super) async fn check(&mut self, expected: &Expected) -> Result<()> {
        let found = self.hasher.take().map(Hasher::finish);
        if found != Some(expected.hash) {
            let found = match found {
                Some(Hash::Sha512_256(digest)) => format!(" (its digest is {digest})"),
                _ => String::new(),
            };
            return Err(Error::validation(format!(
                "what came as {} is something else{found}: it was damaged on its way, or is wrong where it comes from",
                expected.what
            )));
        }
        self.file.sync_all().await.map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &io::Error) -> Error {
        disk_error(&format!("keep {}", self.path.display()), error)
    }
}
