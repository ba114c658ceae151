//! What goes between hosts, encrypted by WireGuard.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use flynn_dataplane::{
    VXLAN_PORT, features,
    lb::{Backend, Balancer, Limits, Mode, Service, Uplink, Vip},
};
use flynn_overlay::{DropReason, Encryption, PrivateKey, Protocol, WIREGUARD_PORT, Wireguard};

use crate::{
    cluster::{Cluster, Node},
    guard::{datagram, mac_of, stranger, tunnelled},
    support::{
        Datagrams, MEGABYTES, Namespace, PATIENCE, arrives, drops, eventually, index_of, ip, join, live,
        patient, payload, segmented, send_frame, tcp_echo, udp, udp_echo,
    },
};

/// From a single byte to what takes many packets, with the edges of the tunnel between.
const DATAGRAMS: [usize; 7] = [1, 100, 1363, 1390, 1450, 8000, 60_000];

pub(crate) fn is_possible() -> bool {
    static POSSIBLE: LazyLock<bool> =
        LazyLock::new(|| features::probe().contains(&(features::Feature::WireGuard, true)));
    *POSSIBLE
}

fn wanted() -> Encryption {
    Encryption {
        key: PrivateKey::generate().unwrap(),
        required: false,
    }
}

/// The first two hosts encrypt.
fn two_of(number: u8) -> Option<Encryption> {
    (number <= 2).then(wanted)
}

/// Who sends datagrams to which port of whom, as a listener on the link sees it.
struct Listener {
    enough: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<(Ipv4Addr, Ipv4Addr, u16), u64>>,
}

impl Listener {
    fn start(link: &Namespace) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&enough);
        let (ready, listens) = mpsc::channel();
        let thread = link.spawn(move || {
            let socket = packet_socket();
            ready.send(()).unwrap();
            let mut seen = BTreeMap::new();
            let mut frame = vec![0; 1 << 16];
            loop {
                // SAFETY: a buffer that outlives the call, with its length.
                let length =
                    unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
                let Ok(length) = usize::try_from(length) else {
                    assert_eq!(std::io::Error::last_os_error().kind(), ErrorKind::WouldBlock);
                    if until.load(Ordering::Relaxed) {
                        return seen;
                    }
                    continue;
                };
                let Ok(packet) = etherparse::SlicedPacket::from_ethernet(&frame[..length]) else {
                    continue;
                };
                if let (Some(etherparse::NetSlice::Ipv4(ip)), Some(etherparse::TransportSlice::Udp(udp))) =
                    (packet.net, packet.transport)
                {
                    let header = ip.header();
                    let key = (
                        header.source_addr(),
                        header.destination_addr(),
                        udp.destination_port(),
                    );
                    *seen.entry(key).or_default() += 1;
                }
            }
        });
        listens.recv().unwrap();
        Self { enough, thread }
    }

    fn seen(self) -> BTreeMap<(Ipv4Addr, Ipv4Addr, u16), u64> {
        self.enough.store(true, Ordering::Relaxed);
        join(self.thread)
    }
}

