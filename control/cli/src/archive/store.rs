//! The files of an archive by name: a directory, or a tar that has been indexed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;
use flynn_api::{Error, ErrorCode};

use super::{MAX_JSON, broken};

/// The most files that an archive may have.
const MAX_FILES: usize = 100_000;

/// Where files lie.
pub(super) enum Store {
    Directory(PathBuf),
    Tar {
        file: Arc<File>,
        files: HashMap<String, Place>,
    },
}

/// A file in a tar, or a link to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Bytes { offset: u64, size: u64 },
    Link(String),
}

impl Store {
    /// Opens a directory, or a tar.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let shown = path.display();
        let unreadable = |why: io::Error| match why.kind() {
            io::ErrorKind::NotFound => {
                Error::new(ErrorCode::NotFound, format!("{shown}: there is no such file"))
            }
            _ => Error::validation(format!("{shown} cannot be read: {why}")),
        };
        if std::fs::metadata(path).map_err(unreadable)?.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let mut file = File::open(path).map_err(unreadable)?;
        let mut magic = [0; 4];
        let read = file.read_at(&mut magic, 0).map_err(unreadable)?;
        if is_compressed(&magic[..read]) {
            return Self::from_reader(&mut file);
        }
        Self::index(file)
    }

    /// Keeps an archive in a temporary file, uncompressed.
    pub(super) fn from_reader(mut reader: impl Read) -> Result<Self, Error> {
        let mut magic = Vec::new();
        let unreadable = |why: io::Error| broken(format!("it cannot be read: {why}"));
        reader
            .by_ref()
            .take(4)
            .read_to_end(&mut magic)
            .map_err(unreadable)?;
        let compression = magic.clone();
        let reader = BufReader::with_capacity(128 << 10, Cursor::new(magic).chain(reader));
        match compression.as_slice() {
            [0x1f, 0x8b, ..] => Self::keep(MultiGzDecoder::new(reader)),
            [0x28, 0xb5, 0x2f, 0xfd] => Self::keep(zstd::Decoder::with_buffer(reader).map_err(unreadable)?),
            _ => Self::keep(reader),
        }
    }

    fn keep(mut reader: impl Read) -> Result<Self, Error> {
        let full = |why: io::Error| {
            let directory = std::env::temp_dir();
            let message = format!(
                "the archive cannot be kept in {}: {why}. Make room there, or set TMPDIR",
                directory.display()
            );
            Error::new(ErrorCode::LimitExceeded, message)
        };
        let mut file = tempfile::tempfile().map_err(full)?;
        let mut buffer = vec![0; 128 << 10];
        loop {
            let read = reader
                .read(&mut buffer)
                .map_err(|why| broken(format!("it cannot be read: {why}; it may be cut short")))?;
            if read == 0 {
                break;
            }
            file.write_all(&buffer[..read]).map_err(full)?;
        }
        Self::index(file)
    }

    fn index(mut file: File) -> Result<Self, Error> {
        file.rewind().map_err(broken)?;
        let length = file.metadata().map_err(|why| broken(&why))?.len();
        let files = index(&file, length)?;
        Ok(Self::Tar {
            file: Arc::new(file),
            files,
        })
    }

    /// Whether there is a file of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Self::Directory(directory) => directory.join(name).is_file(),
            Self::Tar { files, .. } => files.contains_key(name),
        }
    }

    /// A file's size.
    pub(super) fn size(&self, name: &str) -> Result<u64, Error> {
        match self {
            Self::Directory(_) => {
                let file = self.open_file(name)?;
                Ok(file
                    .metadata()
                    .map_err(|why| broken(format!("{name}: {why}")))?
                    .len())
            }
            Self::Tar { files, .. } => Ok(place(files, name)?.1),
        }
    }

    /// A file's bytes.
    pub(super) fn read(&self, name: &str) -> Result<Box<dyn Read + Send>, Error> {
        match self {
            Self::Directory(_) => Ok(Box::new(self.open_file(name)?)),
            Self::Tar { file, files } => {
                let (offset, size) = place(files, name)?;
                Ok(Box::new(Section {
                    file: Arc::clone(file),
                    offset,
                    end: offset + size,
                }))
            }
        }
    }

    /// A small file, whole.
    pub(super) fn read_json(&self, name: &str) -> Result<Vec<u8>, Error> {
        let size = self.size(name)?;
        if size > MAX_JSON {
            return Err(broken(format!(
                "{name} has {size} bytes; at most {MAX_JSON} make sense"
            )));
        }
        let mut bytes = Vec::new();
        self.read(name)?
            .take(MAX_JSON)
            .read_to_end(&mut bytes)
            .map_err(|why| broken(format!("{name}: {why}")))?;
        Ok(bytes)
    }

    fn open_file(&self, name: &str) -> Result<File, Error> {
        let Self::Directory(directory) = self else {
            return Err(missing(name));
        };
        // What an archive names must lie in it.
        let safe = Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let file = safe.then(|| File::open(directory.join(name)).ok()).flatten();
        file.filter(|file| file.metadata().is_ok_and(|metadata| metadata.is_file()))
            .ok_or_else(|| missing(name))
    }
}

