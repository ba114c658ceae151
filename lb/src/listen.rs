//! Listening sockets.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use flynn_api::tcp::keep_alive;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt};
use tokio::net::TcpListener;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Listens on all addresses, IPv6 and IPv4 with one socket where the kernel has IPv6.
pub fn everywhere(port: u16) -> io::Result<TcpListener> {
    match on((Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => on((Ipv4Addr::UNSPECIFIED, port).into()),
        result => result,
    }
}

/// Listens on this address.
pub fn on(addr: SocketAddr) -> io::Result<TcpListener> {
    let family = if addr.is_ipv6() {
        AddressFamily::INET6
    } else {
        AddressFamily::INET
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    // A router that is back within a second must not wait for its predecessor's connections.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if addr.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    keep_alive(&socket)?;
    bind(&socket, &addr)?;
    listen(&socket, BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream;

    #[tokio::test]
    async fn clients_and_backends_that_vanish_are_noticed() {
        let listener = on("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = listener.local_addr().unwrap();
        let (backend, client) = tokio::join!(upstream::connect(addr), listener.accept());
        assert!(sockopt::socket_keepalive(client.unwrap().0).unwrap());
        assert!(sockopt::socket_keepalive(backend.unwrap()).unwrap());
    }
}
