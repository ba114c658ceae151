//! What tricks are made of. Each does what somebody would do who wants out of a container. The same code runs inside one, where it has
//! to be refused, and outside, where it has to work: a trick that works nowhere proves nothing.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use libc::c_long;
use rustix::fs::{CWD, FileType, Mode};

/// Where a trick may make files.
pub(crate) const SCRATCH: &str = "ESCAPE_SCRATCH";
/// A directory of the host's that no container has.
pub(crate) const HOST: &str = "ESCAPE_HOST";
/// Where devices can be opened that somebody has made.
pub(crate) const DEVICES: &str = "ESCAPE_DEVICES";

pub(crate) const AT_FDCWD: usize = libc::AT_FDCWD as usize;
pub(crate) const NO_FD: usize = usize::MAX;
pub(crate) const PTRACE_SEIZE: usize = 0x4206;
pub(crate) const SESSION_KEYRING: usize = -3_isize as usize;
pub(crate) const READ_IMPLIES_EXEC: usize = 0x040_0000;

/// The number of an ioctl.
pub(crate) fn request(number: u64) -> usize {
    usize::try_from(number).unwrap_or_default()
}

pub(crate) fn text(text: &'static CStr) -> usize {
    text.as_ptr() as usize
}

pub(crate) fn pointer<T>(to: &T) -> usize {
    std::ptr::from_ref(to) as usize
}

/// For what the kernel writes to.
pub(crate) fn place<T>(to: &mut T) -> usize {
    std::ptr::from_mut(to) as usize
}

/// What goes wrong before the trick itself says nothing about it.
pub(crate) fn before<T, E: Into<io::Error>>(result: Result<T, E>) -> io::Result<T> {
    result.map_err(|error| io::Error::other(error.into().to_string()))
}

pub(crate) fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    Ok(std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?)
}

pub(crate) fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_default().into()
}

/// A system call that works, or fails.
pub(crate) fn call<const N: usize>(number: c_long, arguments: [usize; N]) -> io::Result<usize> {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    // SAFETY: every pointer among the arguments is to something that outlives the call and is as large as the kernel takes it
    // to be, or is no address at all, which the kernel finds out.
    let result = unsafe { libc::syscall(number, all[0], all[1], all[2], all[3], all[4], all[5]) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A system call of which it is enough that the kernel looks at its arguments: they are wrong, lest it do what it is for.
pub(crate) fn reach<const N: usize>(number: c_long, arguments: [usize; N]) -> io::Result<()> {
    match call(number, arguments) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn unshare(what: i32) -> io::Result<()> {
    call(libc::SYS_unshare, [what as usize]).map(drop)
}

pub(crate) fn clone_user() -> io::Result<()> {
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    leave_if_child(call(libc::SYS_clone, [flags as usize])?);
    Ok(())
}

pub(crate) fn clone3_user() -> io::Result<()> {
    let mut arguments = [0_u64; 8];
    arguments[0] = u64::from(libc::CLONE_NEWUSER.cast_unsigned());
    arguments[4] = u64::from(libc::SIGCHLD.cast_unsigned());
    leave_if_child(call(libc::SYS_clone3, [pointer(&arguments), 64])?);
    Ok(())
}

fn leave_if_child(pid: usize) {
    if pid == 0 {
        // SAFETY: the copy of this process leaves at once.
        unsafe { libc::_exit(0) }
    }
    let _ = rustix::process::wait(rustix::process::WaitOptions::empty());
}

/// Who is root may leave a root that he is in by going into another one below it.
pub(crate) fn chroot_and_out() -> io::Result<()> {
    let secret = variable(HOST).join("secret");
    let cage = variable(SCRATCH).join("cage");
    before(fs::create_dir_all(cage.join("inner")))?;
    before(rustix::process::chdir(&cage))?;
    before(rustix::process::chroot("inner"))?;
    for _ in 0..64 {
        before(rustix::process::chdir(".."))?;
    }
    rustix::process::chroot(".")?;
    fs::read(secret).map(drop)
}

pub(crate) fn open_by_handle() -> io::Result<()> {
    // Inode 2, which is the root directory's on many file systems.
    let handle: [u32; 4] = [8, 1, 2, 0];
    let root = before(fs::File::open("/"))?;
    reach(
        libc::SYS_open_by_handle_at,
        [root.as_raw_fd() as usize, pointer(&handle), 0],
    )
}

/// `getpid` by the 32-bit kernel's number. The filter ends who does that.
pub(crate) fn calls_of_32_bits() -> io::Result<()> {
    let pid = call(libc::SYS_clone, [libc::SIGCHLD as usize])?;
    if pid == 0 {
        let result: i64;
        // SAFETY: the call reads no memory and changes no registers but these.
        unsafe {
            std::arch::asm!(
                "int 0x80",
                inlateout("rax") 20_i64 => result,
                out("r8") _,
                out("r9") _,
                out("r10") _,
                out("r11") _,
                options(nostack),
            );
        }
        // SAFETY: the copy of this process leaves at once.
        unsafe { libc::_exit(i32::from(result <= 0)) }
    }
    let ended = rustix::process::wait(rustix::process::WaitOptions::empty())?;
    match ended.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EPERM)),
    }
}

