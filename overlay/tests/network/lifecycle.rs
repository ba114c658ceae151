//! What comes, goes, dies and is found again.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd,
};

use flynn_overlay::{Attachment, DropReason, Network, NetworkConfig, Reconciled, host_interface};

use crate::support::{
    Container, Datagrams, Host, Namespace, address, drops, eventually, ip, live, patient, rounds, tcp_echo,
    udp,
};

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

pub(crate) fn connections_outlive_the_daemon() {
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
        assert_eq!(
            network.reconcile(&live(&[a.ipv4, b.ipv4])).await.unwrap(),
            Reconciled::default()
        );
        streams.iter().for_each(works);
        let c = Container::attach(&network, 4).await;
        tcp_echo(&a.namespace, &c.namespace, c.ipv4.into(), 1 << 16);
        network.detach(c.ipv4).await.unwrap();
        streams.iter().for_each(works);
    });
}

pub(crate) fn no_datagram_is_lost() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, b) = (
            Container::attach(&network, 2).await,
            Container::attach(&network, 3).await,
        );
        let stream = Datagrams::start(&a.namespace, &b.namespace, b.ipv4.into());
        drop(network);
        for _ in 0..2 * rounds() {
            drop(host.network().await);
        }
        stream.arrive();
    });
}

pub(crate) fn reconciling_removes_strays_and_mends() {
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
            .reconcile(&live(&[kept.ipv4, mended.ipv4, gone.ipv4]))
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
                .reconcile(&live(&[kept.ipv4, mended.ipv4]))
                .await
                .unwrap()
                .removed,
            [gone.ipv4]
        );
        assert_eq!(
            network.reconcile(&live(&[kept.ipv4, mended.ipv4])).await.unwrap(),
            Reconciled::default()
        );
    });
}

pub(crate) fn attaching_again_replaces() {
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

pub(crate) fn a_failed_attachment_leaves_nothing() {
    Host::run(|host| async move {
        let network = host.network().await;
        let namespace = Namespace::new();
        namespace.run(|| ip(&["link", "add", "name", "eth0", "type", "veth"]));
        let error = network
            .attach(namespace.as_fd(), address(2), &Attachment::default())
            .await
            .unwrap_err();
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
            assert!(
                network
                    .attach(empty.as_fd(), wrong, &Attachment::default())
                    .await
                    .is_err(),
                "{wrong}"
            );
        }
        network
            .attach(empty.as_fd(), address(2), &Attachment::default())
            .await
            .unwrap();
    });
}

pub(crate) fn a_container_that_is_gone_can_be_detached() {
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

pub(crate) fn many_containers_are_attached_at_once() {
    Host::run(|host| async move {
        let network = host.network().await;
        let containers = (2..34).map(|last| Container::attach(&network, last));
        let containers = futures::future::join_all(containers).await;
        assert_eq!(network.endpoints().unwrap().len(), 32);
        for pair in containers.windows(2) {
            tcp_echo(&pair[0].namespace, &pair[1].namespace, pair[1].ipv4.into(), 1000);
        }
        let addresses: Vec<_> = containers.iter().map(|container| container.ipv4).collect();
        assert_eq!(
            network.reconcile(&live(&addresses)).await.unwrap(),
            Reconciled::default()
        );
    });
}

pub(crate) fn a_host_gets_another_subnet() {
    Host::run(|host| async move {
        let network = host.network().await;
        let old = Container::attach(&network, 2).await;
        drop(network);
        let moved = NetworkConfig {
            subnet: "100.100.8.0/24".parse().unwrap(),
            ..host.config()
        };
        let network = Network::up(moved).await.unwrap();
        assert_eq!(network.reconcile(&live(&[])).await.unwrap().removed, [old.ipv4]);
        let addresses = ip(&["address"]);
        assert!(
            addresses.contains("100.100.8.1/32") && !addresses.contains("100.100.7."),
            "{addresses}"
        );
        let routes = ip(&["route"]);
        assert!(!routes.contains("100.100.7."), "{routes}");
        let namespace = Namespace::new();
        let new = Ipv4Addr::new(100, 100, 8, 2);
        network
            .attach(namespace.as_fd(), new, &Attachment::default())
            .await
            .unwrap();
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

pub(crate) fn down_leaves_nothing() {
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
