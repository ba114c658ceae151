//! Objects in a directory, durable before they are acknowledged.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flynn_api::Digest;
use flynn_api::digest::Digester;
use rustix::fs::{OFlags, XattrFlags};
use tempfile::NamedTempFile;

use crate::path::BlobPath;

/// Holds an object's digest, so that its entity tag costs nothing.
const DIGEST_ATTRIBUTE: &str = "user.flynn.digest";

/// The most names that one listing gives.
const MAX_LISTING: usize = 100_000;

/// Why an object could not be stored, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The path is above or below another object.
    #[error("{0} is in the way of another object: a path cannot be an object and a directory at once")]
    Taken(BlobPath),
    /// The content is not what the path promises.
    #[error("{path} was sent content with the digest {found}; send the content that the path names")]
    WrongDigest {
        /// The path.
        path: BlobPath,
        /// The digest of what was sent.
        found: Digest,
    },
    /// A directory with too many names.
    #[error("{0} has more than {MAX_LISTING} entries; list a directory below it")]
    TooMany(String),
    /// The disk is full.
    #[error("the blobstore's disk is full; nothing was stored. Free space on it, then send it again")]
    Full,
    /// The disk failed.
    #[error("the blobstore's disk failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for StoreError {
    fn from(why: io::Error) -> Self {
        match why.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            _ => Self::Io(why),
        }
    }
}

/// An object, opened. It stays readable when the path is overwritten or deleted meanwhile.
#[derive(Debug)]
pub struct Object {
    /// Its content, at the start.
    pub file: File,
    /// Bytes.
    pub length: u64,
    /// The digest of its content.
    pub digest: Digest,
}

/// An object that is being written. Dropped, it leaves nothing behind.
pub(crate) struct Incoming {
    file: NamedTempFile,
    digester: Digester,
}

impl Incoming {
    /// Takes the next piece.
    pub(crate) fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.digester.update(piece);
        self.file.as_file_mut().write_all(piece)
    }
}

/// The store: `objects/` holds what is stored, `incoming/` what is being written.
#[derive(Debug)]
pub struct Store {
    objects: PathBuf,
    incoming: PathBuf,
    /// Held while names change, so that an emptied directory is not removed under an object that moves in.
    names: Mutex<()>,
}