fn missing(name: &str) -> Error {
    broken(format!(
        "it names the file {name}, which is not in it; it may be cut short: make it again"
    ))
}

fn is_compressed(magic: &[u8]) -> bool {
    magic.starts_with(&[0x1f, 0x8b]) || magic == [0x28, 0xb5, 0x2f, 0xfd]
}

/// Where each file of a tar lies.
fn index(file: &File, length: u64) -> Result<HashMap<String, Place>, Error> {
    let cut = |why: &dyn std::fmt::Display| broken(format!("it is no tar, or cut short: {why}"));
    let mut files = HashMap::new();
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries_with_seek().map_err(|why| cut(&why))? {
        let entry = entry.map_err(|why| cut(&why))?;
        if files.len() == MAX_FILES {
            return Err(broken(format!(
                "it has more than {MAX_FILES} files; an image has fewer"
            )));
        }
        let (offset, size) = (entry.raw_file_position(), entry.size());
        let name = entry.path().map_err(|why| cut(&why))?;
        let Some(name) = normal(Path::new(""), &name) else {
            continue;
        };
        let kind = entry.header().entry_type();
        let place = if kind.is_file() {
            if offset.checked_add(size).is_none_or(|end| end > length) {
                return Err(cut(&format!("the file {name} is not whole")));
            }
            Place::Bytes { offset, size }
        } else if kind.is_symlink() || kind.is_hard_link() {
            let Some(target) = entry.link_name().map_err(|why| cut(&why))? else {
                continue;
            };
            let parent = Path::new(&name)
                .parent()
                .filter(|_| kind.is_symlink())
                .unwrap_or(Path::new(""));
            let Some(target) = normal(parent, &target) else {
                continue;
            };
            Place::Link(target)
        } else {
            continue;
        };
        files.insert(name, place);
    }
    Ok(files)
}

/// A name without `.` and `..`; `None` when it leads out of the archive.
fn normal(base: &Path, name: &Path) -> Option<String> {
    let joined = base.join(name);
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::ParentDir => {
                parts.pop()?;
            }
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Follows links to a file's bytes.
fn place(files: &HashMap<String, Place>, name: &str) -> Result<(u64, u64), Error> {
    let mut at = name;
    // Old archives link a layer to an equal one; nobody chains more than a few.
    for _ in 0..8 {
        match files.get(at) {
            Some(Place::Bytes { offset, size }) => return Ok((*offset, *size)),
            Some(Place::Link(target)) => at = target,
            None => break,
        }
    }
    Err(missing(name))
}

/// A part of a file, read without moving anyone else's place in it.
struct Section {
    file: Arc<File>,
    offset: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        if read == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += read as u64;
        Ok(read)
    }
}
