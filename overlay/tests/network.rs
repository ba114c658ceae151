//! The network with real packets: hosts and containers as namespaces, real sockets in them.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use etherparse::PacketBuilder;
use flynn_overlay::{DropReason, Network, NetworkConfig, Reconciled, host_interface, mac};
use support::{
    Container, Host, Namespace, address, arrives, drops, eventually, ip, join, patient, send_frame, tcp_echo,
    udp, udp_echo,
};

const MEGABYTES: usize = 8 << 20;

fn main() {
    support::main(
        &["ip", "nft"],
        |_| None,
        &[
            ("containers_reach_one_another", containers_reach_one_another),
            (
                "the_host_and_containers_reach_one_another",
                the_host_and_containers_reach_one_another,
            ),
            (
                "containers_reach_the_outside_by_the_host_s_address",
                containers_reach_the_outside,
            ),
            (
                "the_outside_does_not_reach_containers",
                the_outside_does_not_reach_containers,
            ),
            (
                "who_lies_about_its_address_is_dropped",
                who_lies_about_its_address_is_dropped,
            ),
            (
                "frames_that_the_overlay_does_not_carry_are_dropped",
                frames_that_are_not_carried,
            ),
            (
                "connections_outlive_the_daemon_and_its_successor",
                connections_outlive_the_daemon,
            ),
            (
                "no_datagram_is_lost_while_programs_are_replaced",
                no_datagram_is_lost,
            ),
            (
                "reconciling_removes_strays_and_mends_the_rest",
                reconciling_removes_strays_and_mends,
            ),
            (
                "attaching_again_replaces_what_was_there",
                attaching_again_replaces,
            ),
            (
                "a_failed_attachment_leaves_nothing",
                a_failed_attachment_leaves_nothing,
            ),
            (
                "a_container_that_is_gone_can_be_detached",
                a_container_that_is_gone_can_be_detached,
            ),
            (
                "many_containers_are_attached_at_once",
                many_containers_are_attached_at_once,
            ),
            ("the_mtu_is_the_uplink_s", the_mtu_is_the_uplink_s),
            (
                "strict_return_path_checks_are_no_obstacle",
                strict_return_path_checks,
            ),
            ("a_host_without_ipv6_has_a_network", a_host_without_ipv6),
            ("a_host_gets_another_subnet", a_host_gets_another_subnet),
            ("down_leaves_nothing", down_leaves_nothing),
        ],
    )
}

fn containers_reach_one_another() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
            assert_eq!(tcp_echo(&a.namespace, &b.namespace, to, MEGABYTES), from);
            udp_echo(
                &a.namespace,
                &b.namespace,
                to,
                &[1, 100, 1400, 1473, 8000, 30_000],
            );
            udp_echo(&b.namespace, &a.namespace, from, &[1]);
        }
        let endpoints = network.endpoints().unwrap();
        assert_eq!(endpoints.len(), 2);
        for (container, traffic) in endpoints {
            assert!(
                traffic.sent_bytes > 2 * MEGABYTES as u64,
                "{container:?} {traffic:?}"
            );
            assert!(
                traffic.received_bytes > 2 * MEGABYTES as u64,
                "{container:?} {traffic:?}"
            );
            // Segments, not what the stack passes on uncut.
            assert!(
                traffic.sent_packets > 2 * MEGABYTES as u64 / 1500,
                "{container:?} {traffic:?}"
            );
        }
        for (reason, count) in network.drops().unwrap() {
            assert!(
                count == 0 || reason == DropReason::Multicast,
                "{count} for {}",
                reason.name()
            );
        }
    });
}

fn the_host_and_containers_reach_one_another() {
    Host::run(|host| async move {
        let network = host.network().await;
        let a = Container::attach(&network, 2).await;
        let gateways: [IpAddr; 2] = [
            network.gateway().into(),
            "fd66:6c79:6e6e::6464:701".parse().unwrap(),
        ];
        for (container, gateway) in a.addresses().into_iter().zip(gateways) {
            assert_eq!(
                tcp_echo(&Host::namespace(), &a.namespace, container, MEGABYTES),
                gateway
            );
            assert_eq!(
                tcp_echo(&a.namespace, &Host::namespace(), gateway, MEGABYTES),
                container
            );
            udp_echo(
                &Host::namespace(),
                &a.namespace,
                container,
                &[1, 1400, 8000, 30_000],
            );
            udp_echo(
                &a.namespace,
                &Host::namespace(),
                gateway,
                &[1, 1400, 8000, 30_000],
            );
        }
    });
}

