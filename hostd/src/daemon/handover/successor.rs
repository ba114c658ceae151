//! The program that is to go on with this daemon's work.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::{Channel, FromPredecessor, FromSuccessor, PROTOCOL, Sockets};

/// How long it may take to say what it is.
const HELLO: Duration = Duration::from_secs(10);

/// How long it may take to read what is there.
const PREPARE: Duration = Duration::from_secs(30);

/// How long it may take to serve. Clients wait meanwhile.
const SERVE: Duration = Duration::from_secs(20);

/// How long it may take to end that has closed its socket.
const END: Duration = Duration::from_secs(2);

/// Attempts to start a program that somebody has just written.
const BUSY: u32 = 50;

/// Why it does not take over, in words.
type Failure = String;

/// A program that was started to take over. It is killed unless it does.
#[derive(Debug)]
pub(in crate::daemon) struct Successor {
    /// Until it serves.
    child: Option<Child>,
    channel: Channel,
    /// What it says that it is.
    pub(in crate::daemon) version: String,
}

impl Successor {
    /// Starts the program, and waits until it could take over. It has changed nothing by then.
    pub(in crate::daemon) async fn prepare(
        program: &Path,
        state: &Path,
        sockets: &Sockets,
    ) -> Result<Self, Failure> {
        let mut successor = Self::start(program, state).await?;
        match successor.hear(HELLO, "say what it is").await? {
            FromSuccessor::Hello {
                handover: PROTOCOL,
                version,
            } => successor.version = version,
            FromSuccessor::Hello { handover, version } => {
                return Err(format!(
                    "flynn-host {version} hands work over by protocol {handover}, this one ({}) by {PROTOCOL}: stop this \
                     daemon and start that one; jobs go on meanwhile",
                    env!("CARGO_PKG_VERSION")
                ));
            }
            other => return Err(unexpected(&other)),
        }
        let offered = sockets.describe(|descriptors, given| {
            let given: io::Result<Vec<_>> = given.iter().map(BorrowedFd::try_clone_to_owned).collect();
            (descriptors, given)
        });
        let offer = FromPredecessor::Offer {
            version: env!("CARGO_PKG_VERSION").into(),
            descriptors: offered.0,
        };
        let given = offered
            .1
            .map_err(|error| format!("cannot hand the sockets over: {error}"))?;
        let given: Vec<_> = given.iter().map(std::os::fd::AsFd::as_fd).collect();
        successor.say(&offer, &given).await?;
        match successor.hear(PREPARE, "read what is here").await? {
            FromSuccessor::Prepared => Ok(successor),
            other => Err(unexpected(&other)),
        }
    }

    async fn start(program: &Path, state: &Path) -> Result<Self, Failure> {
        let failed = |error: &io::Error| match error.kind() {
            io::ErrorKind::PermissionDenied => format!(
                "{} cannot be executed: make it executable (chmod +x), on a file system that is not mounted noexec",
                program.display()
            ),
            _ if error.raw_os_error() == Some(libc::ENOEXEC) => {
                format!("{} is no program for this machine", program.display())
            }
            _ => format!("{} cannot be started: {error}", program.display()),
        };
        if is_for_another_machine(program) {
            return Err(failed(&io::Error::from_raw_os_error(libc::ENOEXEC)));
        }
        let mut attempts = 0;
        loop {
            let flags = SocketFlags::CLOEXEC;
            let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
            let (ours, theirs) = pair.map_err(|error| failed(&error.into()))?;
            let spawned = Command::new(program)
                .arg("daemon")
                .arg("--takeover")
                .arg("--state")
                .arg(state)
                .current_dir("/")
                .stdin(theirs)
                .spawn();
            match spawned {
                Ok(child) => {
                    return Ok(Self {
                        child: Some(child),
                        channel: Channel::new(ours).map_err(|error| failed(&error))?,
                        version: String::new(),
                    });
                }
                // A supervisor that is just being started has the descriptor by which the file was written.
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && attempts < BUSY => {
                    attempts += 1;
                    sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(failed(&error)),
            }
        }
    }

    /// This daemon acts no more: has the other one begin. When that fails, it is dead for sure.
    pub(in crate::daemon) async fn commit(mut self) -> Result<Child, Failure> {
        let heard = match self.say(&FromPredecessor::Commit, &[]).await {
            Ok(()) => self.hear(SERVE, "serve").await,
            Err(error) => Err(error),
        };
        let why = match (heard, self.child.take()) {
            (Ok(FromSuccessor::Serving), Some(child)) => return Ok(child),
            (heard, child) => {
                self.child = child;
                heard.map_or_else(|why| why, |other| unexpected(&other))
            }
        };
        if let Some(child) = &mut self.child
            && let Err(error) = child.kill().await
        {
            tracing::error!(%error, "a program that failed to take over cannot be killed");
        }
        Err(why)
    }

    async fn say(&self, message: &FromPredecessor, given: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        let said = self.channel.send(message, given).await;
        said.map_err(|error| format!("the new program does not listen: {error}"))
    }

    async fn hear(&mut self, patience: Duration, what: &str) -> Result<FromSuccessor, Failure> {
        match timeout(patience, self.channel.receive()).await {
            Ok(Ok(Some((FromSuccessor::Failed { why }, _)))) => {
                Err(format!("the new program cannot take over: {why}"))
            }
            Ok(Ok(Some((message, _)))) => Ok(message),
            Ok(Ok(None)) => Err(format!(
                "the new program ended before it could {what} ({}); the log of this daemon says more",
                self.end().await
            )),
            Ok(Err(error)) => Err(format!(
                "the new program says something that is not understood: {error}"
            )),
            Err(_) => Err(format!(
                "the new program did not {what} within {} s",
                patience.as_secs()
            )),
        }
    }

    /// How it has ended, whose socket is closed.
    async fn end(&mut self) -> String {
        let Some(child) = &mut self.child else {
            return "it is gone".into();
        };
        match timeout(END, child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it is there still, and silent".into(),
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // The runtime waits for it.
            let _ = child.start_kill();
        }
    }
}

fn unexpected(message: &FromSuccessor) -> Failure {
    format!("the new program says {message:?} at the wrong time")
}

/// Whether it is neither a program of this machine's kind nor a script. The kernel says so as well, but then the C library
/// would have a shell read it.
fn is_for_another_machine(program: &Path) -> bool {
    const AMD64: u16 = 62;
    let mut head = [0; 20];
    let read = File::open(program).and_then(|mut file| file.read(&mut head));
    // Who starts it says better why it cannot be read.
    let Ok(length) = read else { return false };
    let is_elf = length == head.len() && head.starts_with(b"\x7fELF\x02\x01");
    let is_amd64 = is_elf && u16::from_le_bytes([head[18], head[19]]) == AMD64;
    !is_amd64 && !head.starts_with(b"#!")
}
