//! The network with real packets: hosts and containers as namespaces, real sockets in them.

mod support;

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd,
};

use flynn_overlay::Network;
use libtest_mimic::{Arguments, Trial};
use support::{Host, Namespace, tcp_echo, udp_echo};

const MEGABYTES: usize = 8 << 20;

fn main() {
    let obstacle = support::obstacle();
    if let Some(obstacle) = obstacle {
        eprintln!("skipping the tests of the network: this machine {obstacle} for them");
    }
    let test = |name: &str, run: fn()| {
        let trial = Trial::test(name, move || {
            run();
            Ok(())
        });
        trial
            .with_ignored_flag(obstacle.is_some())
            .with_kind(obstacle.unwrap_or_default())
    };
    let tests = vec![
        test("containers_reach_one_another", containers_reach_one_another),
        test(
            "the_host_and_containers_reach_one_another",
            the_host_and_containers_reach_one_another,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests).exit();
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, 7, last)
}

async fn container(network: &Network, last: u8) -> (Namespace, [IpAddr; 2]) {
    let namespace = Namespace::new();
    let endpoint = network.attach(namespace.as_fd(), address(last)).await.unwrap();
    (
        namespace,
        [endpoint.address.into(), endpoint.address6.unwrap().into()],
    )
}

fn containers_reach_one_another() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, a_addresses) = container(&network, 2).await;
        let (b, b_addresses) = container(&network, 3).await;
        for (from, to) in a_addresses.into_iter().zip(b_addresses) {
            assert_eq!(tcp_echo(&a, &b, to, MEGABYTES), from);
            udp_echo(&a, &b, to, &[1, 100, 1400, 1473, 8000, 30_000]);
            udp_echo(&b, &a, from, &[1]);
        }
    });
}

fn the_host_and_containers_reach_one_another() {
    Host::run(|host| async move {
        let network = host.network().await;
        let (a, a_addresses) = container(&network, 2).await;
        let gateways: [IpAddr; 2] = [
            network.gateway().into(),
            "fd66:6c79:6e6e::6464:701".parse().unwrap(),
        ];
        for (container, gateway) in a_addresses.into_iter().zip(gateways) {
            assert_eq!(tcp_echo(&host.namespace(), &a, container, MEGABYTES), gateway);
            assert_eq!(tcp_echo(&a, &host.namespace(), gateway, MEGABYTES), container);
            udp_echo(&host.namespace(), &a, container, &[1, 1400, 8000, 30_000]);
            udp_echo(&a, &host.namespace(), gateway, &[1, 1400, 8000, 30_000]);
        }
    });
}