fn containers_reach_the_outside() {
    Host::run(|host| async move {
        let outside = Host::outside();
        let network = host.network().await;
        let a = Container::attach(&network, 2).await;
        let seen = tcp_echo(
            &a.namespace,
            &outside.namespace,
            outside.address.into(),
            MEGABYTES,
        );
        assert_eq!(seen, IpAddr::V4(outside.host_address));
        let seen = tcp_echo(
            &a.namespace,
            &outside.namespace,
            "2001:db8::2".parse().unwrap(),
            MEGABYTES,
        );
        assert_eq!(seen, "2001:db8::1".parse::<IpAddr>().unwrap());
        udp_echo(
            &a.namespace,
            &outside.namespace,
            outside.address.into(),
            &[1, 1400, 8000],
        );
    });
}

fn the_outside_does_not_reach_containers() {
    Host::run(|host| async move {
        let outside = Host::outside();
        let network = host.network().await;
        let a = Container::attach(&network, 2).await;
        outside.namespace.run(|| {
            ip(&["route", "add", "100.100.0.0/16", "via", "192.0.2.1"]);
            ip(&["route", "add", "fd66:6c79:6e6e::/64", "via", "2001:db8::1"]);
        });
        for to in a.addresses() {
            assert!(!arrives(&outside.namespace, &a.namespace, to), "{to}");
            assert!(arrives(&Host::namespace(), &a.namespace, to), "{to}");
        }

        // Nor by the tunnel.
        let before = drops(&network, DropReason::UnknownHost);
        let mut inner = Vec::new();
        PacketBuilder::ethernet2(mac(address(9)), mac(network.gateway()))
            .ipv4(address(9).octets(), a.ipv4.octets(), 64)
            .udp(1, 2)
            .write(&mut inner, b"forged")
            .unwrap();
        let tunnelled = [&[0x08, 0, 0, 0, 0, 0, 1, 0], inner.as_slice()].concat();
        let to = SocketAddr::new(outside.host_address.into(), 8472);
        outside
            .namespace
            .run(move || udp("0.0.0.0:0".parse().unwrap()).send_to(&tunnelled, to).unwrap());
        eventually("the forged packet is counted", || {
            drops(&network, DropReason::UnknownHost) == before + 1
        });
    });
}

/// A datagram in a frame.
fn frame(from_mac: [u8; 6], to_mac: [u8; 6], from: Ipv4Addr, to: SocketAddr) -> Vec<u8> {
    let IpAddr::V4(address) = to.ip() else {
        panic!("an IPv4 address")
    };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(from_mac, to_mac)
        .ipv4(from.octets(), address.octets(), 64)
        .udp(1000, to.port())
        .write(&mut frame, b"frame")
        .unwrap();
    frame
}

fn who_lies_about_its_address_is_dropped() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        let socket = b.namespace.run(move || udp(SocketAddr::new(b.ipv4.into(), 0)));
        let to = socket.local_addr().unwrap();
        let (own_mac, gateway_mac) = (mac(a.ipv4), mac(network.gateway()));

        let honest = frame(own_mac, gateway_mac, a.ipv4, to);
        a.namespace.run(move || send_frame("eth0", &honest));
        assert_eq!(
            socket.recv_from(&mut [0; 9]).unwrap(),
            (5, SocketAddr::new(a.ipv4.into(), 1000))
        );

        for (from_mac, from, reason) in [
            (own_mac, address(3), DropReason::SpoofedAddress),
            (own_mac, address(77), DropReason::SpoofedAddress),
            (own_mac, network.gateway(), DropReason::SpoofedAddress),
            (own_mac, Ipv4Addr::new(192, 0, 2, 9), DropReason::SpoofedAddress),
            (mac(address(3)), a.ipv4, DropReason::SpoofedMac),
        ] {
            let before = drops(&network, reason);
            let lie = frame(from_mac, gateway_mac, from, to);
            a.namespace.run(move || send_frame("eth0", &lie));
            eventually("the lie is counted", || drops(&network, reason) == before + 1);
        }
        // An address that the container gave itself.
        let before = drops(&network, DropReason::SpoofedAddress);
        a.namespace.run(move || {
            ip(&["address", "add", "100.100.7.200/32", "dev", "eth0"]);
            udp("100.100.7.200:0".parse().unwrap()).send_to(b"?", to).unwrap();
        });
        eventually("the lie is counted", || {
            drops(&network, DropReason::SpoofedAddress) == before + 1
        });

        socket.set_nonblocking(true).unwrap();
        assert!(socket.recv(&mut [0]).is_err(), "a lie has arrived");
    });
}

