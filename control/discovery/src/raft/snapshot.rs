//! The snapshot file: the state up to one log entry, under a checksum, replaced atomically.
//!
//! ```text
//! "flynnsnp"  version u32  crc32 u32  header length u32  0 u32  header JSON  state JSON
//! ```

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::journal::sync_directory;
use super::{Snapshot, SnapshotMeta};

const MAGIC: &[u8; 8] = b"flynnsnp";
const VERSION: u32 = 1;
const FIXED: usize = 24;
/// Between attempts to write while the disk is full.
const FULL_RETRY: Duration = Duration::from_secs(1);

/// Where a state machine keeps its snapshot.
pub trait Snapshots: Clone + Send + Sync + 'static {
    /// The snapshot, if there is one.
    fn load(&self) -> impl Future<Output = io::Result<Option<Snapshot>>> + Send;
    /// Replaces the snapshot. When this returns it is on disk.
    fn save(&self, meta: &SnapshotMeta, data: Vec<u8>) -> impl Future<Output = io::Result<()>> + Send;
}

impl Snapshots for SnapshotFile {
    async fn load(&self) -> io::Result<Option<Snapshot>> {
        let file = self.clone();
        tokio::task::spawn_blocking(move || file.read())
            .await
            .map_err(io::Error::other)?
    }

    /// A full disk is waited out, for openraft takes an error as the end. One that is made here is written beside one that comes
    /// from the leader: what is on the disk already, or something later, stays.
    async fn save(&self, meta: &SnapshotMeta, data: Vec<u8>) -> io::Result<()> {
        let data = Arc::new(data);
        loop {
            let (file, meta, data) = (self.clone(), meta.clone(), Arc::clone(&data));
            let written = tokio::task::spawn_blocking(move || file.write_later(&meta, &data)).await;
            match written.map_err(io::Error::other)? {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                    ) =>
                {
                    tracing::error!(%error, "a snapshot cannot be written until there is room on the disk");
                    tokio::time::sleep(FULL_RETRY).await;
                }
                result => return result,
            }
        }
    }
}

/// Where the snapshot is kept.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    /// The index of what is known to be there. Held while the file is replaced.
    held: Arc<Mutex<Option<u64>>>,
}

/// A snapshot as it goes to a file or to another member.
pub fn encode<H: Serialize>(header: &H, data: &[u8]) -> io::Result<Vec<u8>> {
    let header = serde_json::to_vec(header)?;
    let length = u32::try_from(header.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(FIXED + header.len() + data.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&header);
    bytes.extend_from_slice(data);
    let crc = crc32fast::hash(&bytes[16..]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    Ok(bytes)
}

/// Takes apart what [`encode`] made.
pub fn decode<H: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<(H, &[u8]), String> {
    let (fixed, rest) = bytes.split_first_chunk::<FIXED>().ok_or("it is cut short")?;
    let number = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    if &fixed[..8] != MAGIC {
        return Err("it is not a snapshot".to_owned());
    }
    if number(8) != VERSION {
        return Err(format!(
            "version {} is not known: a newer release wrote it",
            number(8)
        ));
    }
    if number(12) != crc32fast::hash(&bytes[16..]) {
        return Err("its checksum does not fit".to_owned());
    }
    let (header, data) = rest
        .split_at_checked(number(16) as usize)
        .ok_or("it is cut short")?;
    let header = serde_json::from_slice(header).map_err(|why| format!("its header cannot be read: {why}"))?;
    Ok((header, data))
}

impl SnapshotFile {
    /// The snapshot in the directory `dir`.
    pub fn new(dir: &Path) -> Self {
        Self {
            path: dir.join("snapshot"),
            held: Arc::default(),
        }
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    fn held(&self) -> MutexGuard<'_, Option<u64>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`SnapshotFile::write`], unless this very snapshot or a later one is known to be there.
    fn write_later(&self, meta: &SnapshotMeta, data: &[u8]) -> io::Result<()> {
        let mut held = self.held();
        let index = meta.last_log_id.map(|last| last.index);
        if held.is_some() && *held >= index {
            return Ok(());
        }
        self.write(meta, data)?;
        *held = index;
        Ok(())
    }

    /// Reads the snapshot, if there is one.
    pub fn read(&self) -> io::Result<Option<Snapshot>> {
        let mut held = self.held();
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let (meta, data) = decode::<SnapshotMeta>(&bytes).map_err(|why| {
            let message = format!(
                "{} is damaged: {why}. Take this member out of the cluster, move its data directory away and let it \
                 join anew; a sole member needs a backup",
                self.path.display()
            );
            io::Error::new(io::ErrorKind::InvalidData, message)
        })?;
        *held = meta.last_log_id.map(|last| last.index);
        Ok(Some(Snapshot {
            meta,
            snapshot: data.to_vec(),
        }))
    }

    /// Replaces the snapshot. When this returns it is on disk.
    pub fn write(&self, meta: &SnapshotMeta, data: &[u8]) -> io::Result<()> {
        let bytes = encode(meta, data)?;
        let temporary = self.path.with_extension("new");
        let write = || {
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        write().inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })?;
        std::fs::rename(&temporary, &self.path)?;
        sync_directory(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::LogId;
    use openraft::vote::RaftLeaderId;

    fn meta(index: u64) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: Some(LogId::new(RaftLeaderId::new(1, 1), index)),
            ..SnapshotMeta::default()
        }
    }

    #[tokio::test]
    async fn nothing_earlier_takes_the_place_of_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(dir.path());
        file.save(&meta(5), b"five".to_vec()).await.unwrap();
        file.clone().save(&meta(9), b"nine".to_vec()).await.unwrap();
        file.save(&meta(7), b"seven".to_vec()).await.unwrap();
        assert_eq!(file.load().await.unwrap().unwrap().snapshot, b"nine");

        // What was read at a start is not written again: there may be no room for it.
        let file = SnapshotFile::new(dir.path());
        file.load().await.unwrap();
        std::fs::remove_dir_all(dir.path()).unwrap();
        file.save(&meta(9), b"nine".to_vec()).await.unwrap();
        file.save(&meta(10), b"ten".to_vec()).await.unwrap_err();
    }
}
