//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use flynn_api::Error;
use flynn_api::server::disk;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Makes a directory, and those above it, that only root can enter.
pub fn private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file that only root can read so that a crash leaves the old content or the new, never a mixture.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, true)
}

/// [`write_atomic`] for as long as the machine is up: whoever reads finds the old content or the new, whatever is
/// killed, but when the power is cut there may be an empty file. It saves the waiting for the disk.
pub fn write_for_boot(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, false)
}

fn write(path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let written = (|| {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        path.parent().filter(|_| durable).map_or(Ok(()), sync_dir)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// [`write_atomic`] of a value's JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_atomic(path, &serde_json::to_vec(value)?)
}

/// Reads JSON; `None` when there is no such file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", path.display()),
        )),
    }
}

/// Makes what was created, renamed or removed in a directory last.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// So many directories below one another are removed where they are: with the longest names their path still is one.
const DEEP: usize = 8;

/// Removes a file or a directory with all in it; it need not be there. Containers make such directories, and nobody
/// may use it any more.
pub fn remove_all(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => remove_tree(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a directory of any depth. The standard library's way wants a descriptor and a piece of the stack for each
/// level, of which a container can make more than there are: here, what is deep is moved up.
fn remove_tree(top: &Path) -> io::Result<()> {
    let mut moved = 0_u64;
    loop {
        empty(top, top, 0, &mut moved)?;
        match fs::remove_dir(top) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            result => return result,
        }
    }
}

fn empty(dir: &Path, top: &Path, depth: usize, moved: &mut u64) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if !entry.file_type()?.is_dir() {
            fs::remove_file(&path)?;
        } else if depth < DEEP {
            empty(&path, top, depth + 1, moved)?;
            fs::remove_dir(&path)?;
        } else {
            move_up(&path, top, moved)?;
        }
    }
    Ok(())
}

fn move_up(path: &Path, top: &Path, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        match fs::rename(path, top.join(format!(".deep-{moved}"))) {
            // The name is taken.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::AlreadyExists
                        | io::ErrorKind::NotADirectory
                ) => {}
            result => return result,
        }
    }
}

/// An I/O error as an answer.
pub(crate) fn disk_error(what: &str, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull => disk::full(format!("cannot {what}: the disk is full")),
        _ => Error::internal(format!("cannot {what}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_any_depth_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        // Names that are wanted for what is moved up.
        fs::create_dir_all(top.join(".deep-1/inner")).unwrap();
        fs::write(top.join(".deep-2"), "").unwrap();
        std::os::unix::fs::symlink("/etc", top.join("link")).unwrap();
        let name = "n".repeat(255);
        let open = |dir: &std::os::fd::OwnedFd, name: &str| {
            let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
            rustix::fs::openat(dir, name, flags, rustix::fs::Mode::empty()).unwrap()
        };
        let mut deepest: std::os::fd::OwnedFd = File::open(&top).unwrap().into();
        for level in 0..5000 {
            rustix::fs::mkdirat(&deepest, &name, rustix::fs::Mode::RWXU).unwrap();
            if level % 100 == 0 {
                rustix::fs::mkdirat(&deepest, "beside", rustix::fs::Mode::RWXU).unwrap();
            }
            deepest = open(&deepest, &name);
        }
        remove_all(&top).unwrap();
        assert!(!top.exists() && Path::new("/etc").exists());
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.json");
        write_json(&path, &1).unwrap();
        // The temporary name is taken by a directory: the write must fail.
        fs::create_dir(dir.path().join("status.json.tmp")).unwrap();
        assert!(write_json(&path, &2).is_err());
        assert_eq!(read_json::<i32>(&path).unwrap(), Some(1));
    }

    #[test]
    fn missing_is_none_and_broken_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_json::<i32>(&dir.path().join("a")).unwrap(), None);
        fs::write(dir.path().join("b"), "{").unwrap();
        assert!(read_json::<i32>(&dir.path().join("b")).is_err());
    }
}
