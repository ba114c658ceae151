//! Containers and hosts of a cluster, each with each.

use std::net::IpAddr;

use flynn_overlay::DropReason;

use crate::{
    cluster::Cluster,
    support::{MEGABYTES, drops, ip, segmented, tcp_echo, udp_echo},
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
