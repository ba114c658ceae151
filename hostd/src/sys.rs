//! The few system calls that no crate offers in the form needed here. All but one of this crate's `unsafe` is in this
//! file.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;

/// Has the threads of this process share two heaps, where they would have eight for each CPU: each keeps what bursts have
/// taken from it. To be called before there are threads.
pub fn share_heaps() {
    // SAFETY: mallopt changes nothing but how memory is given out from now on. That it refuses does no harm.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

/// What [`clone`] comes to: like `fork`, it returns twice.
pub(crate) enum Cloned {
    /// In the new process.
    Child,
    /// In the caller: the child's pid and a pidfd of it.
    Parent {
        /// The child's pid, as the caller sees it.
        pid: i32,
        /// Readable once the child is dead.
        pidfd: OwnedFd,
    },
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Clones this process into new namespaces (`CLONE_NEW*` in `namespaces`), and into the v2 group whose directory `group` is.
///
/// Refused in a process with more than one thread: the child's copy of a lock that another thread holds would never
/// be released.
pub(crate) fn clone(namespaces: libc::c_int, group: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other(
            "a process with several threads must not be cloned without exec",
        ));
    }
    // SAFETY: this process has one thread only, seen just now, and no other one could have made more.
    unsafe { clone_into(namespaces, group) }
}

/// [`clone`] without the look at the number of threads, for where `/proc` is out of reach.
///
/// # Safety
///
/// The process must have one thread only.
pub(crate) unsafe fn clone_unchecked(namespaces: libc::c_int) -> io::Result<Cloned> {
    // SAFETY: this process has one thread only: that is what is asked of the caller.
    unsafe { clone_into(namespaces, None) }
}

/// The call itself: a child in new namespaces and, if one is given, in that v2 group.
///
/// # Safety
///
/// The process must have one thread only.
unsafe fn clone_into(namespaces: libc::c_int, group: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    /// `struct clone_args` up to `cgroup`, of Linux 5.7.
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    /// Not in libc for this type.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    let mut flags = u64::from((namespaces | libc::CLONE_PIDFD).cast_unsigned());
    if group.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let args = CloneArgs {
        flags,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        cgroup: group.map_or(0, |group| u64::from(group.as_raw_fd().cast_unsigned())),
        ..CloneArgs::default()
    };
    // SAFETY: the arguments live until the call returns and their size is given; without CLONE_VM and with no stack
    // of its own the child goes on with a copy of everything, as after fork.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: CLONE_PIDFD has stored a fresh descriptor, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent {
        pid: i32::try_from(pid).unwrap_or_default(),
        pidfd,
    })
}

/// Leaves the process at once, without destructors or exit handlers: the only way out of a cloned child.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit takes any status and does not return.
    unsafe { libc::_exit(status) }
}

/// Puts the process into a new network namespace.
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: CLONE_NEWNET changes which network is seen; no memory and no descriptor table is affected.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into()).map(drop)
}

/// Puts the process into a new user namespace, which is its effective user's.
pub(crate) fn unshare_users() -> io::Result<()> {
    // SAFETY: CLONE_NEWUSER changes who the process is; no memory and no descriptor table is affected.
    check(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into()).map(drop)
}

/// Gives this process, and its children, a copy of the mounts that it sees.
///
/// Refused in a process with more than one thread: the others would go on with the mounts that they had.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other(
            "a process with several threads has one view of mounts",
        ));
    }
    // SAFETY: CLONE_NEWNS changes which mounts are seen; no memory and no descriptor table is affected.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).map(drop)
}

/// Has this process, and its children, see its own cgroups as the roots of all hierarchies.
pub(crate) fn unshare_cgroups() -> io::Result<()> {
    // SAFETY: CLONE_NEWCGROUP changes which cgroups are seen; no memory and no descriptor table is affected.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into()).map(drop)
}

/// Brings the loopback device of the current network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives until the call returns.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into()).map(drop)
}

/// Sends a signal to a process by its pid. Only for children that have not been waited for.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Blocks every signal and gives a descriptor from which SIGCHLD and those that were sent to us can be read.
pub(crate) fn signal_fd() -> io::Result<OwnedFd> {
    // SAFETY: all-zero bytes are a valid sigset_t, and sigfillset initialises it whole.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set lives until the calls return.
    let fd = unsafe {
        libc::sigfillset(&raw mut set);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()).into())?;
        check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into())?
    };
    // SAFETY: signalfd has returned a fresh descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).unwrap_or(-1)) })
}

