//! The container's init: pid 1. It runs in a fork of the supervisor, uses none of its descriptors but those handed to
//! it, and leaves only through [`sys::exit_now`].

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{DumpableBehavior, Pid, Signal, WaitOptions, WaitStatus};
use rustix::pty::OpenptFlags;

use super::{
    EXITED, FAILED, GO, OwnLayer, PACKET, PLACE, Place, RUNNING, SIGNAL, Stdio, TERMINAL, UserNamespace,
    process, rootfs, seccomp, send,
};
use crate::apparmor;
use crate::launch::Launch;
use crate::sys::{self, Cloned};

/// What went wrong, for the job's owner.
pub(super) type Failure = String;

/// Puts what was attempted before an error.
pub(super) trait Attempt<T> {
    /// `what` reads after "cannot".
    fn attempt(self, what: impl std::fmt::Display) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Display> Attempt<T> for Result<T, E> {
    fn attempt(self, what: impl std::fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| format!("cannot {what}: {error}"))
    }
}

/// What init makes the container of.
pub(super) struct Around<'a> {
    pub(super) launch: &'a Launch,
    pub(super) job_dir: &'a Path,
    pub(super) own: &'a OwnLayer,
    /// None for the host's.
    pub(super) users: Option<&'a UserNamespace>,
}

/// Runs init to its end.
pub(super) fn run(around: &Around<'_>, socket: &OwnedFd, stdio: Option<&Stdio>) -> ! {
    let status = match live(around, socket, stdio) {
        Ok(status) => {
            let _ = send(socket, EXITED, &status.to_be_bytes());
            status
        }
        Err(failure) => {
            let _ = send(socket, FAILED, failure.as_bytes());
            125
        }
    };
    sys::exit_now(status & 0xff)
}

/// Has this process die with its supervisor, and hides it from the container. To be done anew after each change of who it
/// is: then the kernel forgets both.
pub(super) fn bind_to_supervisor() -> Result<(), Failure> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).attempt("bind to the supervisor")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).attempt("hide from the container")
}

fn live(around: &Around<'_>, socket: &OwnedFd, stdio: Option<&Stdio>) -> Result<i32, Failure> {
    let launch = around.launch;
    // If the supervisor dies, nobody holds the pipes or knows of us: the container goes with it.
    bind_to_supervisor()?;
    let mut keep = vec![0, 1, 2, socket.as_raw_fd()];
    keep.extend(stdio.into_iter().flat_map(Stdio::descriptors));
    keep.extend(around.users.map(UserNamespace::as_raw));
    keep.extend(around.own.as_raw());
    // SAFETY: this fork never touches anything of the supervisor's but what is kept, and leaves without destructors.
    unsafe { sys::close_all_but(&keep) };

    // None means that the supervisor died before the death signal was set.
    let mut packet = [0; 8];
    let received =
        rustix::net::recv(socket, &mut packet, RecvFlags::empty()).attempt("hear from the supervisor")?;
    if received.0 == 0 || packet[0] != GO {
        sys::exit_now(125);
    }
    if launch.host_pid_namespace {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).attempt("become the reaper")?;
    }
    let hosts_resolver = rootfs::set_up(around)?;
    let filters = seccomp::Filters::new(launch.capabilities).attempt("make the system call filter")?;
    let place = hear_place(socket)?;
    sys::unshare_cgroups().attempt("hide the host's cgroups")?;
    let env = rootfs::settle(launch, &place, &hosts_resolver)?;
    process::raise_file_limit(launch);
    confine(launch)?;
    if let Some(users) = around.users {
        users.enter().attempt("enter the user namespace")?;
        bind_to_supervisor()?;
    }
    let terminal = if launch.tty {
        Some(open_terminal(launch, socket)?)
    } else {
        None
    };
    let (error_read, error_write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).attempt("make a pipe")?;
    let signals = sys::signal_fd().attempt("block signals")?;
    // SAFETY: init is a fork with one thread and starts none.
    let program = match unsafe { sys::clone_unchecked(0) }.attempt("fork")? {
        Cloned::Child => process::run(launch, &env, stdio, terminal.as_ref(), &error_write, &filters),
        Cloned::Parent { pid, .. } => pid,
    };
    drop((terminal, error_write));
    let mut failure = String::new();
    let _ = io::Read::take(std::fs::File::from(error_read), 1024).read_to_string(&mut failure);
    if !failure.is_empty() {
        return Err(failure);
    }
    send(socket, RUNNING, &[]).attempt("report")?;
    // From here on init only forwards signals.
    process::keep_only_kill().attempt("drop capabilities")?;
    match watch(socket, &signals, program, None)? {
        Watched::Ended(status) => Ok(status),
        // The supervisor is gone; the death signal is on its way.
        Watched::Alone | Watched::Late => sys::exit_now(125),
    }
}