/// One that gets all frames of its namespace and waits a moment for each.
fn packet_socket() -> OwnedFd {
    let all = libc::c_int::from(u16::try_from(libc::ETH_P_ALL).unwrap().to_be());
    // SAFETY: a plain system call.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all) };
    assert!(socket >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let moment = libc::timeval {
        tv_sec: 0,
        tv_usec: 100_000,
    };
    // SAFETY: a pointer to a value that outlives the call, with its length.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const moment).cast(),
            libc::socklen_t::try_from(size_of_val(&moment)).unwrap(),
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    socket
}

/// Whether a host sends only encrypted packets to another, and takes no others from it.
fn is_settled(node: &Node, other: &Node) -> bool {
    let ways = node.run(async |network| network.ways().await.unwrap());
    let way = ways.get(&other.config.subnet.network());
    way.is_some_and(|(reached, interface)| {
        assert_eq!(reached.encrypted, interface == flynn_dataplane::ENCRYPTED_DEVICE);
        reached.encrypted && reached.only_encrypted
    })
}

fn settle(one: &Node, two: &Node) {
    eventually("the hosts encrypt", || {
        is_settled(one, two) && is_settled(two, one)
    });
}

pub(crate) fn hides() {
    Cluster::run_encrypted(3, two_of, |cluster| {
        let [one, two, three] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let _followers = [one.follow_handshakes(), two.follow_handshakes()];
        settle(one, two);
        let listener = Listener::start(&cluster.switch);
        let (a, b, c) = (one.attach(2), two.attach(2), three.attach(2));
        for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
            for length in [1, 1000, 1 << 20] {
                assert_eq!(tcp_echo(&a.namespace, &b.namespace, to, length), from);
            }
            udp_echo(&a.namespace, &b.namespace, to, &DATAGRAMS);
            segmented(&a.namespace, &b.namespace, to, 1200, 40);
            tcp_echo(&one.namespace, &b.namespace, to, MEGABYTES);
        }
        tcp_echo(
            &b.namespace,
            &one.namespace,
            one.network.gateway().into(),
            1 << 16,
        );
        udp_echo(
            &b.namespace,
            &one.namespace,
            one.network.gateway().into(),
            &DATAGRAMS,
        );
        for (from, to) in a.addresses().into_iter().zip(c.addresses()) {
            assert_eq!(tcp_echo(&a.namespace, &c.namespace, to, 1 << 16), from);
        }
        assert_eq!(cluster.drops(), []);
        let seen = listener.seen();
        let count =
            |from: &Node, to: &Node, port| seen.get(&(from.address, to.address, port)).copied().unwrap_or(0);
        for (from, to) in [(one, two), (two, one)] {
            assert_eq!(count(from, to, VXLAN_PORT), 0, "{seen:?}");
            assert!(count(from, to, WIREGUARD_PORT) > 1000, "{seen:?}");
        }
        // Who has no key is spoken to all the same.
        assert!(count(one, three, VXLAN_PORT) > 10, "{seen:?}");

        let receiver = a.namespace.run(move || udp(SocketAddr::new(a.ipv4.into(), 0)));
        let to = receiver.local_addr().unwrap();
        let forger = stranger(&cluster);
        let (mac, tunnel) = (mac_of(one), SocketAddr::new(one.address.into(), VXLAN_PORT));
        let forge = |address: Ipv4Addr, container: Ipv4Addr, more: usize| {
            let inside = [tunnelled(container, to), vec![0; more]].concat();
            datagram(mac, address, tunnel, &inside)
        };
        let before = drops(&one.network, DropReason::NotEncrypted);
        let forged = forge(two.address, b.ipv4, 0);
        forger.run(move || send_frame("eth0", &forged));
        eventually("forged packets are dropped", || {
            drops(&one.network, DropReason::NotEncrypted) == before + 1
        });
        // In pieces, past the uplink's program, from a host that it could be.
        let address = two.address;
        forger.run(move || {
            ip(&["address", "add", &format!("{address}/32"), "dev", "eth0"]);
            let socket = udp(SocketAddr::new(address.into(), 4000));
            let inside = [tunnelled(b.ipv4, to), vec![0; 3000]].concat();
            socket.send_to(&inside, tunnel).unwrap();
        });
        eventually("forged packets in pieces are dropped", || {
            drops(&one.network, DropReason::NotEncrypted) == before + 2
        });
        // The same from who has no key arrives: it was the encryption that was missed.
        let genuine = forge(three.address, c.ipv4, 0);
        forger.run(move || send_frame("eth0", &genuine));
        let mut buffer = [0; 100];
        assert_eq!(
            receiver.recv_from(&mut buffer).unwrap().1.ip(),
            IpAddr::V4(c.ipv4)
        );
    });
}

