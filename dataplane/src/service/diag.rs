//! The messages of `sock_diag` (linux/sock_diag.h, linux/inet_diag.h). Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use flynn_abi::{Ipv6, ServiceFlow};

/// Address families and protocols of sockets that can be connected.
pub(super) const KINDS: [(u8, u8); 4] = [(INET, TCP), (INET6, TCP), (INET, UDP), (INET6, UDP)];

const INET: u8 = 2;
const INET6: u8 = 10;
const TCP: u8 = 6;
const UDP: u8 = 17;

const DONE: u16 = 3;
const ERROR: u16 = 2;
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;

/// Bytes of a message's header, of a socket's identity and of what the kernel says about a socket before its attributes.
const HEADER: usize = 16;
const IDENTITY: usize = 48;
const SOCKET: usize = 72;

/// States in which a socket has a peer: all but LISTEN, CLOSE, TIME_WAIT and those of half-made connections.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// Asks for storages by the map's descriptor.
const REQUEST_STORAGES: u16 = 2;
const REQUEST_MAP: u16 = 1;

/// The storages of a socket, one of them, and its value.
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const VALUE: u16 = 3;

/// A connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    family: u8,
    /// Ports, addresses, interface and cookie, as the kernel has sent them.
    identity: [u8; IDENTITY],
    /// What hangs on it.
    pub(super) flow: Option<ServiceFlow>,
}

impl Socket {
    /// Where it is connected to.
    pub(super) fn peer(&self) -> SocketAddr {
        let id = &self.identity;
        let port = u16::from_be_bytes([id[2], id[3]]);
        let address = if self.family == INET {
            IpAddr::V4(Ipv4Addr::new(id[20], id[21], id[22], id[23]))
        } else {
            IpAddr::V6(Ipv6Addr::from(array::<16>(&id[20..36]).unwrap_or_default())).to_canonical()
        };
        SocketAddr::new(address, port)
    }
}

/// Where a list of sockets is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// There is more to come.
    More,
    /// That was all, or it was done.
    Done,
    /// The kernel refused.
    Failed(i32),
}

/// Asks for all connected sockets of a kind, with what hangs on them from a map.
pub(super) fn list(family: u8, protocol: u8, map: i32) -> Vec<u8> {
    let attributes = attribute(REQUEST_STORAGES, &attribute(REQUEST_MAP, &map.to_ne_bytes()));
    let mut message = request(BY_FAMILY, DUMP, family, protocol, &[0; IDENTITY]);
    message.extend_from_slice(&attributes);
    sized(message)
}

/// Asks for the end of a socket.
pub(super) fn destroy(socket: &Socket, protocol: u8) -> Vec<u8> {
    sized(request(
        DESTROY,
        ACKNOWLEDGE,
        socket.family,
        protocol,
        &socket.identity,
    ))
}

fn request(kind: u16, flags: u16, family: u8, protocol: u8, identity: &[u8; IDENTITY]) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(REQUEST | flags).to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[family, protocol, 0, 0]);
    message.extend_from_slice(&CONNECTED.to_ne_bytes());
    message.extend_from_slice(identity);
    message
}

/// Writes a message's length into it.
fn sized(mut message: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::from(length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Reads one datagram of an answer.
pub(super) fn parse(mut bytes: &[u8], sockets: &mut Vec<Socket>) -> Reply {
    while let Some(header) = bytes.get(..HEADER) {
        let number = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let length = array(&header[..4]).map_or(0, u32::from_ne_bytes);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(body) = bytes.get(HEADER..length) else {
            break;
        };
        match number(4) {
            DONE => return Reply::Done,
            ERROR => {
                let errno = body.get(..4).and_then(array).map_or(0, i32::from_ne_bytes);
                return if errno == 0 {
                    Reply::Done
                } else {
                    Reply::Failed(errno.saturating_neg())
                };
            }
            BY_FAMILY => sockets.extend(socket(body)),
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Reply::More
}

fn socket(body: &[u8]) -> Option<Socket> {
    let (fixed, attributes) = body.split_at_checked(SOCKET)?;
    let storages = find(attributes, STORAGES).unwrap_or_default();
    let flow = find(storages, STORAGE)
        .and_then(|storage| find(storage, VALUE))
        .and_then(flow);
    Some(Socket {
        family: fixed[0],
        identity: array(&fixed[4..4 + IDENTITY])?,
        flow,
    })
}

/// The value of the first attribute of a kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    /// Bits of a kind that say how its value is made.
    const FLAGS: u16 = 0xc000;
    loop {
        let header = attributes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([header[2], header[3]]) & !FLAGS == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn flow(value: &[u8]) -> Option<ServiceFlow> {
    Some(ServiceFlow {
        virtual_address: Ipv6::new(value.get(..16).and_then(array)?),
        backend: Ipv6::new(value.get(16..32).and_then(array)?),
        instance: u64::from_ne_bytes(value.get(32..40).and_then(array)?),
        service: u32::from_ne_bytes(value.get(40..44).and_then(array)?),
        flags: u32::from_ne_bytes(value.get(44..48).and_then(array)?),
    })
}

fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            parse(&bytes, &mut Vec::new());
        }

        #[test]
        fn any_attributes_are_survived(
            fixed in proptest::collection::vec(any::<u8>(), SOCKET),
            kinds in proptest::collection::vec((0_u16..24, proptest::collection::vec(any::<u8>(), 0..80)), 0..8),
        ) {
            let mut body = fixed;
            for (kind, value) in &kinds {
                body.extend(attribute(*kind, value));
            }
            let mut message = vec![0; 4];
            message.extend(BY_FAMILY.to_ne_bytes());
            message.extend([0; 10]);
            message.extend(body);
            let mut sockets = Vec::new();
            prop_assert_eq!(parse(&sized(message), &mut sockets), Reply::More);
            prop_assert_eq!(sockets.len(), 1);
        }
    }

    #[test]
    fn lengths_are_in_the_messages() {
        let message = list(INET, TCP, 7);
        assert_eq!(message.len(), HEADER + 8 + IDENTITY + 12);
        assert_eq!(message[..4], u32::try_from(message.len()).unwrap().to_ne_bytes());
    }

    #[test]
    fn errors_are_told() {
        let mut message = vec![20, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend((-95_i32).to_ne_bytes());
        assert_eq!(parse(&message, &mut Vec::new()), Reply::Failed(95));
    }
}