fn frames_that_are_not_carried() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        let plain = frame(
            mac(a.ipv4),
            mac(network.gateway()),
            a.ipv4,
            SocketAddr::new(b.ipv4.into(), 9),
        );
        let tagged = [&plain[..12], &[0x81, 0x00, 0x00, 0x01], &plain[12..]].concat();
        let short = plain[..30].to_vec();
        let mut arp = plain.clone();
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        let mut broadcast = plain.clone();
        broadcast[..6].fill(0xff);
        let mut version = plain;
        version[14] = 0x55;
        for (frame, reason) in [
            (tagged, DropReason::VlanTagged),
            (short, DropReason::Truncated),
            (arp, DropReason::NotIp),
            (broadcast, DropReason::Multicast),
            (version, DropReason::Malformed),
        ] {
            let before = drops(&network, reason);
            a.namespace.run(move || send_frame("eth0", &frame));
            // More than one where the kernel itself has something to tell a group.
            eventually(reason.name(), || drops(&network, reason) > before);
        }
    });
}

/// A connection on which every byte comes back.
fn connect(client: &Namespace, server: &Namespace, address: IpAddr) -> TcpStream {
    let listener = server.run(move || TcpListener::bind((address, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    server.spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            stream.write_all(&buffer[..length]).unwrap();
        }
    });
    client.run(move || {
        let stream = TcpStream::connect(to).unwrap();
        patient(&stream);
        stream
    })
}

fn works(mut stream: &TcpStream) {
    let mut answer = [0; 4];
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
}

fn connections_outlive_the_daemon() {
    Host::run(|host| async move {
        let outside = Host::outside();
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        let streams = [
            connect(&a.namespace, &b.namespace, b.ipv4.into()),
            connect(&a.namespace, &b.namespace, b.ipv6),
            connect(&Host::namespace(), &a.namespace, a.ipv4.into()),
            connect(&b.namespace, &Host::namespace(), network.gateway().into()),
            connect(&b.namespace, &outside.namespace, outside.address.into()),
        ];
        streams.iter().for_each(works);
        drop(network);
        streams.iter().for_each(works);
        tcp_echo(&a.namespace, &b.namespace, b.ipv4.into(), 1 << 16);

        let network = host.network().await;
        streams.iter().for_each(works);
        assert_eq!(network.endpoints().unwrap().len(), 2);
        let live = [a.ipv4, b.ipv4];
        assert_eq!(network.reconcile(&live).await.unwrap(), Reconciled::default());
        streams.iter().for_each(works);
        let c = Container::attach(&network, 4).await;
        tcp_echo(&a.namespace, &c.namespace, c.ipv4.into(), 1 << 16);
        network.detach(c.ipv4).await.unwrap();
        streams.iter().for_each(works);
    });
}

fn no_datagram_is_lost() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        let address = b.ipv4.into();
        let receiver = b.namespace.run(move || udp(SocketAddr::new(address, 0)));
        let to = receiver.local_addr().unwrap();
        let enough = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&enough);
        let sender = a.namespace.spawn(move || {
            let socket = udp("0.0.0.0:0".parse().unwrap());
            let mut sent = 0_u64;
            while !until.load(Ordering::Relaxed) {
                socket.send_to(&sent.to_be_bytes(), to).unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_micros(100));
            }
            socket.send_to(b"end", to).unwrap();
            sent
        });
        let receiver = std::thread::spawn(move || {
            let mut received = 0_u64;
            let mut buffer = [0; 8];
            while receiver.recv(&mut buffer).unwrap() == 8 {
                assert_eq!(u64::from_be_bytes(buffer), received, "datagrams were lost");
                received += 1;
            }
            received
        });
        drop(network);
        for _ in 0..20 {
            drop(host.network().await);
        }
        enough.store(true, Ordering::Relaxed);
        let sent = join(sender);
        assert_eq!(join(receiver), sent);
        assert!(sent > 100, "{sent} datagrams are no stream");
    });
}

