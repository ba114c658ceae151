//! The daemon that ran before this one, as this one sees it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

use anyhow::{Context as _, bail};

use super::{Channel, FromPredecessor, FromSuccessor, PROTOCOL, Sockets};

/// A daemon that waits for this one to take its work over, at the other end of standard input.
#[derive(Debug)]
pub(in crate::daemon) struct Predecessor(Channel);

impl Predecessor {
    /// Says who is there, and gets what it has to give.
    pub(in crate::daemon) async fn meet() -> anyhow::Result<(Self, Sockets)> {
        let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin().as_fd(), 3)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        let channel = Channel::new(socket).context("--takeover is for a daemon that starts another")?;
        let hello = FromSuccessor::Hello {
            handover: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        channel.send(&hello, &[]).await?;
        match channel.receive().await? {
            Some((FromPredecessor::Offer { version, descriptors }, given)) => {
                tracing::info!(version, "taking over");
                Ok((Self(channel), Sockets::take(&descriptors, given)?))
            }
            other => bail!("the daemon that runs offers nothing, but {other:?}"),
        }
    }

    /// All can be read. Comes back when that daemon has stopped to act.
    pub(in crate::daemon) async fn wait_for_commit(&self) -> anyhow::Result<()> {
        self.0.send(&FromSuccessor::Prepared, &[]).await?;
        match self.0.receive().await? {
            Some((FromPredecessor::Commit, _)) => Ok(()),
            Some(other) => bail!("the daemon that runs says {other:?}"),
            None => bail!("the daemon that runs keeps its work"),
        }
    }

    /// From here on this daemon answers. False when that one has died meanwhile.
    pub(in crate::daemon) async fn serving(self) -> bool {
        self.0.send(&FromSuccessor::Serving, &[]).await.is_ok()
    }

    /// This daemon cannot take over.
    pub(in crate::daemon) async fn failed(self, error: &anyhow::Error) {
        let mut why = format!("{error:#}");
        why.truncate(why.floor_char_boundary(4096));
        let _ = self.0.send(&FromSuccessor::Failed { why }, &[]).await;
    }
}
