//! Image layers on this host: a store of verified squashfs files, and the mounts of those that jobs use.

mod mounts;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flynn_api::digest::Digester;
use flynn_api::{Digest, Error, ErrorCode, Result};
use futures::{Stream, StreamExt};
use tokio::io::AsyncWriteExt;

pub use mounts::Mounts;

use crate::files;
use crate::paths::Paths;

/// What the names of unfinished files begin with.
const INCOMING: &str = ".incoming-";

/// The largest layer that is taken.
const MAX_LAYER: u64 = 64 << 30;

/// The layers that this host has.
#[derive(Debug)]
pub struct Store {
    paths: Paths,
    /// One at a time per layer: who comes second finds it there.
    arriving: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
}

impl Store {
    /// Opens the store, and removes what an earlier daemon did not finish.
    pub fn open(paths: &Paths) -> io::Result<Self> {
        for entry in fs::read_dir(paths.layers())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(INCOMING) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self {
            paths: paths.clone(),
            arriving: Mutex::default(),
        })
    }

    /// Whether a layer is there.
    pub fn has(&self, digest: Digest) -> bool {
        self.paths.layer(digest).exists()
    }

    /// Takes a layer in. Nothing is left of one that is cut short, does not fit its digest or not on the disk.
    pub async fn put<E: std::fmt::Display>(
        &self,
        digest: Digest,
        length: Option<u64>,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<()> {
        let lock = self.lock(digest);
        let guard = lock.lock().await;
        let result = if self.has(digest) {
            Ok(())
        } else {
            self.take(digest, length, body).await
        };
        drop(guard);
        self.unlock(digest, lock);
        result
    }

    /// Puts the layer into the store by calling `fetch` unless it is there, or comes while this waits.
    pub async fn ensure<S, E>(
        &self,
        digest: Digest,
        length: u64,
        fetch: impl AsyncFnOnce() -> Result<S>,
    ) -> Result<()>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: std::fmt::Display,
    {
        let lock = self.lock(digest);
        let guard = lock.lock().await;
        let result = async {
            if self.has(digest) {
                return Ok(());
            }
            let body = fetch().await?;
            self.take(digest, Some(length), body).await
        };
        let result = result.await;
        drop(guard);
        self.unlock(digest, lock);
        result
    }

    fn lock(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut arriving = self.arriving.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(arriving.entry(digest).or_default())
    }

    fn unlock(&self, digest: Digest, lock: Arc<tokio::sync::Mutex<()>>) {
        let mut arriving = self.arriving.lock().unwrap_or_else(PoisonError::into_inner);
        drop(lock);
        if arriving
            .get(&digest)
            .is_some_and(|lock| Arc::strong_count(lock) == 1)
        {
            arriving.remove(&digest);
        }
    }

    async fn take<E: std::fmt::Display>(
        &self,
        digest: Digest,
        length: Option<u64>,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<()> {
        let path = self.paths.layers().join(format!("{INCOMING}{digest}"));
        let incoming = Incoming(&path);
        write(&path, digest, length, body).await?;
        let stored =
            fs::rename(&path, self.paths.layer(digest)).and_then(|()| files::sync_dir(&self.paths.layers()));
        stored.map_err(|error| disk_error(digest, &error))?;
        drop(incoming);
        Ok(())
    }
}

/// An unfinished file: gone when its writer is, also when that was cancelled.
struct Incoming<'a>(&'a Path);

impl Drop for Incoming<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

async fn write<E: std::fmt::Display>(
    path: &Path,
    digest: Digest,
    length: Option<u64>,
    body: impl Stream<Item = Result<Bytes, E>>,
) -> Result<()> {
    let failed = |error: io::Error| disk_error(digest, &error);
    let mut file = tokio::fs::File::create(path).await.map_err(failed)?;
    let mut digester = Digester::default();
    let mut body = std::pin::pin!(body);
    let limit = length.unwrap_or(MAX_LAYER);
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| cut_short(digest, digester.length(), &error))?;
        digester.update(&piece);
        if digester.length() > limit {
            return Err(Error::new(
                ErrorCode::LimitExceeded,
                format!("layer {digest} is longer than the {limit} bytes it may have"),
            ));
        }
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.sync_all().await.map_err(failed)?;
    if let Some(length) = length.filter(|length| *length != digester.length()) {
        let why = format!("{length} bytes were announced");
        return Err(cut_short(digest, digester.length(), &why));
    }
    let found = digester.finish();
    if found != digest {
        return Err(Error::validation(format!(
            "what was sent as layer {digest} has the digest {found}: it was damaged on its way, or is another layer"
        )));
    }
    Ok(())
}

fn cut_short(digest: Digest, length: u64, why: &dyn std::fmt::Display) -> Error {
    Error::validation(format!(
        "layer {digest} was cut short after {length} bytes ({why}): send it again"
    ))
}

fn disk_error(digest: Digest, error: &io::Error) -> Error {
    if error.kind() == io::ErrorKind::StorageFull {
        return flynn_api::server::disk::full(format!("layer {digest} does not fit on the disk"));
    }
    Error::internal(format!("cannot store layer {digest}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(bytes: &'static [u8]) -> impl Stream<Item = Result<Bytes, io::Error>> {
        futures::stream::iter(bytes.chunks(3).map(|piece| Ok(Bytes::from_static(piece))))
    }

    fn names(paths: &Paths) -> Vec<String> {
        let entries = fs::read_dir(paths.layers()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn store() -> (tempfile::TempDir, Paths, Store) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::at(dir.path());
        fs::create_dir(paths.layers()).unwrap();
        let store = Store::open(&paths).unwrap();
        (dir, paths, store)
    }

    #[tokio::test]
    async fn only_what_fits_its_digest_stays() {
        let (_dir, paths, store) = store();
        let digest = Digest::of(b"a layer");
        for (length, body) in [
            (None, &b"a liar"[..]),
            (Some(8), b"a layer"),
            (Some(3), b"a layer"),
        ] {
            assert!(store.put(digest, length, pieces(body)).await.is_err());
            assert_eq!(names(&paths), [""; 0]);
        }
        let torn = pieces(b"a la").chain(futures::stream::once(async {
            Err(io::ErrorKind::ConnectionReset.into())
        }));
        let error = store.put(digest, None, torn).await.unwrap_err();
        assert!(error.message.contains("cut short after 4 bytes"), "{error}");
        assert_eq!(names(&paths), [""; 0]);
        store.put(digest, Some(7), pieces(b"a layer")).await.unwrap();
        assert_eq!(names(&paths), [format!("{digest}.squashfs")]);
    }

    #[tokio::test]
    async fn the_second_request_for_a_layer_waits_for_the_first() {
        let (_dir, _paths, store) = store();
        let digest = Digest::of(b"a layer");
        let fetches = std::cell::Cell::new(0);
        let fetch = async || {
            fetches.set(fetches.get() + 1);
            tokio::task::yield_now().await;
            Ok(pieces(b"a layer"))
        };
        let (one, two) = tokio::join!(store.ensure(digest, 7, fetch), store.ensure(digest, 7, fetch));
        assert!(one.is_ok() && two.is_ok() && fetches.get() == 1);
        assert!(store.arriving.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_cancelled_put_leaves_nothing() {
        let (_dir, paths, store) = store();
        let endless = pieces(b"a la").chain(futures::stream::pending());
        let put = store.put(Digest::of(b"a layer"), None, endless);
        assert!(
            tokio::time::timeout(std::time::Duration::from_millis(50), put)
                .await
                .is_err()
        );
        assert_eq!(names(&paths), [""; 0]);
    }
}
