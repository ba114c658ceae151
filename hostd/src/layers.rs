//! Image layers on this host: a store of verified squashfs files, and the mounts of those that jobs use.
//!
//! Invariants:
//! - Under its name a layer is whole and was what its digest says when it came.
//! - A layer that a job holds ([`Mounts`]), or that an image of this host names ([`Pins`]), is not collected.
//! - One that is found damaged is set aside, never changed: who has it mounted goes on.
//!
//! A layer's time of modification says when it was last made use of. The daemon is not the only one who writes here:
//! `flynn-host download` brings layers in as well.

mod collect;
mod mounts;
mod pins;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use flynn_api::digest::Digester;
use flynn_api::image::Layer;
use flynn_api::{Digest, Error, ErrorCode, Result};
use futures::{Stream, StreamExt};
use tokio::io::AsyncWriteExt;

pub use collect::{Collected, Marks, Rule};
pub use mounts::Mounts;
pub use pins::{Arriving, Pins};

use crate::download::{self, Expected, Hash, Open, Part, Patience};
use crate::files;
use crate::paths::Paths;

/// What the names of unfinished files begin with that are not gone on with.
const INCOMING: &str = ".incoming-";

/// What the names of those begin with that are.
const PART: &str = ".part-";

/// What the names of damaged layers begin with.
const DAMAGED: &str = ".damaged-";