/// Has AppArmor confine the program, if it is to: what a fork of this process starts. To be done in the host's user namespace:
/// in another one the kernel may leave it less than the profile does.
pub(super) fn confine(launch: &Launch) -> Result<(), Failure> {
    if !launch.apparmor {
        return Ok(());
    }
    let what = "have AppArmor confine it";
    apparmor::confine_next_program().attempt(what)
}

/// Waits until the supervisor says where the container is. Before, init may not be in its cgroups.
fn hear_place(socket: &OwnedFd) -> Result<Place, Failure> {
    let mut packet = [0; PACKET];
    let (_, length) =
        rustix::net::recv(socket, &mut packet, RecvFlags::empty()).attempt("hear from the supervisor")?;
    match packet[..length].split_first() {
        Some((&PLACE, place)) => serde_json::from_slice(place).attempt("read the container's place"),
        // The supervisor is gone, or wants no container any more.
        _ => sys::exit_now(125),
    }
}

/// Makes a terminal in the container's own devpts and hands its master side to the supervisor.
pub(super) fn open_terminal(launch: &Launch, socket: &OwnedFd) -> Result<OwnedFd, Failure> {
    let master = rustix::fs::open(
        "/dev/pts/ptmx",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .attempt("open a terminal")?;
    rustix::pty::unlockpt(&master).attempt("unlock the terminal")?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .attempt("open the terminal's other side")?;
    if let Some(size) = launch.tty_size {
        let size = rustix::termios::Winsize {
            ws_row: size.lines,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size).attempt("size the terminal")?;
    }
    let fds = [master.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&[TERMINAL])],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .attempt("hand the terminal over")?;
    Ok(slave)
}

/// Why nobody watches any more.
pub(super) enum Watched {
    /// The program has ended, with this status.
    Ended(i32),
    /// The supervisor is gone, or wants no more.
    Alone,
    /// It is past the deadline.
    Late,
}

/// Forwards signals and reaps until the program has ended.
pub(super) fn watch(
    socket: &OwnedFd,
    signals: &OwnedFd,
    program: i32,
    deadline: Option<Instant>,
) -> Result<Watched, Failure> {
    loop {
        // Before the wait, so that a child which died before signals were watched is seen as well.
        while let Some((pid, status)) = reap() {
            if pid.as_raw_nonzero().get() == program {
                return Ok(Watched::Ended(exit_status(status)));
            }
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().attempt("wait")?;
        let mut fds = [
            PollFd::new(socket, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        match poll(&mut fds, left.as_ref()) {
            Ok(0) => return Ok(Watched::Late),
            Err(rustix::io::Errno::INTR) | Ok(_) => {}
            Err(error) => return Err(error).attempt("wait"),
        }
        let (from_supervisor, from_kernel) = (fds[0].revents(), fds[1].revents());
        if !from_kernel.is_empty() {
            sys::drain(signals.as_fd());
        }
        if !from_supervisor.is_empty() {
            let mut packet = [0; 8];
            match rustix::net::recv(socket, &mut packet, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Ok(Watched::Alone),
                Ok((_, 5)) if packet[0] == SIGNAL => {
                    let signal = i32::from_be_bytes([packet[1], packet[2], packet[3], packet[4]]);
                    let _ = sys::kill(program, signal);
                }
                _ => {}
            }
        }
    }
}

fn reap() -> Option<(Pid, WaitStatus)> {
    rustix::process::wait(WaitOptions::NOHANG).ok().flatten()
}

/// The shell's convention.
fn exit_status(status: WaitStatus) -> i32 {
    status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
        .unwrap_or(255)
}