fn reconciling_removes_strays_and_mends() {
    Host::run(|host| async move {
        let network = host.network().await;
        let kept = Container::attach(&network, 2).await;
        let mended = Container::attach(&network, 3).await;
        let stray = Container::attach(&network, 4).await;
        let gone = Container::attach(&network, 5).await;
        ip(&["link", "delete", &host_interface(gone.ipv4)]);
        drop(network);
        // What a daemon killed at a bad moment leaves: an interface without a program.
        fs::remove_file(
            host.config()
                .pins
                .join("links")
                .join(format!("from_container@{}", host_interface(mended.ipv4))),
        )
        .unwrap();
        ip(&["link", "add", "name", &host_interface(address(6)), "type", "veth"]);
        ip(&["link", "add", "name", "fvstranger", "type", "veth"]);

        let network = host.network().await;
        let stream = connect(&Host::namespace(), &kept.namespace, kept.ipv4.into());
        let found = network
            .reconcile(&[kept.ipv4, mended.ipv4, gone.ipv4])
            .await
            .unwrap();
        assert_eq!(
            found,
            Reconciled {
                removed: vec![stray.ipv4, address(6)],
                missing: vec![gone.ipv4]
            }
        );
        works(&stream);
        tcp_echo(&kept.namespace, &mended.namespace, mended.ipv4.into(), 1 << 16);
        assert_eq!(
            stray
                .namespace
                .run(|| ip(&["-o", "link", "show", "type", "veth"])),
            ""
        );
        let interfaces = ip(&["-o", "link", "show", "type", "veth"]);
        assert_eq!(interfaces.lines().count(), 4, "{interfaces}");
        assert!(interfaces.contains("fvstranger"), "{interfaces}");
        assert_eq!(
            network
                .reconcile(&[kept.ipv4, mended.ipv4])
                .await
                .unwrap()
                .removed,
            [gone.ipv4]
        );
        assert_eq!(
            network.reconcile(&[kept.ipv4, mended.ipv4]).await.unwrap(),
            Reconciled::default()
        );
    });
}

fn attaching_again_replaces() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        let successor = Container::attach(&network, 3).await;
        tcp_echo(&a.namespace, &successor.namespace, successor.ipv4.into(), 1 << 16);
        assert_eq!(
            b.namespace.run(|| ip(&["-o", "link", "show", "type", "veth"])),
            ""
        );
        assert_eq!(network.endpoints().unwrap().len(), 2);
    });
}

fn a_failed_attachment_leaves_nothing() {
    Host::run(|host| async move {
        let network = host.network().await;
        let namespace = Namespace::new();
        namespace.run(|| ip(&["link", "add", "name", "eth0", "type", "veth"]));
        let error = network.attach(namespace.as_fd(), address(2)).await.unwrap_err();
        assert!(error.to_string().contains("100.100.7.2"), "{error}");
        assert!(!ip(&["-o", "link"]).contains("fv"));
        assert_eq!(network.endpoints().unwrap(), []);

        let empty = Namespace::new();
        for wrong in [
            network.gateway(),
            address(0),
            address(255),
            Ipv4Addr::new(100, 100, 8, 2),
        ] {
            assert!(network.attach(empty.as_fd(), wrong).await.is_err(), "{wrong}");
        }
        network.attach(empty.as_fd(), address(2)).await.unwrap();
    });
}

fn a_container_that_is_gone_can_be_detached() {
    Host::run(|host| async move {
        let network = host.network().await;
        let gone = Container::attach(&network, 2).await.ipv4;
        // The namespace goes with its last user, and its interface with it.
        eventually("the veth is gone", || !ip(&["-o", "link"]).contains("fv"));
        network.detach(gone).await.unwrap();
        network.detach(gone).await.unwrap();
        assert_eq!(network.endpoints().unwrap(), []);
        // The gateway's address and routes do not go with an interface that had the address, too.
        let routes = ip(&["route"]);
        assert!(
            routes.contains("100.100.0.0/16 dev flynn0") && routes.contains("src 100.100.7.1"),
            "{routes}"
        );
        let next = Container::attach(&network, 2).await;
        assert_eq!(
            tcp_echo(&Host::namespace(), &next.namespace, next.ipv4.into(), 1 << 16),
            IpAddr::V4(network.gateway())
        );
    });
}

fn many_containers_are_attached_at_once() {
    Host::run(|host| async move {
        let network = host.network().await;
        let containers = (2..34).map(|last| Container::attach(&network, last));
        let containers = futures::future::join_all(containers).await;
        assert_eq!(network.endpoints().unwrap().len(), 32);
        for pair in containers.windows(2) {
            tcp_echo(&pair[0].namespace, &pair[1].namespace, pair[1].ipv4.into(), 1000);
        }
        let live: Vec<_> = containers.iter().map(|container| container.ipv4).collect();
        assert_eq!(network.reconcile(&live).await.unwrap(), Reconciled::default());
    });
}