/// Read at once from a layer that is verified.
const PIECE: usize = 1 << 20;

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
        Ok(Self::beside_daemon(paths))
    }

    /// The same store for a process beside the daemon, or before there is one.
    pub fn beside_daemon(paths: &Paths) -> Self {
        Self {
            paths: paths.clone(),
            arriving: Mutex::default(),
        }
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

    /// Whether a layer is there and as long as it must be. One that is damaged is set aside.
    pub fn has_whole(&self, layer: &Layer) -> Result<bool> {
        match fs::metadata(self.paths.layer(layer.id)) {
            Ok(metadata) if metadata.len() == layer.length => Ok(true),
            Ok(metadata)
                if tokio::task::block_in_place(|| self.verify(layer.id))
                    .map_err(|error| disk_error(layer.id, &error))? =>
            {
                Err(Error::validation(format!(
                    "layer {} has {} bytes, and not {} as the image says: make the image anew",
                    layer.id,
                    metadata.len(),
                    layer.length
                )))
            }
            Ok(metadata) => {
                tracing::error!(layer = %layer.id, found = metadata.len(), wanted = layer.length, "a layer is damaged");
                self.set_aside(layer.id)?;
                Ok(false)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(disk_error(layer.id, &error)),
        }
    }

    /// Sees to it that a layer is there: it may be, it may come while this waits, or else it is fetched from what
    /// `open` gives ([`download`]). What comes of it before this is cut off is kept.
    pub async fn fetch(
        &self,
        layer: &Layer,
        patience: Patience,
        open: impl Open<'_>,
        progress: impl Fn(u64),
    ) -> Result<()> {
        let lock = self.lock(layer.id);
        let guard = lock.lock().await;
        let result = self.fetch_alone(layer, patience, open, progress).await;
        drop(guard);
        self.unlock(layer.id, lock);
        result
    }

    async fn fetch_alone(
        &self,
        layer: &Layer,
        patience: Patience,
        open: impl Open<'_>,
        progress: impl Fn(u64),
    ) -> Result<()> {
        if layer.length > MAX_LAYER {
            return Err(Error::new(
                ErrorCode::LimitExceeded,
                format!(
                    "layer {} has more than the {MAX_LAYER} bytes that one may have",
                    layer.id
                ),
            ));
        }
        let expected = Expected {
            what: format!("layer {}", layer.id),
            length: layer.length,
            hash: Hash::Sha512_256(layer.id),
        };
        loop {
            if self.has_whole(layer)? {
                return Ok(());
            }
            let path = self.paths.layers().join(format!("{PART}{}", layer.id));
            let Some(mut part) = Part::lock(&path).await? else {
                continue;
            };
            // Whoever had the part until now may have finished it.
            if self.has_whole(layer)? {
                let _ = fs::remove_file(part.path());
                return Ok(());
            }
            download::fill(&mut part, &expected, patience, open, progress).await?;
            return self
                .place(part.path(), layer.id)
                .map_err(|error| disk_error(layer.id, &error));
        }
    }

    /// Gives a file that is what it must be, and on the disk, its name.
    fn place(&self, file: &Path, digest: Digest) -> io::Result<()> {
        fs::rename(file, self.paths.layer(digest))?;
        files::sync_dir(&self.paths.layers())
    }

    /// Takes a damaged layer out of the store. Who has it mounted keeps it.
    pub fn set_aside(&self, digest: Digest) -> Result<()> {
        let aside = self.paths.layers().join(format!("{DAMAGED}{digest}"));
        match fs::rename(self.paths.layer(digest), aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk_error(digest, &error)),
            _ => Ok(()),
        }
    }

    /// Reads a layer and says whether it is what it must be. Blocks.
    pub fn verify(&self, digest: Digest) -> io::Result<bool> {
        let mut file = File::open(self.paths.layer(digest))?;
        let mut digester = Digester::default();
        let mut piece = vec![0; PIECE];
        loop {
            match file.read(&mut piece) {
                Ok(0) => return Ok(digester.finish() == digest),
                Ok(read) => digester.update(&piece[..read]),
                // A disk that does not give it back has not kept it.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// The layers that are there.
    pub fn list(&self) -> io::Result<Vec<Stored>> {
        let mut stored = Vec::new();
        for entry in fs::read_dir(self.paths.layers())? {
            let entry = entry?;
            let name = entry.file_name();
            let digest = name
                .to_str()
                .and_then(|name| name.strip_suffix(".squashfs")?.parse().ok());
            // One that goes meanwhile is not there.
            let (Some(id), Ok(metadata)) = (digest, entry.metadata()) else {
                continue;
            };
            stored.push(Stored {
                id,
                length: metadata.len(),
                used: metadata.modified()?,
            });
        }
        Ok(stored)
    }

    /// Files that are no layers, yet or any more.
    fn others(&self) -> io::Result<Vec<Other>> {
        let mut others = Vec::new();
        for entry in fs::read_dir(self.paths.layers())? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            if let (true, Ok(metadata)) = (
                name.starts_with(PART) || name.starts_with(DAMAGED),
                entry.metadata(),
            ) {
                others.push(Other {
                    path: entry.path(),
                    length: metadata.len(),
                    changed: metadata.modified()?,
                });
            }
        }
        Ok(others)
    }

    /// The damaged layers that were set aside.
    pub fn damaged(&self) -> io::Result<Vec<PathBuf>> {
        let others = self.others()?.into_iter().map(|other| other.path);
        let damaged = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(DAMAGED))
        };
        Ok(others.filter(damaged).collect())
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
        self.place(&path, digest)
            .map_err(|error| disk_error(digest, &error))?;
        drop(incoming);
        Ok(())
    }
}

/// A layer that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its digest.
    pub id: Digest,
    /// Bytes.
    pub length: u64,
    /// When it came, or a job last made use of it.
    pub used: SystemTime,
}

/// What else is in the store's directory.
#[derive(Clone, Debug)]
struct Other {
    path: PathBuf,
    length: u64,
    changed: SystemTime,
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
    use crate::download::{Opened, opener};

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

