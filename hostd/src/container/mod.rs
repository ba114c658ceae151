//! Making a container: a clone of the supervisor in namespaces of its own becomes the container's init, which sets up
//! the root file system, starts the program as its only child, and stays.
//!
//! This is done with our own few calls rather than a library: what one container needs is some forty system calls in a
//! known order, measured at a tenth of the time that the general runtimes take, and nothing in between has threads or
//! a daemon of its own that could hang. Init is not executed anew but a fork: it stays undumpable, so nothing in the
//! container can reach its program file through `/proc/1/exe`.

mod exec;
mod init;
mod own_layer;
mod process;
mod rootfs;
mod seccomp;
mod user_namespace;

use std::io;
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid};

pub use exec::Execution;
pub use own_layer::OwnLayer;
pub use user_namespace::{IDS, UserNamespace, mapped_tree, probe};

use crate::launch::Launch;
use crate::sys::{self, Cloned};

/// The container's place in the network, known once the supervisor is told to go.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Place {
    /// Its own address; none in the host's network.
    pub address: Option<Ipv4Addr>,
    /// The host's gateway address: DNS and discoverd. None before the host has a network.
    pub gateway: Option<Ipv4Addr>,
}

/// What init has to say. Each is one packet: a byte of kind, then its payload.
#[derive(Debug)]
pub enum FromInit {
    /// The terminal's master side; before `Running`.
    Terminal(OwnedFd),
    /// The program runs.
    Running,
    /// It could not be started: why.
    Failed(String),
    /// It has ended.
    Exited(i32),
}

const GO: u8 = b'g';
const PLACE: u8 = b'p';
const SIGNAL: u8 = b's';
const TERMINAL: u8 = b't';
const RUNNING: u8 = b'r';
const FAILED: u8 = b'f';
const EXITED: u8 = b'x';

/// The longest packet: an error message.
const PACKET: usize = 2048;

/// A container whose init waits for [`Container::go`], and then for its [`Container::place`].
#[derive(Debug)]
pub struct Container {
    /// Init's pid.
    pub pid: i32,
    /// Readable once init, and with it everything in the container, is dead.
    pub pidfd: OwnedFd,
    /// The way to init.
    pub init: OwnedFd,
    /// Our ends of the program's pipes; none with a terminal.
    pub pipes: Option<Pipes>,
}

/// Our ends of a program's standard streams.
#[derive(Debug)]
pub struct Pipes {
    /// Standard input, if it is to stay open.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// The program's ends.
struct Stdio {
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Stdio {
    fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let all = [Some(&self.stdout), Some(&self.stderr), self.stdin.as_ref()];
        all.into_iter().flatten().map(AsRawFd::as_raw_fd)
    }
}

impl Container {
    /// Clones init, into `group` if one is given. Once it is told to [`go`](Self::go) it makes all that does not depend on
    /// where the container is; before it is told that, it has to be in its cgroups. `own` is what it writes to, and `users` the
    /// container's user namespace, unless it is the host's.
    pub fn create(
        launch: &Launch,
        job_dir: &Path,
        own: &OwnLayer,
        users: Option<&UserNamespace>,
        group: Option<BorrowedFd<'_>>,
    ) -> io::Result<Self> {
        let (init, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let (pipes, stdio) = if launch.tty {
            (None, None)
        } else {
            let (ours, stdio) = pipes(launch)?;
            (Some(ours), Some(stdio))
        };
        let mut namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        if !launch.host_pid_namespace {
            namespaces |= libc::CLONE_NEWPID;
        }
        match sys::clone(namespaces, group)? {
            Cloned::Child => {
                let around = init::Around {
                    launch,
                    job_dir,
                    own,
                    users,
                };
                init::run(&around, &theirs, stdio.as_ref())
            }
            Cloned::Parent { pid, pidfd } => Ok(Self {
                pid,
                pidfd,
                init,
                pipes,
            }),
        }
    }

    /// Lets init begin.
    pub fn go(&self) -> io::Result<()> {
        send(&self.init, GO, &[])
    }

    /// Tells init where the container is, and so to start the program: it is in its cgroups.
    pub fn place(&self, place: &Place) -> io::Result<()> {
        send(&self.init, PLACE, &serde_json::to_vec(place)?)
    }
}

/// Asks init to send a signal to the program.
pub fn signal(init: impl AsFd, signal: i32) -> io::Result<()> {
    send(init, SIGNAL, &signal.to_be_bytes())
}

fn pipes(launch: &Launch) -> io::Result<(Pipes, Stdio)> {
    let pipe = || -> io::Result<_> {
        let ends = pipe_with(PipeFlags::CLOEXEC)?;
        // Who is root inside hands them on to the program's user.
        if let Some(first) = launch.first_id() {
            let (uid, gid) = (Uid::from_raw(first), Gid::from_raw(first));
            rustix::fs::fchown(&ends.0, Some(uid), Some(gid))?;
        }
        Ok(ends)
    };
    let (stdout, their_stdout) = pipe()?;
    let (stderr, their_stderr) = pipe()?;
    let (their_stdin, stdin) = if launch.stdin {
        pipe().map(|(read, write)| (Some(read), Some(write)))?
    } else {
        (None, None)
    };
    Ok((
        Pipes {
            stdin,
            stdout,
            stderr,
        },
        Stdio {
            stdin: their_stdin,
            stdout: their_stdout,
            stderr: their_stderr,
        },
    ))
}

fn send(socket: impl AsFd, kind: u8, payload: &[u8]) -> io::Result<()> {
    let packet: Vec<u8> = [&[kind], payload].concat();
    rustix::net::send(socket, &packet[..packet.len().min(PACKET)], SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next word from init; none once it is dead.
pub fn receive(socket: impl AsFd) -> io::Result<Option<FromInit>> {
    let mut packet = [0; PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slice = [io::IoSliceMut::new(&mut packet)];
    let length = loop {
        match rustix::net::recvmsg(&socket, &mut slice, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            // It died with a packet of ours unread. The kernel says so once, before what it has said last.
            Err(Errno::CONNRESET) => {}
            received => break received?.bytes,
        }
    };
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let Some((kind, payload)) = packet[..length].split_first() else {
        return Ok(None);
    };
    let message = match (*kind, fd) {
        (TERMINAL, Some(fd)) => FromInit::Terminal(fd),
        (RUNNING, _) => FromInit::Running,
        (EXITED, _) => FromInit::Exited(payload.try_into().map_or(255, i32::from_be_bytes)),
        (FAILED, _) => FromInit::Failed(String::from_utf8_lossy(payload).into_owned()),
        _ => return Err(io::Error::other("init said something unknown")),
    };
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_dies_with_a_packet_unread_has_its_last_words_heard() -> io::Result<()> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        send(&ours, PLACE, b"{}")?;
        send(&theirs, FAILED, b"why")?;
        drop(theirs);
        assert!(matches!(receive(&ours)?, Some(FromInit::Failed(why)) if why == "why"));
        assert!(receive(&ours)?.is_none());
        Ok(())
    }
}
