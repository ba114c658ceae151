//! The calls of bpf(2) that the library does not offer.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_UPDATE: libc::c_int = 29;

/// Opens what is pinned at a path.
pub(crate) fn object_get(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Arguments {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let arguments = Arguments {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    let fd = call(BPF_OBJ_GET, &arguments)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the program of a link, in one step.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Arguments {
        link: i32,
        program: i32,
        flags: u32,
        old_program: u32,
    }
    let arguments = Arguments {
        link: link.as_raw_fd(),
        program: program.as_raw_fd(),
        flags: 0,
        old_program: 0,
    };
    call(BPF_LINK_UPDATE, &arguments).map(drop)
}

/// `A` must be laid out as the beginning of the kernel's `union bpf_attr` is for the command.
fn call<A>(command: libc::c_int, arguments: &A) -> io::Result<i32> {
    // SAFETY: the kernel reads as many bytes as it is told there are, and what they point to lives until it returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(arguments),
            size_of::<A>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