    #[tokio::test(flavor = "multi_thread")]
    async fn a_wrong_length_in_an_image_harms_no_layer() {
        let (_dir, paths, store) = store();
        let digest = Digest::of(b"a layer");
        store.put(digest, None, pieces(b"a layer")).await.unwrap();
        let error = store.has_whole(&Layer::squashfs(digest, 8)).unwrap_err();
        assert!(error.message.contains("has 7 bytes, and not 8"), "{error}");
        assert!(store.has_whole(&Layer::squashfs(digest, 7)).unwrap());
        fs::write(paths.layer(digest), "a la").unwrap();
        assert!(!store.has_whole(&Layer::squashfs(digest, 7)).unwrap());
        assert!(!store.has(digest), "it is damaged");
    }

    fn opened(bytes: &'static [u8], start: u64) -> Opened {
        let body = futures::stream::iter(bytes.chunks(3).map(|piece| Ok(Bytes::from_static(piece))));
        Opened {
            start,
            length: Some(7),
            body: body.boxed(),
        }
    }

    #[tokio::test]
    async fn the_second_request_for_a_layer_waits_for_the_first() {
        let (_dir, paths, store) = store();
        let layer = Layer::squashfs(Digest::of(b"a layer"), 7);
        let fetches = std::sync::atomic::AtomicU32::new(0);
        let (count, bytes) = (&fetches, b"a layer");
        let open = opener(|_, _| async move {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok(opened(bytes, 0))
        });
        // The second store is that of another process.
        let other = Store::open(&paths).unwrap();
        let get = async |store: &Store| store.fetch(&layer, Patience::default(), &open, |_| ()).await;
        let (one, two, three) = tokio::join!(get(&store), get(&store), get(&other));
        assert!(one.is_ok() && two.is_ok() && three.is_ok());
        assert_eq!(fetches.load(std::sync::atomic::Ordering::Relaxed), 1);
        assert!(store.arriving.lock().unwrap().is_empty());
        assert_eq!(names(&paths), [format!("{}.squashfs", layer.id)]);
    }

    #[tokio::test]
    async fn what_came_of_a_cancelled_fetch_is_gone_on_with() {
        let (_dir, paths, store) = store();
        let layer = Layer::squashfs(Digest::of(b"a layer"), 7);
        let endless = opener(|_, _| async {
            let begun = opened(b"a la", 0);
            Ok(Opened {
                body: begun.body.chain(futures::stream::pending()).boxed(),
                ..begun
            })
        });
        let arrived = tokio::sync::Notify::new();
        let progress = |length| {
            if length == 4 {
                arrived.notify_one();
            }
        };
        tokio::select! {
            _ = store.fetch(&layer, Patience::default(), endless, progress) => panic!("it cannot end"),
            () = arrived.notified() => {}
        }
        // A daemon that is started anew keeps it.
        let store = Store::open(&paths).unwrap();
        assert_eq!(names(&paths), [format!("{PART}{}", layer.id)]);
        let rest = opener(|from, _| async move {
            assert_eq!(from, 4);
            Ok(opened(b"yer", 4))
        });
        store
            .fetch(&layer, Patience::default(), rest, |_| ())
            .await
            .unwrap();
        assert_eq!(names(&paths), [format!("{}.squashfs", layer.id)]);
        assert!(store.verify(layer.id).unwrap());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_layer_of_another_length_is_set_aside_and_fetched_again() {
        let (_dir, paths, store) = store();
        let layer = Layer::squashfs(Digest::of(b"a layer"), 7);
        fs::write(paths.layer(layer.id), b"a lay").unwrap();
        let open = opener(|_, _| async { Ok(opened(b"a layer", 0)) });
        store
            .fetch(&layer, Patience::default(), open, |_| ())
            .await
            .unwrap();
        assert_eq!(fs::read(paths.layer(layer.id)).unwrap(), b"a layer");
        let damaged = store.damaged().unwrap();
        assert_eq!(fs::read(&damaged[0]).unwrap(), b"a lay");
        // One of the right length with other bytes is found by reading it.
        fs::write(paths.layer(layer.id), b"a liar!").unwrap();
        assert!(!store.verify(layer.id).unwrap());
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