fn the_mtu_is_the_uplink_s() {
    Host::run(|host| async move {
        let outside = Host::outside();
        ip(&["link", "set", "uplink", "mtu", "1400"]);
        outside
            .namespace
            .run(|| ip(&["link", "set", "eth0", "mtu", "1400"]));
        let network = host.network().await;
        let namespace = Namespace::new();
        let endpoint = network.attach(namespace.as_fd(), address(2)).await.unwrap();
        assert_eq!(endpoint.mtu, 1400);
        let routes = namespace.run(|| ip(&["route"]));
        assert!(
            routes.contains("100.100.0.0/16 via 100.100.7.1 dev eth0 proto static onlink mtu 1350"),
            "{routes}"
        );
        tcp_echo(&namespace, &outside.namespace, outside.address.into(), MEGABYTES);

        let named = NetworkConfig {
            uplink: Some("nothing".into()),
            ..host.config()
        };
        let error = Network::up(named).await.err().unwrap();
        assert!(error.to_string().contains("nothing"), "{error}");
    });
}

fn strict_return_path_checks() {
    Host::run(|host| async move {
        let outside = Host::outside();
        for key in ["all", "default"] {
            fs::write(format!("/proc/sys/net/ipv4/conf/{key}/rp_filter"), "1").unwrap();
        }
        let network = host.network().await;
        let a = Container::attach(&network, 2).await;
        tcp_echo(&Host::namespace(), &a.namespace, a.ipv4.into(), 1 << 16);
        tcp_echo(&a.namespace, &outside.namespace, outside.address.into(), 1 << 16);
    });
}

fn a_host_without_ipv6() {
    Host::run(|host| async move {
        for key in ["all", "default"] {
            fs::write(format!("/proc/sys/net/ipv6/conf/{key}/disable_ipv6"), "1").unwrap();
        }
        let network = host.network().await;
        assert_eq!(network.config().cluster6, None);
        let (a, b) = (Namespace::new(), Namespace::new());
        assert_eq!(
            network.attach(a.as_fd(), address(2)).await.unwrap().address6,
            None
        );
        network.attach(b.as_fd(), address(3)).await.unwrap();
        tcp_echo(&a, &b, address(3).into(), 1 << 16);
    });
}

fn a_host_gets_another_subnet() {
    Host::run(|host| async move {
        let network = host.network().await;
        let old = Container::attach(&network, 2).await;
        drop(network);
        let moved = NetworkConfig {
            subnet: "100.100.8.0/24".parse().unwrap(),
            ..host.config()
        };
        let network = Network::up(moved).await.unwrap();
        assert_eq!(network.reconcile(&[]).await.unwrap().removed, [old.ipv4]);
        let addresses = ip(&["address"]);
        assert!(
            addresses.contains("100.100.8.1/32") && !addresses.contains("100.100.7."),
            "{addresses}"
        );
        let routes = ip(&["route"]);
        assert!(!routes.contains("100.100.7."), "{routes}");
        let namespace = Namespace::new();
        let new = Ipv4Addr::new(100, 100, 8, 2);
        network.attach(namespace.as_fd(), new).await.unwrap();
        tcp_echo(&Host::namespace(), &namespace, new.into(), 1000);
        let before = drops(&network, DropReason::NoEndpoint);
        namespace.run(|| {
            udp("0.0.0.0:0".parse().unwrap())
                .send_to(b"?", "100.100.7.1:9")
                .unwrap()
        });
        eventually("the old gateway is nobody", || {
            drops(&network, DropReason::NoEndpoint) == before + 1
        });
    });
}

fn down_leaves_nothing() {
    Host::run(|host| async move {
        let before = ip(&["-o", "link"]);
        let network = host.network().await;
        let a = Container::attach(&network, 2).await;
        network.down().await.unwrap();
        assert_eq!(ip(&["-o", "link"]), before);
        assert_eq!(ip(&["route"]), "");
        assert!(!fs::exists(host.config().pins).unwrap());
        let rules = std::process::Command::new("nft")
            .args(["list", "ruleset"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(rules.stdout).unwrap(), "");
        drop(a);

        let network = host.network().await;
        let a = Container::attach(&network, 2).await;
        tcp_echo(&Host::namespace(), &a.namespace, a.ipv4.into(), 1000);
    });
}