pub(crate) fn outlives() {
    Cluster::run_encrypted(2, two_of, |mut cluster| {
        let (a, b) = (cluster.nodes[0].attach(2), cluster.nodes[1].attach(2));
        let followers: Vec<_> = cluster.nodes.iter().map(Node::follow_handshakes).collect();
        settle(&cluster.nodes[0], &cluster.nodes[1]);
        drop(followers);
        let listener = Listener::start(&cluster.switch);
        let there = Datagrams::start(&a.namespace, &b.namespace, b.ipv4.into());
        let back = Datagrams::start(&b.namespace, &a.namespace, a.ipv4.into());
        for _ in 0..3 {
            for node in &mut cluster.nodes {
                node.restart();
                node.run(async |network| network.refresh().await.unwrap());
                let own = [a.ipv4, b.ipv4]
                    .into_iter()
                    .filter(|address| node.config.subnet.contains(address));
                let live = live(&own.collect::<Vec<_>>());
                node.run(async move |network| network.reconcile(&live).await.unwrap());
            }
            cluster.introduce(|_, _| false);
        }
        there.arrive();
        back.arrive();
        assert_eq!(cluster.drops(), []);

        // A new key, of which the other host hears after it is used.
        let before = cluster.nodes[0].peer();
        cluster.nodes[0].config.encryption = Some(wanted());
        cluster.nodes[0].restart();
        assert_ne!(cluster.nodes[0].peer(), before);
        cluster.introduce(|_, _| false);
        tcp_echo(&a.namespace, &b.namespace, b.ipv4.into(), 1 << 20);
        tcp_echo(&b.namespace, &a.namespace, a.ipv4.into(), 1 << 20);
        assert_eq!(cluster.drops(), []);
        let seen = listener.seen();
        let plain = seen.iter().filter(|((_, _, port), _)| *port == VXLAN_PORT);
        assert_eq!(plain.count(), 0, "{seen:?}");
    });
}

pub(crate) fn required() {
    let encryption = |number| {
        let required = |wanted| Encryption {
            required: true,
            ..wanted
        };
        match number {
            1 => Some(required(wanted())),
            2 => Some(wanted()),
            _ => None,
        }
    };
    Cluster::run_encrypted(3, encryption, |cluster| {
        let [one, two, three] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let _follower = two.follow_handshakes();
        let (a, b, c) = (one.attach(2), two.attach(2), three.attach(2));
        settle(one, two);
        for to in b.addresses() {
            tcp_echo(&a.namespace, &b.namespace, to, 1 << 16);
        }
        let sent = drops(&one.network, DropReason::NotEncrypted);
        assert!(!arrives(&a.namespace, &c.namespace, c.ipv4.into()));
        assert!(drops(&one.network, DropReason::NotEncrypted) > sent);
        let received = drops(&one.network, DropReason::NotEncrypted);
        assert!(!arrives(&c.namespace, &a.namespace, a.ipv4.into()));
        assert!(drops(&one.network, DropReason::NotEncrypted) > received);
        assert!(arrives(&b.namespace, &c.namespace, c.ipv4.into()));
    });
}

pub(crate) fn goes_away() {
    Cluster::run_encrypted(2, two_of, |mut cluster| {
        let (a, b) = (cluster.nodes[0].attach(2), cluster.nodes[1].attach(2));
        let followers: Vec<_> = cluster.nodes.iter().map(Node::follow_handshakes).collect();
        settle(&cluster.nodes[0], &cluster.nodes[1]);
        tcp_echo(&a.namespace, &b.namespace, b.ipv4.into(), 1 << 20);
        drop(followers);
        let has_device = |node: &Node| {
            let links = node.namespace.run(|| ip(&["-o", "link"]));
            links.contains(flynn_dataplane::ENCRYPTED_DEVICE)
        };
        cluster.nodes[0].config.encryption = None;
        cluster.nodes[0].restart();
        assert_eq!(cluster.nodes[0].network.wireguard(), Wireguard::Off);
        cluster.introduce(|_, _| false);
        assert!(!has_device(&cluster.nodes[0]) && has_device(&cluster.nodes[1]));
        tcp_echo(&a.namespace, &b.namespace, b.ipv4.into(), 1 << 20);
        tcp_echo(&b.namespace, &a.namespace, a.ipv4.into(), 1 << 20);
        assert_eq!(cluster.drops(), []);
    });
}

