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

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_ATTACH: libc::c_int = 8;
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

/// One instruction of a program that is not compiled.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    code: u8,
    /// The one that it changes, and in the upper half the one that it reads.
    registers: u8,
    offset: i16,
    value: u32,
}

impl Instruction {
    /// Ends the program.
    pub(crate) const END: Self = Self::new(0x95, 0, 0, 0);

    const fn new(code: u8, registers: u8, offset: i16, value: u32) -> Self {
        Self {
            code,
            registers,
            offset,
            value,
        }
    }

    /// Takes 32 bits out of what the program is called with.
    pub(crate) const fn load(register: u8, offset: i16) -> Self {
        Self::new(0x61, register | 1 << 4, offset, 0)
    }

    /// Keeps only these bits of a register.
    pub(crate) const fn and(register: u8, mask: u32) -> Self {
        Self::new(0x54, register, 0, mask)
    }

    /// Sets a register.
    pub(crate) const fn set(register: u8, value: u32) -> Self {
        Self::new(0xb7, register, 0, value)
    }

    /// Goes past so many instructions unless a register has this value.
    pub(crate) fn skip_unless_equal(register: u8, value: u32, past: usize) -> Self {
        Self::new(0x55, register, i16::try_from(past).unwrap_or(i16::MAX), value)
    }
}

/// Loads a program that decides about devices.
pub(crate) fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    #[repr(C)]
    struct Arguments {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u32; 4],
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    let mut name = [0; 16];
    name[..13].copy_from_slice(b"flynn_devices");
    let arguments = Arguments {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"BSD".as_ptr() as u64,
        log: [0; 4],
        kernel_version: 0,
        flags: 0,
        name,
    };
    let fd = call(BPF_PROG_LOAD, &arguments)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has that program decide for a cgroup, in the place of an earlier one, for as long as the cgroup is there.
pub(crate) fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_CGROUP_DEVICE: u32 = 6;
    #[repr(C)]
    struct Arguments {
        cgroup: i32,
        program: i32,
        kind: u32,
        flags: u32,
    }
    let arguments = Arguments {
        cgroup: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    call(BPF_PROG_ATTACH, &arguments).map(drop)
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
