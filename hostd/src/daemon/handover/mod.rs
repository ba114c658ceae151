//! A daemon's work passes to another program without a connection refused: [`successor`] is what the daemon that runs
//! does, [`predecessor`] what the one that takes over does. They speak over a pair of sockets, in packets of JSON, of
//! which one carries the descriptors of [`Sockets`]:
//!
//! | successor | predecessor |
//! | --- | --- |
//! | `hello`: what it is | |
//! | | `offer`: what it gets |
//! | `prepared`: it can read all that is there | |
//! | | closes its gate, ends its loops, and says `commit` |
//! | `serving` | answers what it was asked before, and ends |
//!
//! Until `commit` the successor changes nothing, and the predecessor goes on whatever becomes of it. After that, and
//! before `serving`, a failure is like a daemon's death: the predecessor begins anew with what is on the disk.

mod predecessor;
mod sockets;
mod successor;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(super) use self::predecessor::Predecessor;
pub(super) use self::sockets::{Sockets, TlsSlot, is_free};
pub(super) use self::successor::Successor;
use crate::sys::{Polled, polled};

/// The version of what is said here. A daemon hands over to those that say the same.
const PROTOCOL: u32 = 1;

/// The longest packet.
const PACKET: usize = 16 << 10;

/// The most descriptors of one.
const DESCRIPTORS: usize = 8;

/// What the successor says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum FromSuccessor {
    Hello { handover: u32, version: String },
    Prepared,
    Serving,
    Failed { why: String },
}

/// What the predecessor says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum FromPredecessor {
    /// What it has to give; the descriptors come with it, in this order.
    Offer {
        version: String,
        descriptors: Vec<String>,
    },
    Commit,
}

/// One end of the pair.
#[derive(Debug)]
struct Channel(Polled);

impl Channel {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        polled(socket).map(Self)
    }

    async fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        loop {
            let mut ready = self.0.writable().await?;
            let sent = ready.try_io(|socket| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
                    return Err(io::Error::other("too many descriptors for a packet"));
                }
                let slices = [IoSlice::new(&bytes)];
                Ok(rustix::net::sendmsg(
                    socket.get_ref().as_fd(),
                    &slices,
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )?)
            });
            if let Ok(sent) = sent {
                return sent.map(drop);
            }
        }
    }

    /// The next message, with its descriptors; none when the other end is closed.
    async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        loop {
            let mut ready = self.0.readable().await?;
            let received = ready.try_io(|socket| {
                let mut packet = vec![0; PACKET];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let length = rustix::net::recvmsg(
                    socket.get_ref().as_fd(),
                    &mut [IoSliceMut::new(&mut packet)],
                    &mut ancillary,
                    RecvFlags::CMSG_CLOEXEC,
                )?
                .bytes;
                packet.truncate(length);
                let mut descriptors = Vec::new();
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        descriptors.extend(rights);
                    }
                }
                Ok((packet, descriptors))
            });
            match received {
                Ok(Ok((packet, _))) if packet.is_empty() => return Ok(None),
                Ok(Ok((packet, descriptors))) => {
                    return Ok(Some((serde_json::from_slice(&packet)?, descriptors)));
                }
                // The other end is gone with a packet of ours unread.
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let flags = SocketFlags::CLOEXEC;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Channel::new(one).unwrap(), Channel::new(other).unwrap())
    }

    #[tokio::test]
    async fn packets_carry_descriptors() {
        let (one, other) = pair();
        let (given, kept) = UnixStream::pair().unwrap();
        let offer = FromPredecessor::Offer {
            version: "1".into(),
            descriptors: vec!["unix".into()],
        };
        one.send(&offer, &[given.as_fd()]).await.unwrap();
        drop(given);
        let (heard, descriptors) = other.receive::<FromPredecessor>().await.unwrap().unwrap();
        assert_eq!((heard, descriptors.len()), (offer, 1));
        let given = UnixStream::from(descriptors.into_iter().next().unwrap());
        rustix::io::write(&kept, b"x").unwrap();
        let mut byte = [0];
        rustix::io::read(&given, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        drop(one);
        assert!(other.receive::<FromPredecessor>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error() {
        let (one, other) = pair();
        one.send(&serde_json::json!({"say": "sing"}), &[]).await.unwrap();
        assert!(other.receive::<FromSuccessor>().await.is_err());
    }
}