/// Reads and forgets what is queued in a [`signal_fd`].
pub(crate) fn drain(fd: BorrowedFd<'_>) {
    let mut buffer = [0_u8; 4096];
    while rustix::io::read(fd, &mut buffer).is_ok_and(|count| count > 0) {}
}

/// Unblocks every signal and resets those that may be ignored to their default action, for a program about to start.
pub(crate) fn reset_signals() {
    // SAFETY: the set is initialised by sigemptyset; SIG_DFL is valid for every signal (those that cannot be changed
    // are refused, which does not matter).
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

/// Ignores a signal in this process.
pub(crate) fn ignore_signal(signal: i32) {
    // SAFETY: SIG_IGN installs no handler.
    unsafe {
        libc::signal(signal, libc::SIG_IGN);
    }
}

/// Replaces the program. Returns only when that failed.
pub(crate) fn exec(program: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter()
            .map(|item| item.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: all strings end with a zero byte, both lists end with a null pointer, and all live until the call
    // returns.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Marks every descriptor from `first` on as closed by exec.
pub(crate) fn close_on_exec_from(first: u32) {
    // SAFETY: CLOSE_RANGE_CLOEXEC only sets a flag; what is open stays valid.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// Closes every descriptor but those in `keep`.
///
/// # Safety
///
/// Nothing in the process may use a descriptor outside `keep` afterwards; its owner must never be dropped.
pub(crate) unsafe fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 0_u32;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: the caller promises that nobody uses what is closed here.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
}

/// Sets attributes of the mount at the top of `mount` (`MOUNT_ATTR_*`).
pub(crate) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: u64,
    recursive: bool,
) -> io::Result<()> {
    change_mount(
        mount,
        libc::mount_attr {
            attr_set: attributes,
            attr_clr: 0,
            propagation: 0,
            userns_fd: 0,
        },
        recursive,
    )
}

/// Has the detached mount `mount` show the ids in it as those of a user namespace.
pub(crate) fn map_mount_ids(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<()> {
    change_mount(
        mount,
        libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::try_from(namespace.as_raw_fd()).unwrap_or_default(),
        },
        false,
    )
}

fn change_mount(mount: BorrowedFd<'_>, attr: libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty string, the attributes live until the call returns and their size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// Has files that this process makes belong to this user and group; it is asked by them for its rights at files, too.
pub(crate) fn set_file_owner(id: u32) -> io::Result<()> {
    // SAFETY: these take numbers and change only who this thread is. They give what was there before, also when they
    // fail: a second call tells what is there now.
    let now = unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
        (libc::setfsgid(id), libc::setfsuid(id))
    };
    if now == (id.cast_signed(), id.cast_signed()) {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// Makes a loop device of `file` which goes away with its last user. Gives the open device and its path.
pub(crate) fn loop_device(file: &File, writable: bool) -> io::Result<(File, String)> {
    #[repr(C)]
    struct LoopInfo64 {
        device: u64,
        inode: u64,
        rdevice: u64,
        offset: u64,
        sizelimit: u64,
        number: u32,
        encrypt_type: u32,
        encrypt_key_size: u32,
        flags: u32,
        file_name: [u8; 64],
        crypt_name: [u8; 64],
        encrypt_key: [u8; 32],
        init: [u64; 2],
    }
    #[repr(C)]
    struct LoopConfig {
        fd: u32,
        block_size: u32,
        info: LoopInfo64,
        reserved: [u64; 8],
    }
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    // Another process may take the free device between the two calls: then the next one is tried.
    for _ in 0..64 {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) }.into())?;
        let path = format!("/dev/loop{number}");
        let open = || File::options().read(true).write(writable).open(&path);
        let device = match open() {
            Ok(device) => device,
            // Without a devtmpfs nobody makes the node of a new device.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_block_node(&path, 7, u32::try_from(number).unwrap_or_default())?;
                open()?
            }
            Err(error) => return Err(error),
        };
        // SAFETY: all-zero bytes are a valid loop_config.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = u32::try_from(file.as_raw_fd()).unwrap_or_default();
        let read_only = if writable { 0 } else { LO_FLAGS_READ_ONLY };
        config.info.flags = read_only | LO_FLAGS_AUTOCLEAR;
        // SAFETY: LOOP_CONFIGURE reads a loop_config, which lives until the call returns.
        match check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }.into()) {
            Ok(_) => return Ok((device, path)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("no free loop device in 64 attempts"))
}