/// Whether this kernel takes 32-bit calls at all.
pub(crate) fn has_32_bits() -> bool {
    calls_of_32_bits().is_ok()
}

/// Whether the kernel does not know a system call.
pub(crate) fn is_missing(number: c_long) -> bool {
    call(number, [usize::MAX; 6]).is_err_and(|error| error.raw_os_error() == Some(libc::ENOSYS))
}

/// Only opens it: what would be written would be the machine's.
pub(crate) fn write(path: &str) -> io::Result<()> {
    File::options().write(true).open(path).map(drop)
}

pub(crate) fn read(path: &str) -> io::Result<()> {
    let mut start = [0; 16];
    match File::open(path)?.read(&mut start)? {
        0 => Err(io::Error::from_raw_os_error(libc::ENODATA)),
        _ => Ok(()),
    }
}

/// Whether a file of the kernel's is that, and not something mounted over it: it may be empty for both.
pub(crate) fn own_of_the_kernel(path: &str) -> io::Result<()> {
    const PROC: i64 = 0x9fa0;
    if rustix::fs::statfs(path)?.f_type == PROC {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ENODATA))
    }
}

pub(crate) fn entries(path: &str) -> io::Result<()> {
    match fs::read_dir(path)?.next() {
        Some(_) => Ok(()),
        None => Err(io::Error::from_raw_os_error(libc::ENODATA)),
    }
}

/// Of 1, the kernel writes no file and starts no program, not even the host's own to which dumps are piped.
pub(crate) fn core_dump() -> io::Result<()> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Core);
    if (limit.current, limit.maximum) == (Some(1), Some(1)) {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    } else {
        Ok(())
    }
}

pub(crate) fn cgroup_file(kind: &str, file: &str) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut refused = io::Error::from_raw_os_error(libc::ENOENT);
    for line in mounts.lines() {
        let mut fields = line.splitn(3, ' ');
        let (Some(target), Some(rest)) = (fields.nth(1), fields.next()) else {
            continue;
        };
        if rest.starts_with(kind) {
            match File::options().write(true).open(Path::new(target).join(file)) {
                Ok(_) => return Ok(()),
                Err(error) => refused = error,
            }
        }
    }
    Err(refused)
}

/// Whether the names of the host's groups are seen.
pub(crate) fn cgroup_paths() -> io::Result<()> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    if groups.lines().all(|line| line.ends_with(":/")) {
        Err(io::Error::from_raw_os_error(libc::ENODATA))
    } else {
        Ok(())
    }
}

/// Whether there are devices besides those that every container has.
pub(crate) fn device_nodes() -> io::Result<()> {
    const USUAL: [&str; 15] = [
        "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
        "tty", "urandom", "zero",
    ];
    for entry in fs::read_dir("/dev")? {
        if !USUAL
            .iter()
            .any(|name| entry.as_ref().is_ok_and(|entry| entry.file_name() == *name))
        {
            return Ok(());
        }
    }
    // Those that it has can be used.
    for name in ["null", "zero", "full", "random", "urandom"] {
        File::options()
            .read(true)
            .write(true)
            .open(format!("/dev/{name}"))
            .map_err(io::Error::other)?;
    }
    Err(io::Error::from_raw_os_error(libc::ENODATA))
}

pub(crate) fn mknod(dir: &str, kind: FileType, (major, minor): (u32, u32)) -> io::Result<()> {
    let device = rustix::fs::makedev(major, minor);
    Ok(rustix::fs::mknodat(
        CWD,
        variable(dir).join("escape"),
        kind,
        Mode::RUSR | Mode::WUSR,
        device,
    )?)
}

/// The number of one of the devices that share a major number.
pub(crate) fn misc_minor(name: &str) -> io::Result<u32> {
    let misc = before(fs::read_to_string("/proc/misc"))?;
    let minor = misc
        .lines()
        .find_map(|line| line.trim().strip_suffix(name)?.trim().parse().ok());
    minor.ok_or_else(|| io::Error::other("no such device"))
}

pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<()> {
    call(
        libc::SYS_socket,
        [family as usize, kind as usize, protocol as usize],
    )
    .map(drop)
}

/// A terminal of our own, ours to control.
pub(crate) fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let master = before(openpt(flags))?;
    before(grantpt(&master))?;
    before(unlockpt(&master))?;
    let slave = before(ioctl_tiocgptpeer(&master, flags))?;
    // It is hung up when we are done with it.
    // SAFETY: SIG_IGN installs no handler.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    // The job's program leads a session already.
    let _ = rustix::process::setsid();
    before(rustix::process::ioctl_tiocsctty(&slave))?;
    Ok((master, slave))
}

/// Types for somebody else at a terminal.
pub(crate) fn inject(request: usize) -> io::Result<()> {
    let (_master, slave) = terminal()?;
    call(
        libc::SYS_ioctl,
        [slave.as_raw_fd() as usize, request, pointer(b"x")],
    )
    .map(drop)
}
