//! The connections of a container, and its datagrams' where sockets are connected, as its kernel sees them: asked for over netlink (sock_diag) in its network
//! namespace, when somebody wants to know. Nothing is recorded per packet.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::Duration;

use flynn_dataplane::Protocol;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with, sockopt,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// An established connection, or a connected datagram socket: then there is nothing but addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    /// What it speaks.
    pub(super) protocol: Protocol,
    /// The container's side.
    pub(super) local: SocketAddr,
    /// The other.
    pub(super) remote: SocketAddr,
    /// The smoothed round-trip time, in microseconds.
    pub(super) rtt_us: u32,
    /// Segments that were sent again.
    pub(super) retransmits: u32,
    /// Bytes that the other side has acknowledged.
    pub(super) sent_bytes: u64,
    /// Bytes that came.
    pub(super) received_bytes: u64,
}

/// The most connections of one container that are looked at.
const MOST: usize = 10_000;

/// How long the kernel may take.
const PATIENCE: Duration = Duration::from_secs(2);

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const TCP_ESTABLISHED: u32 = 1;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const INET_DIAG_INFO: u16 = 2;

/// Bytes of a netlink header.
const HEADER: usize = 16;
/// Bytes of an `inet_diag_msg`.
const MESSAGE: usize = 72;

/// The connections of the network namespace that a process is in.
pub(super) async fn of_process(pid: i32) -> io::Result<Vec<Connection>> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // A thread that has entered a namespace is of no other use.
    std::thread::Builder::new()
        .name("sockets".into())
        .spawn(move || {
            let look = || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                let mut found = dump(AF_INET, Protocol::Tcp)?;
                found.extend(dump(AF_INET6, Protocol::Tcp)?);
                for family in [AF_INET, AF_INET6] {
                    match dump(family, Protocol::Udp) {
                        // A kernel without `udp_diag`.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        datagrams => found.extend(datagrams?),
                    }
                }
                Ok(found)
            };
            // Nobody waits any more when the caller was cancelled.
            let _ = sender.send(look());
        })?;
    receiver
        .await
        .map_err(|_| io::Error::other("the thread that enters the namespace died"))?
}

fn dump(family: u8, protocol: Protocol) -> io::Result<Vec<Connection>> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(SOCK_DIAG),
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    sendto(
        &socket,
        &request(family, protocol),
        SendFlags::empty(),
        &SocketAddrNetlink::new(0, 0),
    )?;
    let (mut found, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let (length, _) = recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
        let is_last = parse(&buffer[..length.min(64 << 10)], protocol, &mut found)?;
        if is_last || found.len() >= MOST {
            found.truncate(MOST);
            return Ok(found);
        }
    }
}

/// An `inet_diag_req_v2` for all established connections, with what TCP knows of them.
fn request(family: u8, protocol: Protocol) -> Vec<u8> {
    const LENGTH: u32 = 16 + 56;
    let number = match protocol {
        Protocol::Tcp => IPPROTO_TCP,
        Protocol::Udp => IPPROTO_UDP,
    };
    let mut bytes = Vec::with_capacity(72);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, number, 1 << (INET_DIAG_INFO - 1), 0]);
    bytes.extend((1_u32 << TCP_ESTABLISHED).to_ne_bytes());
    bytes.extend([0; 48]);
    bytes
}

/// Reads one datagram of the answer; whether it was the last. What cannot be read is passed over.
fn parse(mut bytes: &[u8], protocol: Protocol, found: &mut Vec<Connection>) -> io::Result<bool> {
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(message) = bytes.get(HEADER..length) else {
            return Ok(true);
        };
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let number = u32_at(message, 0).unwrap_or(0).cast_signed();
                return match number {
                    0 => Ok(true),
                    _ => Err(io::Error::from_raw_os_error(-number.max(-4095))),
                };
            }
            SOCK_DIAG_BY_FAMILY => found.extend(connection(message, protocol)),
            _ => {}
        }
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
    }
    Ok(false)
}

fn connection(message: &[u8], protocol: Protocol) -> Option<Connection> {
    let address = |at: usize| -> Option<IpAddr> {
        match *message.first()? {
            AF_INET => {
                let octets: [u8; 4] = message.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(octets).into())
            }
            AF_INET6 => {
                let octets: [u8; 16] = message.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(octets).to_canonical())
            }
            _ => None,
        }
    };
    let port = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let mut connection = Connection {
        protocol,
        local: SocketAddr::new(address(8)?, port(4)?),
        remote: SocketAddr::new(address(24)?, port(6)?),
        rtt_us: 0,
        retransmits: 0,
        sent_bytes: 0,
        received_bytes: 0,
    };
    let mut attributes = message.get(MESSAGE..)?;
    while let (Some(length), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let length = usize::from(length);
        let Some(value) = attributes.get(4..length) else {
            break;
        };
        if kind == INET_DIAG_INFO {
            // Places in `tcp_info`, which only grows.
            connection.rtt_us = u32_at(value, 68).unwrap_or(0);
            connection.retransmits = u32_at(value, 100).unwrap_or(0);
            connection.sent_bytes = u64_at(value, 120).unwrap_or(0);
            connection.received_bytes = u64_at(value, 128).unwrap_or(0);
        }
        attributes = attributes.get(aligned(length)..).unwrap_or_default();
    }
    Some(connection)
}

fn aligned(length: usize) -> usize {
    length.max(1).saturating_add(3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn strange_answers_harm_nobody(bytes: Vec<u8>) {
            let mut found = Vec::new();
            let _ = parse(&bytes, Protocol::Tcp, &mut found);
            let mut framed = Vec::new();
            framed.extend(u32::try_from(HEADER + bytes.len()).unwrap().to_ne_bytes());
            framed.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
            framed.extend([0; 10]);
            framed.extend(&bytes);
            let _ = parse(&framed, Protocol::Udp, &mut found);
            prop_assert!(found.len() <= 2);
        }
    }

    /// The kernel's own answer about a connection of this process.
    #[tokio::test]
    async fn own_connections_are_found() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"some bytes").unwrap();
        server.read_exact(&mut [0; 10]).unwrap();
        let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        datagrams.connect((Ipv4Addr::LOCALHOST, 9)).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let found = of_process(own).await.unwrap();
        let (local, remote) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
        let udp = found
            .iter()
            .find(|found| found.local == datagrams.local_addr().unwrap());
        // Some kernels do not tell.
        if let Some(udp) = udp {
            assert_eq!(udp.protocol, Protocol::Udp);
            assert_eq!(udp.remote, (Ipv4Addr::LOCALHOST, 9).into());
        }
        let found = found
            .iter()
            .find(|connection| (connection.local, connection.remote) == (local, remote));
        let found = found.expect("the connection is there");
        assert_eq!(found.received_bytes, 10);
        assert!(found.retransmits == 0 && found.rtt_us < 1_000_000, "{found:?}");
    }
}