/// Has a host's load balancer serve one service.
fn balance(node: &Node, service: &Service) {
    let (pins, mac, service) = (node.config.pins.clone(), mac_of(node), service.clone());
    node.namespace.run(move || {
        let uplink = Uplink {
            name: "uplink".into(),
            index: index_of("uplink").try_into().unwrap(),
            mtu: 1500,
            mac,
            is_device: false,
        };
        let limits = Limits {
            flows: 1 << 16,
            flood: 1 << 16,
        };
        let mut balancer = Balancer::open(&pins, uplink, Mode::Tc, &limits).unwrap();
        balancer.set(&[service]).unwrap();
        assert!(!balancer.needs_interfaces().unwrap());
    });
}

pub(crate) fn balanced() {
    const LENGTH: usize = 1 << 20;
    Cluster::run_encrypted(
        3,
        |_| Some(wanted()),
        |cluster| {
            let [one, _, three] = cluster.nodes.as_slice() else {
                unreachable!()
            };
            let _followers: Vec<_> = cluster.nodes.iter().map(Node::follow_handshakes).collect();
            settle(one, three);
            let container = three.attach(2);
            let client = stranger(&cluster);
            for (first_host, answers) in [(false, 0), (true, 500)] {
                let address = container.ipv4;
                let server = container
                    .namespace
                    .run(move || TcpListener::bind((address, 0)).unwrap());
                let vip = SocketAddr::new(one.address.into(), if first_host { 8081 } else { 8080 });
                let service = Service {
                    vips: vec![Vip {
                        address: vip.ip(),
                        port: vip.port(),
                        protocol: Protocol::Tcp,
                    }],
                    backends: vec![Backend {
                        address,
                        port: server.local_addr().unwrap().port(),
                        weight: 1,
                        draining: false,
                        lost: false,
                    }],
                    affinity: false,
                    first_host,
                };
                for node in [three, one] {
                    balance(node, &service);
                }
                let listener = Listener::start(&cluster.switch);
                let server = container.namespace.spawn(move || {
                    let (mut stream, from) = server.accept().unwrap();
                    patient(&stream);
                    let mut received = Vec::new();
                    stream.read_to_end(&mut received).unwrap();
                    assert!(received == payload(LENGTH, 1), "the backend got other bytes");
                    stream.write_all(payload(LENGTH, 2)).unwrap();
                    from.ip()
                });
                client.run(move || {
                    let mut stream = TcpStream::connect_timeout(&vip, PATIENCE).unwrap();
                    patient(&stream);
                    stream.write_all(payload(LENGTH, 1)).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                    let mut received = Vec::new();
                    stream.read_to_end(&mut received).unwrap();
                    assert!(received == payload(LENGTH, 2), "the client got other bytes");
                });
                assert_eq!(join(server), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77)));
                let seen = listener.seen();
                let count = |from: &Node, to: &Node, port| {
                    seen.get(&(from.address, to.address, port)).copied().unwrap_or(0)
                };
                for (from, to) in [(one, three), (three, one)] {
                    assert_eq!(count(from, to, VXLAN_PORT), 0, "{seen:?}");
                }
                assert!(count(one, three, WIREGUARD_PORT) > 500, "{seen:?}");
                assert!(count(three, one, WIREGUARD_PORT) >= answers, "{seen:?}");
            }
            assert_eq!(cluster.drops(), []);
        },
    );
}
