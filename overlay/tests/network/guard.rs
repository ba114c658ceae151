//! Who is kept out, and what policy says between hosts.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU64,
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use flynn_overlay::{AppPolicy, Attachment, DropReason, Limits, Policy, Port, Protocol, RemoteEndpoint};

use crate::{
    cluster::{Cluster, Node},
    support::{Namespace, arrives, drops, eventually, ip, send_frame, tcp_echo, udp},
};

fn is(identity: u32) -> Attachment {
    Attachment {
        identity,
        ..Attachment::default()
    }
}

/// Somebody on the link of the first host.
pub(crate) fn stranger(cluster: &Cluster) -> Namespace {
    use std::os::fd::{AsFd, AsRawFd};
    let namespace = Namespace::new();
    let inside = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        namespace.as_fd().as_raw_fd()
    );
    cluster.switch.run(move || {
        ip(&[
            "link", "add", "stranger", "type", "veth", "peer", "name", "eth0", "netns", &inside,
        ]);
        ip(&["link", "set", "stranger", "master", "odd", "up"]);
    });
    namespace.run(|| {
        ip(&["address", "add", "192.0.2.77/24", "dev", "eth0"]);
        ip(&["link", "set", "eth0", "up"]);
    });
    namespace
}

pub(crate) fn mac_of(node: &Node) -> [u8; 6] {
    let line = node.namespace.run(|| ip(&["-o", "link", "show", "uplink"]));
    let text = line
        .split("link/ether ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

pub(crate) fn datagram(to_mac: [u8; 6], from: Ipv4Addr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let IpAddr::V4(address) = to.ip() else {
        panic!("an IPv4 address")
    };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], to_mac)
        .ipv4(from.octets(), address.octets(), 64)
        .udp(1000, to.port())
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// In the tunnel, for a datagram from one container to another.
pub(crate) fn tunnelled(from: Ipv4Addr, to: SocketAddr) -> Vec<u8> {
    let inner = datagram([2; 6], from, to, b"forged");
    [&[8, 0, 0, 0, 0, 0, 1, 0], inner.as_slice()].concat()
}

pub(crate) fn forged_packets() {
    Cluster::run(3, |cluster| {
        let [one, two, three] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let (a, b) = (one.attach(2), three.attach(2));
        let receiver = a.namespace.run(move || udp(SocketAddr::new(a.ipv4.into(), 0)));
        let to = receiver.local_addr().unwrap();
        receiver
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let stranger = stranger(&cluster);
        let mac = mac_of(one);
        let tunnel = SocketAddr::new(one.address.into(), 8472);
        let own: Ipv4Addr = "192.0.2.77".parse().unwrap();
        // From no host; from a host but with another's address; bare; and cut into pieces, past the uplink's program.
        let forged = [
            (
                datagram(mac, own, tunnel, &tunnelled(b.ipv4, to)),
                DropReason::UnknownHost,
            ),
            (
                datagram(mac, three.address, tunnel, &tunnelled(a.ipv4, to)),
                DropReason::ForeignSubnet,
            ),
            (
                datagram(mac, three.address, tunnel, &tunnelled(two.network.gateway(), to)),
                DropReason::ForeignSubnet,
            ),
            (datagram(mac, b.ipv4, to, b"bare"), DropReason::NotTunnelled),
            (datagram(mac, a.ipv4, to, b"bare"), DropReason::NotTunnelled),
        ];
        for (frame, reason) in forged {
            let before = drops(&one.network, reason);
            stranger.run(move || send_frame("eth0", &frame));
            eventually(reason.name(), || drops(&one.network, reason) == before + 1);
        }
        let before = drops(&one.network, DropReason::UnknownHost);
        let whole = [tunnelled(b.ipv4, to), vec![0; 3000]].concat();
        stranger.run(move || udp("0.0.0.0:0".parse().unwrap()).send_to(&whole, tunnel).unwrap());
        eventually("pieces of a tunnel", || {
            drops(&one.network, DropReason::UnknownHost) == before + 1
        });
        assert!(receiver.recv(&mut [0]).is_err(), "something forged has arrived");
        eventually("who does not forge is heard", || {
            arrives(&b.namespace, &a.namespace, a.ipv4.into())
        });
    });
}

pub(crate) fn direct_hosts() {
    Cluster::run(3, |cluster| {
        let [one, two, three] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let (a, b, c) = (one.attach(2), two.attach(2), three.attach(2));
        // The first and the third are on one link; between others it is asked for in vain.
        cluster.introduce(|_, _| true);
        let (sent, probe) = (tunnelled_packets(&cluster), a.ipv4);
        for (from, to) in a.addresses().into_iter().zip(c.addresses()) {
            assert_eq!(tcp_echo(&a.namespace, &c.namespace, to, 1 << 20), from);
        }
        // However strict the host is about the way on which packets come.
        for key in ["all", "uplink"] {
            let path = format!("/proc/sys/net/ipv4/conf/{key}/rp_filter");
            one.namespace.run(move || std::fs::write(path, "1").unwrap());
        }
        tcp_echo(
            &c.namespace,
            &one.namespace,
            one.network.gateway().into(),
            1 << 16,
        );
        tcp_echo(&one.namespace, &c.namespace, c.ipv4.into(), 1 << 16);
        assert_eq!(cluster.drops(), []);
        let through = tunnelled_packets(&cluster) - sent;
        assert!(through > 0, "IPv6 goes through the tunnel");
        tcp_echo(&a.namespace, &c.namespace, c.ipv4.into(), 1 << 20);
        assert_eq!(
            tunnelled_packets(&cluster),
            sent + through,
            "{probe} went through the tunnel"
        );
        tcp_echo(&a.namespace, &b.namespace, b.ipv4.into(), 1 << 20);
        assert!(tunnelled_packets(&cluster) > sent + through);
        assert_eq!(cluster.drops(), []);
    });
}

/// How many packets of tunnels the switch has passed on.
fn tunnelled_packets(cluster: &Cluster) -> u64 {
    let count = || {
        let nft = |arguments: &[&str]| {
            let output = std::process::Command::new("nft")
                .args(arguments)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        };
        if !nft(&["list", "tables"]).contains("tunnels") {
            nft(&["add", "table", "netdev", "tunnels"]);
            for port in ["port1", "port2", "port3"] {
                nft(&[&format!(
                    "add chain netdev tunnels {port} {{ type filter hook ingress device {port} priority 0 ; }}"
                )]);
                nft(&[&format!("add rule netdev tunnels {port} udp dport 8472 counter")]);
            }
        }
        let rules = nft(&["list", "table", "netdev", "tunnels"]);
        let counts = rules.split("counter packets ").skip(1);
        counts
            .map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    };
    cluster.switch.run(count)
}

pub(crate) fn policy_between_hosts() {
    Cluster::run(2, |cluster| {
        let [one, two] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let (web, database, other) = (
            one.attach_as(2, is(10)),
            two.attach_as(2, is(20)),
            one.attach_as(3, is(30)),
        );
        let policy = Policy {
            apps: [(
                20,
                AppPolicy {
                    isolated: true,
                    system: false,
                },
            )]
            .into(),
            allowed: BTreeSet::from([(10, 20)]),
            ..Policy::default()
        };
        for node in &cluster.nodes {
            node.network.set_policy(&policy).unwrap();
        }
        let isolated = |node: &Node| drops(&node.network, DropReason::Isolated);
        for (from, to) in web.addresses().into_iter().zip(database.addresses()) {
            assert_eq!(tcp_echo(&web.namespace, &database.namespace, to, 1 << 20), from);
            assert!(!arrives(&other.namespace, &database.namespace, to));
        }
        // The sender does not know whom it sends to, and the receiver drops it.
        assert_eq!((isolated(one), isolated(two)), (0, 2));
        one.network
            .set_remote(&[RemoteEndpoint {
                address: database.ipv4,
                identity: 20,
            }])
            .unwrap();
        for to in database.addresses() {
            assert!(!arrives(&other.namespace, &database.namespace, to));
        }
        assert_eq!((isolated(one), isolated(two)), (2, 2));
        // The router of any host reaches it.
        tcp_echo(&one.namespace, &database.namespace, database.ipv4.into(), 1 << 16);
        tcp_echo(&two.namespace, &database.namespace, database.ipv4.into(), 1 << 16);
        // It cannot begin a conversation with whom it is linked from.
        let socket = web
            .namespace
            .run(move || std::net::TcpListener::bind((web.ipv4, 0)).unwrap());
        let to = socket.local_addr().unwrap();
        let refused = database
            .namespace
            .run(move || std::net::TcpStream::connect_timeout(&to, Duration::from_millis(200)).is_err());
        assert!(refused);
        assert!(
            drops(&two.network, DropReason::MayOnlyAnswer) + drops(&one.network, DropReason::MayOnlyAnswer)
                > 0
        );
    });
}

pub(crate) fn ports_between_hosts() {
    Cluster::run(2, |cluster| {
        let [one, two] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let policy = Policy {
            host_ports: Some(BTreeSet::from([Port {
                protocol: Protocol::Udp,
                number: 53,
            }])),
            // How other hosts know it.
            apps: [(
                11,
                AppPolicy {
                    isolated: false,
                    system: true,
                },
            )]
            .into(),
            ..Policy::default()
        };
        for node in &cluster.nodes {
            node.network.set_policy(&policy).unwrap();
        }
        let job = one.attach_as(2, is(10));
        let system = one.attach_as(
            3,
            Attachment {
                system: true,
                ..is(11)
            },
        );
        let reaches = |from: &Namespace, to: IpAddr, number| {
            let socket = two.namespace.run(move || udp(SocketAddr::new(to, number)));
            from.run(move || {
                udp("0.0.0.0:0".parse().unwrap())
                    .send_to(b"?", SocketAddr::new(to, number))
                    .unwrap()
            });
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            socket.recv(&mut [0]).is_ok()
        };
        for to in [two.network.gateway(), two.address] {
            eventually("port 53 is open", || reaches(&job.namespace, to.into(), 53));
            assert!(!reaches(&job.namespace, to.into(), 1113));
            eventually("the platform reaches all", || {
                reaches(&system.namespace, to.into(), 1113)
            });
        }
        assert_eq!(drops(&one.network, DropReason::HostPortClosed), 2);
    });
}

pub(crate) fn limits_between_hosts() {
    Cluster::run(2, |cluster| {
        let [one, two] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let limited = |sent, received| Attachment {
            limits: Limits {
                sent: NonZeroU64::new(sent),
                received: NonZeroU64::new(received),
            },
            ..Attachment::default()
        };
        let rate = 1 << 20;
        for (number, (a, b)) in [
            (limited(rate, 0), limited(0, 0)),
            (limited(0, 0), limited(0, rate)),
        ]
        .into_iter()
        .enumerate()
        {
            let last = 2 + u8::try_from(number).unwrap();
            let (a, b) = (one.attach_as(last, a), two.attach_as(last, b));
            let start = Instant::now();
            let (address, length) = (b.ipv4.into(), 1 << 20);
            tcp_echo(&a.namespace, &b.namespace, address, length);
            // A mebibyte at a mebibyte a second, but for the burst, one way; the other way is not limited.
            assert!(
                start.elapsed() > Duration::from_millis(700),
                "{:?}",
                start.elapsed()
            );
        }
    });
}
