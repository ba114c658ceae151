//! The ports of a host: who listens there, and who has to reach them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Check;

/// Who has to reach a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    /// The cluster's other hosts.
    Hosts,
    /// Whoever uses what runs on the cluster.
    Clients,
}

/// A port of a host's own addresses.
pub(super) struct Port {
    pub(super) number: u16,
    pub(super) protocol: &'static str,
    pub(super) from: From,
    pub(super) what: &'static str,
}

const fn port(number: u16, protocol: &'static str, from: From, what: &'static str) -> Port {
    Port {
        number,
        protocol,
        from,
        what,
    }
}

/// All of them. The table in `docs/operating.md` says the same; ports of routes come with routes.
pub(super) const PORTS: [Port; 9] = [
    port(80, "tcp", From::Clients, "router: HTTP"),
    port(443, "tcp", From::Clients, "router: HTTPS"),
    port(443, "udp", From::Clients, "router: HTTP/3"),
    port(flynn_api::discovery::PORT, "tcp", From::Hosts, "discoverd"),
    port(flynn_api::host::PORT, "tcp", From::Hosts, "host API"),
    port(
        crate::floating::PORT,
        "udp",
        From::Hosts,
        "heartbeats of floating addresses",
    ),
    port(8472, "udp", From::Hosts, "VXLAN, containers' packets"),
    port(
        flynn_overlay::WIREGUARD_PORT,
        "udp",
        From::Hosts,
        "WireGuard, containers' packets encrypted",
    ),
    port(
        53,
        "tcp+udp",
        From::Hosts,
        "DNS, on the gateway address of the host's containers alone",
    ),
];

/// Whether a daemon of ours runs here: then our ports are taken, and by us.
fn ours(name: &str) -> bool {
    name.starts_with("flynn") || matches!(name, "discoverd" | "router")
}

/// Whether anybody else has a port that is to be ours.
pub(super) fn free() -> Check {
    let mut taken = Vec::new();
    for wanted in PORTS.iter().filter(|port| port.number != 53) {
        let files: &[&str] = match wanted.protocol {
            "tcp" => &["tcp", "tcp6"],
            _ => &["udp", "udp6"],
        };
        for file in files {
            let text = fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
            for socket in listeners(&text, wanted.protocol == "tcp") {
                if socket.port != wanted.number || socket.address.is_loopback() {
                    continue;
                }
                match owner(socket.inode) {
                    Some(name) if ours(&name) => {}
                    // In the kernel, as WireGuard's and VXLAN's.
                    None if socket.inode == 0 || wanted.protocol == "udp" => {}
                    owner => taken.push(format!(
                        "{}/{} ({}) by {}",
                        wanted.number,
                        wanted.protocol,
                        wanted.what,
                        owner.unwrap_or_else(|| "somebody".into())
                    )),
                }
            }
        }
    }
    taken.sort();
    taken.dedup();
    if taken.is_empty() {
        return Check::ok("ports", "nobody else has a port that is needed");
    }
    Check::fail(
        "ports",
        format!("taken: {}", taken.join(", ")),
        "stop those who listen there (ss -lnp shows them), or have them listen on other ports",
    )
}

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    address: IpAddr,
    port: u16,
    inode: u64,
}

/// The sockets of `/proc/net/{tcp,udp}` that wait for whoever comes.
fn listeners(text: &str, tcp: bool) -> Vec<Socket> {
    const LISTEN: &str = "0A";
    const UNCONNECTED: &str = "07";
    let state = if tcp { LISTEN } else { UNCONNECTED };
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if *fields.get(3)? != state {
            return None;
        }
        let (address, port) = fields.get(1)?.split_once(':')?;
        Some(Socket {
            address: parse_address(address)?,
            port: u16::from_str_radix(port, 16).ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    };
    text.lines().skip(1).filter_map(socket).collect()
}

/// An address as the kernel writes it: words of 32 bits, each in the machine's own order.
fn parse_address(text: &str) -> Option<IpAddr> {
    let words: Option<Vec<[u8; 4]>> = (0..text.len() / 8)
        .map(|word| {
            let word = u32::from_str_radix(text.get(word * 8..word * 8 + 8)?, 16).ok()?;
            Some(word.to_ne_bytes())
        })
        .collect();
    let bytes: Vec<u8> = words?.concat();
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes)
            .ok()
            .map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(bytes)
            .ok()
            .map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// The name of a process that has this socket open.
fn owner(inode: u64) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let is_pid = process
            .file_name()
            .to_string_lossy()
            .bytes()
            .all(|byte| byte.is_ascii_digit());
        let Some(descriptors) = is_pid
            .then(|| fs::read_dir(process.path().join("fd")).ok())
            .flatten()
        else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            if fs::read_link(descriptor.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str()) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(name.trim().to_owned());
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_read_as_the_kernel_writes_them() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                    0: 0100007F:0457 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n   \
                    1: 0B0200C0:0459 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1\n   \
                    2: 0B0200C0:0459 0C0200C0:9999 01 00000000:00000000 00:00000000 00000000     0        0 4713 1\n";
        let found = listeners(text, true);
        assert_eq!(found.len(), 2);
        assert!(found[0].address.is_loopback() && found[0].port == 1111);
        let other = Socket {
            address: Ipv4Addr::new(192, 0, 2, 11).into(),
            port: 1113,
            inode: 4712,
        };
        assert_eq!(found[1], other);
        let six = "00000000000000000000000001000000";
        assert_eq!(parse_address(six), Some(Ipv6Addr::LOCALHOST.into()));
    }

    #[test]
    fn who_has_a_socket_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let text = fs::read_to_string("/proc/net/tcp").unwrap();
        let all = listeners(&text, true);
        let own = all.iter().find(|socket| socket.port == port).unwrap();
        let name = fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(owner(own.inode).as_deref(), Some(name.trim()));
    }
}