impl Store {
    /// Opens the store in `root`, which is made when it is not there, and clears away what was left half-written.
    pub fn open(root: &Path) -> io::Result<Self> {
        let (objects, incoming) = (root.join("objects"), root.join("incoming"));
        match fs::remove_dir_all(&incoming) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
            _ => {}
        }
        fs::create_dir_all(&objects)?;
        fs::create_dir_all(&incoming)?;
        sync_directory(root)?;
        Ok(Self {
            objects,
            incoming,
            names: Mutex::new(()),
        })
    }

    /// Begins an object.
    pub(crate) fn begin(&self) -> Result<Incoming, StoreError> {
        Ok(Incoming {
            file: NamedTempFile::new_in(&self.incoming)?,
            digester: Digester::default(),
        })
    }

    /// Puts a whole object in its place. Once this returns, it survives a power cut.
    pub(crate) fn commit(&self, incoming: Incoming, path: &BlobPath) -> Result<Digest, StoreError> {
        let digest = incoming.digester.finish();
        if path.must_promise() && path.promised_digest() != Some(digest) {
            return Err(StoreError::WrongDigest {
                path: path.clone(),
                found: digest,
            });
        }
        let file = incoming.file;
        // Without the attribute (a file system that has none) the digest is computed when it is asked for.
        let _ = rustix::fs::fsetxattr(
            file.as_file(),
            DIGEST_ATTRIBUTE,
            digest.as_bytes(),
            XattrFlags::empty(),
        );
        file.as_file().sync_all()?;

        let _names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let target = self.objects.join(path.relative());
        self.make_parents(path)?;
        file.persist(&target).map_err(|why| name_error(why.error, path))?;
        sync_directory(target.parent().unwrap_or(&self.objects))?;
        Ok(digest)
    }

    /// Makes the directories above an object, durably.
    fn make_parents(&self, path: &BlobPath) -> Result<(), StoreError> {
        let mut directory = self.objects.clone();
        let Some((parents, _)) = path.relative().rsplit_once('/') else {
            return Ok(());
        };
        for name in parents.split('/') {
            let above = directory.clone();
            directory.push(name);
            match fs::create_dir(&directory) {
                Ok(()) => sync_directory(&above)?,
                Err(why) if why.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
                Err(why) => return Err(name_error(why, path)),
            }
        }
        Ok(())
    }

    /// Opens an object; `None` when there is none.
    pub fn get(&self, path: &BlobPath) -> Result<Option<Object>, StoreError> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(self.objects.join(path.relative()));
        let file = match opened {
            Ok(file) => file,
            Err(why) if matches!(why.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(why) => return Err(why.into()),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(None);
        }
        let digest = digest_of(&file)?;
        Ok(Some(Object {
            file,
            length: metadata.len(),
            digest,
        }))
    }

    /// Removes an object; false when there was none. Once this returns, it stays removed.
    pub fn delete(&self, path: &BlobPath) -> Result<bool, StoreError> {
        let _names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let target = self.objects.join(path.relative());
        match fs::symlink_metadata(&target) {
            Ok(metadata) if metadata.is_file() => fs::remove_file(&target)?,
            Ok(_) => return Ok(false),
            Err(why) if matches!(why.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            Err(why) => return Err(why.into()),
        }
        // Emptied directories go as well; the first one that stays is synced.
        let mut directory = target.parent();
        while let Some(above) = directory {
            if above == self.objects || fs::remove_dir(above).is_err() {
                sync_directory(above)?;
                break;
            }
            directory = above.parent();
        }
        Ok(true)
    }

    /// What is directly below `directory` (`None`: the root), sorted: full paths, those of directories ending with `/`.
    pub fn list(&self, directory: Option<&BlobPath>) -> Result<Vec<String>, StoreError> {
        let (at, prefix) = match directory {
            None => (self.objects.clone(), "/".to_owned()),
            Some(path) => (self.objects.join(path.relative()), format!("{path}/")),
        };
        let entries = match fs::read_dir(at) {
            Ok(entries) => entries,
            Err(why) if matches!(why.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            Err(why) => return Err(why.into()),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if names.len() == MAX_LISTING {
                return Err(StoreError::TooMany(prefix));
            }
            let end = if entry.file_type()?.is_dir() { "/" } else { "" };
            names.push(format!("{prefix}{}{end}", entry.file_name().to_string_lossy()));
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// What changing a name has come to.
fn name_error(why: io::Error, path: &BlobPath) -> StoreError {
    use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, IsADirectory, NotADirectory};
    match why.kind() {
        AlreadyExists | DirectoryNotEmpty | IsADirectory | NotADirectory => StoreError::Taken(path.clone()),
        _ => why.into(),
    }
}

fn digest_of(file: &File) -> io::Result<Digest> {
    let mut attribute = [0; 32];
    if let Ok(32) = rustix::fs::fgetxattr(file, DIGEST_ATTRIBUTE, &mut attribute) {
        return Ok(Digest::from_bytes(attribute));
    }
    let mut digester = Digester::default();
    let (mut buffer, mut offset) = (vec![0; 1 << 16], 0);
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok(digester.finish()),
            read => {
                digester.update(&buffer[..read]);
                offset += read as u64;
            }
        }
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Object {
    /// Reads the whole object; for small ones.
    pub fn read(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &Store, path: &str, content: &[u8]) -> Result<Digest, StoreError> {
        let mut incoming = store.begin()?;
        incoming.write(content)?;
        store.commit(incoming, &BlobPath::new(path).unwrap())
    }

    #[test]
    fn objects_come_back_and_go() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let path = BlobPath::new("/a/b/c").unwrap();
        assert!(store.get(&path).unwrap().is_none());
        put(&store, "/a/b/c", b"one").unwrap();
        let old = store.get(&path).unwrap().unwrap();
        put(&store, "/a/b/c", b"second").unwrap();
        let new = store.get(&path).unwrap().unwrap();
        assert_eq!((new.length, new.digest), (6, Digest::of(b"second")));
        assert_eq!(old.read().unwrap(), b"one", "an open object stays as it was");
        assert_eq!(store.list(None).unwrap(), ["/a/"]);
        assert_eq!(
            store.list(Some(&BlobPath::new("a/b").unwrap())).unwrap(),
            ["/a/b/c"]
        );
        assert!(store.delete(&path).unwrap() && !store.delete(&path).unwrap());
        assert!(store.list(None).unwrap().is_empty(), "emptied directories go");
    }

    #[test]
    fn what_is_half_written_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let mut incoming = store.begin().unwrap();
        incoming.write(b"half").unwrap();
        drop(incoming);
        assert_eq!(fs::read_dir(root.path().join("incoming")).unwrap().count(), 0);
        // As after a kill: a file that nobody removed.
        fs::write(root.path().join("incoming/left"), b"half").unwrap();
        Store::open(root.path()).unwrap();
        assert_eq!(fs::read_dir(root.path().join("incoming")).unwrap().count(), 0);
    }

    #[test]
    fn promises_are_kept() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let digest = Digest::of(b"layer");
        put(&store, &format!("/layers/{digest}.squashfs"), b"layer").unwrap();
        let wrong = put(&store, &format!("/layers/{digest}.squashfs"), b"other");
        assert!(matches!(wrong, Err(StoreError::WrongDigest { .. })));
        assert!(matches!(
            put(&store, "/images/latest.json", b"{}"),
            Err(StoreError::WrongDigest { .. })
        ));
        let kept = store
            .get(&BlobPath::new(&format!("/layers/{digest}.squashfs")).unwrap())
            .unwrap()
            .unwrap();
        assert_eq!(kept.read().unwrap(), b"layer");
    }

    #[test]
    fn an_object_is_no_directory() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        put(&store, "/a", b"x").unwrap();
        assert!(matches!(put(&store, "/a/b", b"x"), Err(StoreError::Taken(_))));
        put(&store, "/d/e", b"x").unwrap();
        assert!(matches!(put(&store, "/d", b"x"), Err(StoreError::Taken(_))));
        assert!(!store.delete(&BlobPath::new("/d").unwrap()).unwrap());
    }

    #[test]
    fn digests_do_not_depend_on_attributes() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        fs::write(root.path().join("objects/by-hand"), b"content").unwrap();
        let object = store.get(&BlobPath::new("by-hand").unwrap()).unwrap().unwrap();
        assert_eq!(object.digest, Digest::of(b"content"));
    }
}
