//! Another program in a container that runs, with the job's environment, user, capabilities and filters: a clone of the
//! supervisor enters the container's namespaces and starts the program, which then is a child of nobody inside.
//!
//! Not by the container's init: that has given up every right by which it could.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    DumpableBehavior, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid,
};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::init::{Attempt, Failure};
use super::{EXITED, FAILED, GO, Place, Stdio, process, rootfs, send};
use crate::launch::Launch;
use crate::sys::{self, Cloned};

/// A program beside the job's own, which waits for [`Execution::go`]. Ends with this value.
#[derive(Debug)]
pub struct Execution {
    /// The pid of the clone outside.
    pub pid: i32,
    pidfd: OwnedFd,
    socket: OwnedFd,
    output: OwnedFd,
}

impl Execution {
    /// Clones the one that starts the program. It does nothing until it is told to [`go`](Self::go), so that it can be
    /// put into cgroups first. `init` is a pidfd of the container's init; the program is killed after `patience`.
    pub fn create(
        launch: &Launch,
        place: &Place,
        init: BorrowedFd<'_>,
        args: &[String],
        patience: Duration,
    ) -> io::Result<Self> {
        let launch = Launch {
            args: args.to_vec(),
            tty: false,
            stdin: false,
            ..launch.clone()
        };
        let (socket, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let (output, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let stdio = Stdio {
            stdin: None,
            stderr: stdout.try_clone()?,
            stdout,
        };
        match sys::clone(0)? {
            Cloned::Child => run(&launch, place, init, &theirs, &stdio, patience),
            Cloned::Parent { pid, pidfd } => Ok(Self {
                pid,
                pidfd,
                socket,
                output,
            }),
        }
    }

    /// Lets the program begin. What it is heard by: the word of how it ended, and what it says until then.
    pub fn go(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        send(&self.socket, GO, &[])?;
        Ok((self.socket.try_clone()?, self.output.try_clone()?))
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        // One that is over already is what is wanted.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

fn run(
    launch: &Launch,
    place: &Place,
    init: BorrowedFd<'_>,
    socket: &OwnedFd,
    stdio: &Stdio,
    patience: Duration,
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
    stdio: &Stdio,
    patience: Duration,
) -> Result<i32, Failure> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .attempt("bind a program to its supervisor")?;
    // In the container's sight there is a copy of the supervisor until the program takes its place.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .attempt("hide from the container")?;
    let keep = [
        0,
        1,
        2,
        socket.as_raw_fd(),
        init.as_raw_fd(),
        stdio.stdout.as_raw_fd(),
        stdio.stderr.as_raw_fd(),
    ];
    // SAFETY: this fork never touches anything of the supervisor's but what is kept, and leaves without destructors.
    unsafe { sys::close_all_but(&keep) };

    let mut packet = [0; 8];
    let received =
        rustix::net::recv(socket, &mut packet, RecvFlags::empty()).attempt("hear from the supervisor")?;
    if received.0 == 0 || packet[0] != GO {
        sys::exit_now(125);
    }
    let mut namespaces = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
    if !launch.host_pid_namespace {
        namespaces |= ThreadNameSpaceType::PROCESS_ID;
    }
    move_into_thread_name_spaces(init, namespaces).attempt("enter the container")?;
    let env = rootfs::environment(launch, place);
    let (error_read, error_write) = pipe_with(PipeFlags::CLOEXEC).attempt("make a pipe")?;
    // SAFETY: a fork of a process with one thread has one, and has started none.
    let (program, pidfd) = match unsafe { sys::clone_unchecked(0) }.attempt("fork")? {
        Cloned::Child => process::run(launch, &env, Some(stdio), None, &error_write),
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    drop(error_write);
    let mut failure = String::new();
    let _ = io::Read::take(std::fs::File::from(error_read), 1024).read_to_string(&mut failure);
    if !failure.is_empty() {
        return Err(failure);
    }
    let patience = Timespec::try_from(patience).attempt("wait for so long")?;
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)).attempt("wait")?;
    if ended == 0 {
        // It leads a session: what it has started goes with it, unless it took care not to.
        let _ = sys::kill(-program, libc::SIGKILL);
        return Err(format!(
            "it took longer than {} ms",
            patience.tv_sec * 1000 + patience.tv_nsec / 1_000_000
        ));
    }
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).attempt("see how it ended")?;
    Ok(status.as_ref().map_or(255, exit_status))
}

/// The shell's convention.
fn exit_status(status: &WaitIdStatus) -> i32 {
    status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
        .unwrap_or(255)
}
