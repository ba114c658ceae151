//! What the daemon says to a supervisor over the job's socket: one line of JSON, answered by one line of JSON; after
//! `watch` by many, and after `attach` and `exec` by frames both ways ([`flynn_api::host::attach`]). Whoever closes their side has
//! left.
//!
//! A job keeps its supervisor when the daemon is updated, and so either may be the older one. A supervisor says in its
//! [`Status`] which version of the protocol it speaks; versions only add to those before. A daemon does not ask for what
//! a supervisor does not know, a supervisor refuses what it does not know, and either passes over fields that it does not
//! know.

use std::io;
use std::path::Path;

use flynn_api::host::{ExecRequest, TtySize};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::container::Place;
use crate::status::Status;

/// The version of what is said here. With 2 came `pause` and `exec`.
pub const PROTOCOL: u32 = 2;

/// The longest line.
const MAX_LINE: u64 = 64 << 10;

/// A wish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// The status now and whenever it changes, until the supervisor leaves.
    Watch,
    /// The network is there: start. Said again, it tells of a gateway that has come up since.
    Go(Place),
    /// Stop the job and leave.
    Stop,
    /// Send a signal to the program.
    Signal {
        /// Its number.
        signal: i32,
    },
    /// Take the job's instances out of discoverd.
    Deregister,
    /// Have every process of the job stand still, or go on.
    Pause {
        /// Whether to stand still.
        paused: bool,
    },
    /// Become one of the job's terminals.
    Attach {
        /// Send input.
        stdin: bool,
        /// Get standard output.
        stdout: bool,
        /// Get standard error.
        stderr: bool,
        /// The terminal's size.
        tty_size: Option<TtySize>,
        /// Lines of the past to get first.
        lines: u32,
    },
    /// Start another program in the container and become its terminal.
    Exec(ExecRequest),
}

impl Request {
    /// The version of the protocol that it came with.
    pub fn since(&self) -> u32 {
        match self {
            Self::Watch
            | Self::Go(_)
            | Self::Stop
            | Self::Signal { .. }
            | Self::Deregister
            | Self::Attach { .. } => 1,
            Self::Pause { .. } | Self::Exec(_) => 2,
        }
    }
}

/// The answer to all but `watch`; after that of `attach` and `exec` come frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Why it was not done.
    pub error: Option<String>,
}

/// A connection to a supervisor.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    /// Connects to the supervisor at `socket`.
    pub async fn open(socket: &Path) -> io::Result<Self> {
        Ok(Self {
            stream: BufReader::new(UnixStream::connect(socket).await?),
        })
    }

    /// Says something and hears the answer.
    pub async fn call(&mut self, request: &Request) -> io::Result<()> {
        write_line(self.stream.get_mut(), request).await?;
        match read_line::<Reply>(&mut self.stream).await? {
            Some(Reply { error: None }) => Ok(()),
            Some(Reply { error: Some(error) }) => Err(io::Error::other(error)),
            None => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Begins to watch.
    pub async fn watch(&mut self) -> io::Result<()> {
        write_line(self.stream.get_mut(), &Request::Watch).await
    }

    /// The next status; none once the supervisor has left.
    pub async fn next_status(&mut self) -> io::Result<Option<Status>> {
        read_line(&mut self.stream).await
    }

    /// The raw stream, after `attach`.
    pub fn into_stream(self) -> BufReader<UnixStream> {
        self.stream
    }
}

/// Reads one line of JSON; none at the end of the stream.
pub async fn read_line<T: serde::de::DeserializeOwned>(
    stream: &mut BufReader<impl AsyncRead + Unpin>,
) -> io::Result<Option<T>> {
    use tokio::io::AsyncReadExt;
    let mut line = Vec::new();
    stream.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(io::Error::from)
}

/// Writes one line of JSON.
pub async fn write_line(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    value: &impl Serialize,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}