/// Has a loop device be as large as its file is now.
pub(crate) fn fit_loop_device(device: &File) -> io::Result<()> {
    // SAFETY: LOOP_SET_CAPACITY takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY, 0) }.into()).map(drop)
}

/// The id of the btrfs subvolume that an open file or directory is in.
pub(crate) fn subvolume_id(within: &File) -> io::Result<u64> {
    /// `struct btrfs_ioctl_ino_lookup_args`.
    #[repr(C)]
    struct Lookup {
        tree: u64,
        object: u64,
        name: [u8; 4080],
    }
    const BTRFS_IOC_INO_LOOKUP: libc::c_ulong = 0xd000_9412;
    // Of the root of a tree, whose number is always this, nothing but the tree is found.
    let mut lookup = Lookup {
        tree: 0,
        object: 256,
        name: [0; 4080],
    };
    // SAFETY: the call reads and writes one such structure, which lives until it returns.
    check(unsafe { libc::ioctl(within.as_raw_fd(), BTRFS_IOC_INO_LOOKUP, &raw mut lookup) }.into())?;
    Ok(lookup.tree)
}

fn make_block_node(path: &str, major: u32, minor: u32) -> io::Result<()> {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    Ok(mknodat(
        CWD,
        path,
        FileType::BlockDevice,
        Mode::RUSR | Mode::WUSR,
        makedev(major, minor),
    )?)
}

/// A descriptor's `/proc/self/fd` path, for calls that take paths only.
pub(crate) fn fd_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// A descriptor under the runtime's watch.
pub(crate) type Polled = AsyncFd<Arc<OwnedFd>>;

/// Puts a descriptor under the runtime's watch, and makes it non-blocking.
pub(crate) fn polled(fd: OwnedFd) -> io::Result<Polled> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: the descriptor is owned by what is registered, stays the same and stays open for as long.
    Ok(unsafe { AsyncFd::register(Arc::new(fd)) }?)
}

/// Bytes of a TCP connection that the other host has not acknowledged. None once the connection is over.
pub(crate) fn tcp_unacknowledged(socket: impl AsFd) -> io::Result<Option<u64>> {
    const ESTABLISHED: u8 = 1;
    const CLOSE_WAIT: u8 = 8;
    let fd = socket.as_fd().as_raw_fd();
    let mut waiting: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, writes one integer, which lives until the call returns.
    check(unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut waiting) }.into())?;
    // The first byte of a tcp_info is the state. It is asked for last: what is over says that nothing waits.
    let mut info = [0_u8; 8];
    let mut length = libc::socklen_t::try_from(info.len()).map_err(io::Error::other)?;
    // SAFETY: at most as many bytes are written as there are, and both live until the call returns.
    let result = unsafe {
        let info = (&raw mut info).cast();
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info, &raw mut length)
    };
    check(result.into())?;
    let up = matches!(info[0], ESTABLISHED | CLOSE_WAIT);
    Ok(u64::try_from(waiting).ok().filter(|_| up))
}

/// Sends a frame as it is from the interface with this index.
pub(crate) fn send_frame(index: u32, frame: &[u8]) -> io::Result<()> {
    let family = libc::AF_PACKET;
    // Nothing is received: for that it would have to have a protocol.
    // SAFETY: a plain system call.
    let socket = check(unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) }.into())?;
    let socket = i32::try_from(socket).map_err(io::Error::other)?;
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: integers, for which zeros are values.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = u16::try_from(family).map_err(io::Error::other)?;
    to.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    let length = libc::socklen_t::try_from(size_of_val(&to)).map_err(io::Error::other)?;
    // SAFETY: pointers to a frame and an address that outlive the call, with their lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            length,
        )
    };
    check(i64::try_from(sent).map_err(io::Error::other)?).map(drop)
}

/// Whether the kernel was told of late, by whoever sets the clock, that it is right.
pub(crate) fn clock_is_set() -> io::Result<bool> {
    // SAFETY: all-zero bytes are a valid timex, by which nothing is changed.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: adjtimex fills a timex, which lives until the call returns.
    let state = check(unsafe { libc::adjtimex(&raw mut timex) }.into())?;
    Ok(state != libc::c_long::from(libc::TIME_ERROR))
}
