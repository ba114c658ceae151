//! Containers and hosts of a cluster, each with each.

use std::{fs, net::IpAddr};

use flynn_overlay::DropReason;

use crate::{
    cluster::Cluster,
    support::{
        Datagrams, MEGABYTES, arrives, drops, eventually, ip, live, rounds, segmented, tcp_echo, udp_echo,
    },
};

/// From a single byte to what takes many packets, with the edges of the tunnel between.
const DATAGRAMS: [usize; 8] = [1, 100, 1400, 1423, 1450, 1473, 8000, 60_000];

pub(crate) fn all_reach_one_another() {
    Cluster::run(3, |cluster| {
        let containers: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| [node.attach(2), node.attach(3)])
            .collect();
        let containers: Vec<_> = containers.into_iter().flatten().collect();
        for (number, client) in containers.iter().enumerate() {
            for server in &containers[..number] {
                for (from, to) in client.addresses().into_iter().zip(server.addresses()) {
                    for length in [1, 1000, 1 << 20] {
                        assert_eq!(tcp_echo(&client.namespace, &server.namespace, to, length), from);
                    }
                    udp_echo(&client.namespace, &server.namespace, to, &DATAGRAMS);
                    segmented(&client.namespace, &server.namespace, to, 1200, 40);
                    segmented(&server.namespace, &client.namespace, from, 1200, 40);
                }
            }
        }
        let [client, .., server] = containers.as_slice() else {
            unreachable!()
        };
        tcp_echo(
            &client.namespace,
            &server.namespace,
            server.ipv4.into(),
            MEGABYTES,
        );
        assert_eq!(cluster.drops(), []);
        for node in &cluster.nodes {
            for (container, traffic) in node.network.endpoints().unwrap() {
                assert!(
                    traffic.sent_bytes > 1 << 20 && traffic.received_bytes > 1 << 20,
                    "{container:?}"
                );
            }
        }
    });
}

pub(crate) fn hosts_reach_containers() {
    Cluster::run(2, |cluster| {
        let [one, two] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let container = two.attach(2);
        let gateways: [IpAddr; 2] = [
            one.network.gateway().into(),
            "fd66:6c79:6e6e::6464:101".parse().unwrap(),
        ];
        for (to, from) in container.addresses().into_iter().zip(gateways) {
            assert_eq!(
                tcp_echo(&one.namespace, &container.namespace, to, MEGABYTES),
                from
            );
            udp_echo(&one.namespace, &container.namespace, to, &DATAGRAMS);
            segmented(&one.namespace, &container.namespace, to, 1200, 40);
            assert_eq!(
                tcp_echo(&container.namespace, &one.namespace, from, MEGABYTES),
                to
            );
            udp_echo(&container.namespace, &one.namespace, from, &DATAGRAMS);
            segmented(&container.namespace, &one.namespace, from, 1200, 40);
        }
        let other = two.network.gateway().into();
        tcp_echo(&one.namespace, &two.namespace, other, 1 << 16);
        assert_eq!(cluster.drops(), []);
    });
}

pub(crate) fn too_big() {
    Cluster::run(2, |cluster| {
        let [one, two] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let (a, b) = (one.attach(2), two.attach(2));
        for container in [&a, &b] {
            // As of a container that forwards for others, which do not know of the tunnel.
            container.namespace.run(|| {
                for family in ["-4", "-6"] {
                    for route in ip(&[family, "route"])
                        .lines()
                        .filter(|route| route.contains(" mtu "))
                    {
                        let words: Vec<_> = route.split(' ').collect();
                        ip(&[family, "route", "delete", words[0]]);
                    }
                }
            });
        }
        for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
            assert_eq!(tcp_echo(&a.namespace, &b.namespace, to, MEGABYTES), from);
            if to.is_ipv4() {
                udp_echo(&a.namespace, &b.namespace, to, &[1, 1440, 8000]);
            }
        }
        assert_eq!(drops(&one.network, DropReason::TooBig), 0);
    });
}

pub(crate) fn by_hand() {
    Cluster::run(2, |cluster| {
        let [one, two] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let (a, b) = (one.attach(2), two.attach(2));
        for to in b.addresses() {
            tcp_echo(&a.namespace, &b.namespace, to, MEGABYTES);
            udp_echo(&a.namespace, &b.namespace, to, &DATAGRAMS);
            tcp_echo(&one.namespace, &b.namespace, to, 1);
        }
        for node in &cluster.nodes {
            let counts = node
                .namespace
                .run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
            let device = counts
                .lines()
                .find(|line| line.trim().starts_with("flynn0:"))
                .unwrap();
            let received: u64 = device.split_whitespace().nth(2).unwrap().parse().unwrap();
            // Nothing but what is for a host itself.
            assert!(received < 50, "{received} packets took the slow way: {device}");
        }
    });
}

pub(crate) fn streams_outlive_daemons() {
    Cluster::run(2, |mut cluster| {
        let (a, b) = (cluster.nodes[0].attach(2), cluster.nodes[1].attach(2));
        let there = Datagrams::start(&a.namespace, &b.namespace, b.ipv4.into());
        let back = Datagrams::start(&b.namespace, &a.namespace, a.ipv4.into());
        for _ in 0..rounds() / 2 {
            for node in &mut cluster.nodes {
                node.restart();
                // Before anybody says which hosts there are, those which there were stay.
                node.run(async |network| network.refresh().await.unwrap());
                let own = [a.ipv4, b.ipv4]
                    .into_iter()
                    .filter(|address| node.config.subnet.contains(address));
                let live = live(&own.collect::<Vec<_>>());
                node.run(async move |network| network.reconcile(&live).await.unwrap());
            }
            cluster.introduce(|_, _| false);
        }
        assert_eq!(cluster.drops(), []);
        there.arrive();
        back.arrive();
        assert_eq!(cluster.drops(), []);
    });
}

pub(crate) fn routes_change() {
    Cluster::run(2, |cluster| {
        let [one, two] = cluster.nodes.as_slice() else {
            unreachable!()
        };
        let (a, b) = (one.attach(2), two.attach(2));
        tcp_echo(&a.namespace, &b.namespace, b.ipv4.into(), 1);
        let follower = one.follow_routes();
        one.namespace.run(|| ip(&["route", "delete", "default"]));
        eventually("the way is gone", || {
            !arrives(&a.namespace, &b.namespace, b.ipv4.into())
                && drops(&one.network, DropReason::NoRoute) > 0
        });
        one.namespace
            .run(|| ip(&["route", "add", "198.51.100.0/24", "via", "192.0.2.254"]));
        eventually("there is another way", || {
            arrives(&a.namespace, &b.namespace, b.ipv4.into())
        });
        drop(follower);
    });
}
