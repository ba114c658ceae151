//! Another program in a container that runs, with the job's environment, user, capabilities and filters: a clone of the
//! supervisor enters the container's namespaces and starts the program, which then is a child of nobody inside.
//!
//! Not by the container's init: that has given up every right by which it could.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, WaitId, WaitIdOptions, waitid};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use tokio::time::timeout;

use super::init::{self, Attempt, Failure, Watched};
use super::{
    EXITED, FAILED, GO, Pipes, Place, RUNNING, Stdio, process, rootfs, seccomp, send, user_namespace,
};
use crate::launch::Launch;
use crate::sys::{self, Cloned, Polled, polled};

/// How long the clone may take to leave.
const GRACE: Duration = Duration::from_secs(2);

/// A program beside the job's own. Whoever drops this ends it.
#[derive(Debug)]
pub struct Execution {
    /// The pid of the clone outside.
    pub pid: i32,
    /// Our ends of its pipes; none with a terminal.
    pub pipes: Option<Pipes>,
    /// The way to the clone, which says what a container's init does.
    keeper: Polled,
    pidfd: Option<OwnedFd>,
}

impl Execution {
    /// Clones the one that starts the program. It does nothing until it is told to [`go`](Self::go), so that it can be
    /// put into cgroups first. Program, terminal and standard input are as `launch` has them; `init` is a pidfd of the
    /// container's init. The program is killed after `patience`.
    pub fn create(
        launch: &Launch,
        place: &Place,
        init: BorrowedFd<'_>,
        patience: Option<Duration>,
    ) -> io::Result<Self> {
        let (keeper, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let (pipes, stdio) = if launch.tty {
            (None, None)
        } else {
            let (ours, stdio) = super::pipes(launch)?;
            (Some(ours), Some(stdio))
        };
        match sys::clone(0, None)? {
            Cloned::Child => run(launch, place, init, &theirs, stdio.as_ref(), patience),
            Cloned::Parent { pid, pidfd } => Ok(Self {
                pid,
                pipes,
                keeper: polled(keeper)?,
                pidfd: Some(pidfd),
            }),
        }
    }

    /// Lets the program begin.
    pub fn go(&self) -> io::Result<()> {
        send(self.keeper.get_ref(), GO, &[])
    }

    /// By which [`super::receive`] hears of it.
    pub fn keeper(&self) -> &Polled {
        &self.keeper
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        // The clone sees the end of its socket, kills the program and leaves.
        let _ = rustix::net::shutdown(self.keeper.get_ref(), rustix::net::Shutdown::Both);
        let Some(pidfd) = self.pidfd.take() else { return };
        tokio::spawn(async move {
            let Ok(pidfd) = polled(pidfd) else { return };
            if timeout(GRACE, pidfd.readable()).await.is_err() {
                // It waits for something of the container's.
                let _ = rustix::process::pidfd_send_signal(pidfd.get_ref().as_fd(), Signal::KILL);
                let _ = pidfd.readable().await;
            }
            let _ = waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), WaitIdOptions::EXITED);
        });
    }
}

fn run(
    launch: &Launch,
    place: &Place,
    init: BorrowedFd<'_>,
    socket: &OwnedFd,
    stdio: Option<&Stdio>,
    patience: Option<Duration>,
) -> ! {
    let _ = match live(launch, place, init, socket, stdio, patience) {
        Ok(status) => send(socket, EXITED, &status.to_be_bytes()),
        Err(failure) => send(socket, FAILED, failure.as_bytes()),
    };
    sys::exit_now(0)
}

fn live(
    launch: &Launch,
    place: &Place,
    init: BorrowedFd<'_>,
    socket: &OwnedFd,
    stdio: Option<&Stdio>,
    patience: Option<Duration>,
) -> Result<i32, Failure> {
    // In the container's sight there is a copy of the supervisor until the program takes its place.
    init::bind_to_supervisor()?;
    let mut keep = vec![0, 1, 2, socket.as_raw_fd(), init.as_raw_fd()];
    keep.extend(stdio.into_iter().flat_map(Stdio::descriptors));
    // SAFETY: this fork never touches anything of the supervisor's but what is kept, and leaves without destructors.
    unsafe { sys::close_all_but(&keep) };

    let mut packet = [0; 8];
    let received =
        rustix::net::recv(socket, &mut packet, RecvFlags::empty()).attempt("hear from the supervisor")?;
    if received.0 == 0 || packet[0] != GO {
        sys::exit_now(125);
    }
    let mut namespaces = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
    if !launch.host_pid_namespace {
        namespaces |= ThreadNameSpaceType::PROCESS_ID;
    }
    if launch.first_id().is_some() {
        namespaces |= ThreadNameSpaceType::USER;
    }
    process::raise_file_limit(launch);
    init::confine(launch)?;
    move_into_thread_name_spaces(init, namespaces).attempt("enter the container")?;
    if launch.first_id().is_some() {
        user_namespace::become_root().attempt("enter the user namespace")?;
        init::bind_to_supervisor()?;
    }
    let env = rootfs::environment(launch, place);
    let terminal = if launch.tty {
        Some(init::open_terminal(launch, socket)?)
    } else {
        None
    };
    let filters = seccomp::Filters::new(launch.capabilities).attempt("make the system call filter")?;
    let (error_read, error_write) = pipe_with(PipeFlags::CLOEXEC).attempt("make a pipe")?;
    let signals = sys::signal_fd().attempt("block signals")?;
    let deadline = patience.map(|patience| Instant::now() + patience);
    // SAFETY: a fork of a process with one thread has one, and has started none.
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
    let ended = init::watch(socket, &signals, program, deadline)?;
    if let Watched::Ended(status) = ended {
        return Ok(status);
    }
    // It leads a session: what it has started goes with it, unless it took care not to.
    let _ = sys::kill(-program, libc::SIGKILL);
    match ended {
        Watched::Late => Err(format!(
            "it took longer than {} ms",
            patience.unwrap_or_default().as_millis()
        )),
        _ => sys::exit_now(125),
    }
}
