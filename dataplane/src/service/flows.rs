//! Sockets that go by virtual addresses, and their end.
//!
//! The kernel lists the sockets of a network namespace with what hangs on them, and destroys a socket for who asks it to
//! (`sock_diag`): a program that waits for data from there is told at once that the connection was aborted.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use aya::{Ebpf, maps::Map};
use flynn_abi::ServiceFlow;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, netlink::SocketAddrNetlink,
        recv, sendto, socket_with,
    },
};

use super::diag::{self, Socket};
use crate::error::{Error, Refusal, Result};

/// How a socket has got where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The service's number.
    pub service: u32,
    /// Whether it was the leader that was asked for.
    pub leader: bool,
    /// The instance that was chosen.
    pub instance: u64,
    /// Where that is.
    pub backend: SocketAddr,
}

/// The sockets that go by virtual addresses. It can be moved to a thread in another network namespace.
pub struct Flows {
    /// The map that hangs on sockets.
    map: OwnedFd,
}

impl Flows {
    pub(super) fn take(object: &Ebpf) -> Result<Self> {
        let take = || -> Result<_, Refusal> {
            match object.map("service_flows") {
                Some(Map::SkStorage(map)) => Ok(map.fd().as_fd().try_clone_to_owned()?),
                _ => Err(io::Error::other("the object has no such map").into()),
            }
        };
        let map = take().map_err(Error::kernel("taking the eBPF map service_flows"))?;
        Ok(Self { map })
    }

    pub(super) fn try_clone(&self) -> Result<Self> {
        let map = self.map.try_clone();
        let map = map.map_err(|error| Error::kernel("sharing the eBPF map service_flows")(error.into()))?;
        Ok(Self { map })
    }

    /// Destroys the connected sockets of the calling thread's network namespace which `is_gone` says to lead nowhere, and
    /// those that go straight to one of the `dead` addresses. How many those were.
    pub fn sever(&self, is_gone: impl Fn(&Flow) -> bool, dead: &[SocketAddr]) -> Result<usize> {
        let sever = || -> Result<usize, Refusal> {
            let netlink = socket_with(
                AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::CLOEXEC,
                Some(netlink::SOCK_DIAG),
            )?;
            let mut severed = 0;
            for (family, protocol) in diag::KINDS {
                for socket in self.list(&netlink, family, protocol)? {
                    if (goes_nowhere(&socket, &is_gone) || dead.contains(&socket.peer()))
                        && destroy(&netlink, &socket, protocol)?
                    {
                        severed += 1;
                    }
                }
            }
            Ok(severed)
        };
        sever().map_err(Error::kernel("ending connections to instances that are gone"))
    }

    fn list(&self, netlink: &OwnedFd, family: u8, protocol: u8) -> Result<Vec<Socket>, Refusal> {
        send(netlink, &diag::list(family, protocol, self.map.as_raw_fd()))?;
        let mut sockets = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let (length, _) = recv(netlink, buffer.as_mut_slice(), RecvFlags::empty())?;
            match diag::parse(&buffer[..length], &mut sockets) {
                diag::Reply::More => {}
                diag::Reply::Done => return Ok(sockets),
                diag::Reply::Failed(errno) => return Err(io::Error::from_raw_os_error(errno).into()),
            }
        }
    }
}

fn goes_nowhere(socket: &Socket, is_gone: impl Fn(&Flow) -> bool) -> bool {
    let Some(noted) = &socket.flow else { return false };
    // The socket may have been connected elsewhere since.
    let backend = IpAddr::V6(Ipv6Addr::from(noted.backend)).to_canonical();
    backend == socket.peer().ip()
        && is_gone(&Flow {
            service: noted.service,
            leader: noted.flags & ServiceFlow::LEADER != 0,
            instance: noted.instance,
            backend: socket.peer(),
        })
}

/// Whether it was still there.
fn destroy(netlink: &OwnedFd, socket: &Socket, protocol: u8) -> Result<bool, Refusal> {
    send(netlink, &diag::destroy(socket, protocol))?;
    let mut buffer = [0; 4096];
    let (length, _) = recv(netlink, buffer.as_mut_slice(), RecvFlags::empty())?;
    match diag::parse(&buffer[..length], &mut Vec::new()) {
        diag::Reply::Failed(errno) if Errno::from_raw_os_error(errno) == Errno::NOENT => Ok(false),
        diag::Reply::Failed(errno) => Err(io::Error::from_raw_os_error(errno).into()),
        diag::Reply::More | diag::Reply::Done => Ok(true),
    }
}

fn send(netlink: &OwnedFd, message: &[u8]) -> Result<(), Refusal> {
    sendto(
        netlink,
        message,
        SendFlags::empty(),
        &SocketAddrNetlink::new(0, 0),
    )?;
    Ok(())
}
