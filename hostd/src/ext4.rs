//! ext4 in a file, for what has a limit on a filesystem that knows no quotas.
//!
//! The file has all its room from the beginning: nobody else can take it, and an ext4 in the middle of a write never
//! finds its disk full.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::tool::{Tool, long_for};

const MKFS: Tool = Tool {
    program: "mkfs.ext4",
    package: "e2fsprogs",
};

/// Makes one of so many bytes, in a file that is not there yet. No block is kept for root.
pub(crate) fn make(image: &Path, size: u64, options: &[&OsStr]) -> io::Result<File> {
    let file = File::create_new(image)?;
    reserve(&file, size)?;
    let usual = ["-q", "-F", "-m", "0"].map(OsStr::new);
    let args = [&usual[..], options, &[image.as_os_str()]].concat();
    MKFS.run(&args, long_for(size))?;
    // What it zeroes may become a hole.
    reserve(&file, size)?;
    Ok(file)
}

/// Has the file keep its room, where its filesystem can do that: those that write every block anew cannot.
pub(crate) fn reserve(file: &File, size: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, size) {
        Err(Errno::OPNOTSUPP) => file.set_len(size),
        result => Ok(result?),
    }
}
