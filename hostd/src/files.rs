//! Files that are there whole or not at all.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use flynn_api::Error;
use flynn_api::server::disk;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, openat2, renameat, unlinkat};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The end of the name of a file that is being written.
pub const UNFINISHED: &str = ".tmp";

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
    temporary.push(UNFINISHED);
    let written = (|| {
        // One of an earlier attempt, or somebody else's, may be open to others or lead elsewhere.
        match fs::remove_file(&temporary) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
            _ => {}
        }
        let mut file = File::options()
            .write(true)
            .create_new(true)
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

/// So many directories below one another are removed where they are, each held open meanwhile.
const DEEP: usize = 8;

/// How often a directory is looked through again in which new things have appeared.
const ROUNDS: u32 = 100;

/// Removes a file or a directory with all in it; it need not be there. Containers make such directories, and nobody
/// should use it any more. Whoever does all the same cannot have anything removed that is elsewhere: below `path`, no
/// name is looked up but in a directory that is held open, and neither links nor mounts are followed.
pub fn remove_all(path: &Path) -> io::Result<()> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let above = if above.as_os_str().is_empty() {
        Path::new(".")
    } else {
        above
    };
    let removed = File::open(above).and_then(|above| {
        let name = CString::new(name.as_encoded_bytes())?;
        remove_at(above.as_fd(), &name)
    });
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a directory of any depth, or a file. The standard library's way wants a descriptor and a piece of the stack
/// for each level, of which a container can make more than there are: here, what is deep is moved up.
fn remove_at(above: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let Some(top) = open_dir(above, name)? else {
        return Ok(unlinkat(above, name, AtFlags::empty())?);
    };
    let (mut moved, mut rounds) = (0_u64, 0);
    loop {
        let before = moved;
        empty(top.as_fd(), top.as_fd(), 0, &mut moved)?;
        match unlinkat(above, name, AtFlags::REMOVEDIR) {
            // What was deep is above now; what else is there, somebody has made meanwhile.
            Err(Errno::NOTEMPTY) if moved > before || rounds < ROUNDS => rounds += u32::from(moved == before),
            result => return Ok(result?),
        }
    }
}

/// A directory in another one; none if it is something else.
fn open_dir(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match openat2(dir, name, flags, Mode::empty(), resolve) {
        Ok(opened) => Ok(Some(opened)),
        Err(Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn empty(dir: BorrowedFd<'_>, top: BorrowedFd<'_>, depth: usize, moved: &mut u64) -> io::Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let removed = match unlinkat(dir, name, AtFlags::empty()) {
            // It is a directory.
            Err(Errno::ISDIR | Errno::PERM) if depth < DEEP => {
                let inner = open_dir(dir, name);
                inner.and_then(|inner| match inner {
                    Some(inner) => {
                        empty(inner.as_fd(), top, depth + 1, moved)?;
                        Ok(unlinkat(dir, name, AtFlags::REMOVEDIR)?)
                    }
                    None => Ok(unlinkat(dir, name, AtFlags::empty())?),
                })
            }
            Err(Errno::ISDIR | Errno::PERM) => move_up(dir, name, top, moved),
            result => result.map_err(io::Error::from),
        };
        match removed {
            // Whoever is at it has been quicker; the next round finds the rest.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) => {}
            result => result?,
        }
    }
    Ok(())
}

fn move_up(dir: BorrowedFd<'_>, name: &CStr, top: BorrowedFd<'_>, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        match renameat(dir, name, top, format!(".deep-{moved}")) {
            // The name is taken.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            result => return Ok(result?),
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
    fn a_writer_that_is_still_there_turns_removal_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (top, kept) = (dir.path().join("top"), dir.path().join("kept"));
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "").unwrap();
        fs::create_dir(&top).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // A directory and a link out of here change places, for as long as there is something to put them in.
            scope.spawn(|| {
                let (inner, link) = (top.join("inner"), top.join("link"));
                let here = rustix::fs::CWD;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::create_dir_all(&inner);
                    let _ = fs::write(inner.join("file"), "");
                    let _ = std::os::unix::fs::symlink(&kept, &link);
                    let swap = rustix::fs::RenameFlags::EXCHANGE;
                    let _ = rustix::fs::renameat_with(here, &inner, here, &link, swap);
                }
            });
            for _ in 0..300 {
                // It may well find something new each time that it looks.
                let _ = remove_all(&top);
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        remove_all(&top).unwrap();
        assert!(kept.join("file").exists() && !top.exists());
        remove_all(&kept.join("file")).unwrap();
        remove_all(&kept.join("file")).unwrap();
        assert!(fs::read_dir(&kept).unwrap().next().is_none());
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
