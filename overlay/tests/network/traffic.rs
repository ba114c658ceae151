//! Who reaches whom, and who does not.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsFd,
};

use etherparse::PacketBuilder;
use flynn_overlay::{Attachment, DropReason, Network, NetworkConfig, mac};

use crate::support::{
    Container, Host, MEGABYTES, Namespace, address, arrives, drops, eventually, ip, send_frame, tcp_echo,
    udp, udp_echo,
};

pub(crate) fn containers_reach_one_another() {
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

pub(crate) fn the_host_and_containers_reach_one_another() {
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

pub(crate) fn containers_reach_the_outside() {
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

pub(crate) fn the_outside_does_not_reach_containers() {
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
            eventually("the host reaches it", || {
                arrives(&Host::namespace(), &a.namespace, to)
            });
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

pub(crate) fn who_lies_about_its_address_is_dropped() {
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

pub(crate) fn frames_that_are_not_carried() {
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

pub(crate) fn the_mtu_is_the_uplink_s() {
    Host::run(|host| async move {
        let outside = Host::outside();
        ip(&["link", "set", "uplink", "mtu", "1400"]);
        outside
            .namespace
            .run(|| ip(&["link", "set", "eth0", "mtu", "1400"]));
        let network = host.network().await;
        let namespace = Namespace::new();
        let endpoint = network
            .attach(namespace.as_fd(), address(2), &Attachment::default())
            .await
            .unwrap();
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

pub(crate) fn strict_return_path_checks() {
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

pub(crate) fn a_host_without_ipv6() {
    Host::run(|host| async move {
        for key in ["all", "default"] {
            fs::write(format!("/proc/sys/net/ipv6/conf/{key}/disable_ipv6"), "1").unwrap();
        }
        let network = host.network().await;
        assert_eq!(network.config().cluster6, None);
        let (a, b) = (Namespace::new(), Namespace::new());
        assert_eq!(
            network
                .attach(a.as_fd(), address(2), &Attachment::default())
                .await
                .unwrap()
                .address6,
            None
        );
        network
            .attach(b.as_fd(), address(3), &Attachment::default())
            .await
            .unwrap();
        tcp_echo(&a, &b, address(3).into(), 1 << 16);
    });
}
