//! A cluster: hosts as network namespaces, joined by a switch.

use std::{net::Ipv4Addr, os::fd::AsRawFd, sync::Arc};

use flynn_overlay::{Attachment, Encryption, Host, Network, NetworkConfig, Peer, WIREGUARD_PORT, Wireguard};
use tokio::runtime::{Builder, Runtime};

use crate::support::{self, Container, Namespace, ip};

/// One of a cluster's hosts.
pub(crate) struct Node {
    pub(crate) namespace: Namespace,
    pub(crate) address: Ipv4Addr,
    pub(crate) config: NetworkConfig,
    pub(crate) network: Arc<Network>,
    runtime: Arc<Runtime>,
}

/// What a host's daemon does all the time; until this is dropped.
pub(crate) struct Following(Option<tokio::sync::oneshot::Sender<()>>);

impl Drop for Following {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

/// Some hosts. Those with odd numbers are on one link and those with even numbers on another, with a router between.
pub(crate) struct Cluster {
    /// What joins them.
    pub(crate) switch: Namespace,
    pub(crate) nodes: Vec<Node>,
}

impl Cluster {
    /// Runs a test with a cluster of so many hosts, which know one another.
    pub(crate) fn run(count: u8, test: impl FnOnce(Cluster) + Send + 'static) {
        Self::run_encrypted(count, |_| None, test);
    }

    /// The same with hosts that encrypt or not, by their numbers from 1 on.
    pub(crate) fn run_encrypted(
        count: u8,
        encryption: impl Fn(u8) -> Option<Encryption> + Send + 'static,
        test: impl FnOnce(Cluster) + Send + 'static,
    ) {
        support::Host::run(move |host| async move {
            let switch = Namespace::new();
            switch.run(|| {
                for (bridge, gateway) in [("odd", "192.0.2.254/24"), ("even", "198.51.100.254/24")] {
                    ip(&["link", "add", bridge, "type", "bridge"]);
                    ip(&["address", "add", gateway, "dev", bridge]);
                    ip(&["link", "set", bridge, "up"]);
                }
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            });
            // A runtime must not begin within another.
            let cluster = std::thread::spawn(move || {
                let nodes = (1..=count)
                    .map(|number| Node::up(number, &switch, &host, encryption(number)))
                    .collect();
                let cluster = Cluster { switch, nodes };
                cluster.introduce(|_, _| false);
                test(cluster);
            });
            support::join(cluster);
        });
    }

    /// Has all hosts know one another, directly where it is said.
    pub(crate) fn introduce(&self, direct: impl Fn(usize, usize) -> bool) {
        for (number, node) in self.nodes.iter().enumerate() {
            let hosts = self.nodes.iter().enumerate().map(|(other, host)| Host {
                address: host.address,
                subnet: host.config.subnet,
                direct: direct(number, other),
                wireguard: host.peer(),
            });
            let hosts: Vec<_> = hosts.collect();
            node.run(async move |network| network.set_hosts(&hosts).await.unwrap());
        }
    }

    /// All drops of all hosts, but for what kernels tell groups when they start an interface.
    pub(crate) fn drops(&self) -> Vec<(usize, &'static str, u64)> {
        let of = |(number, node): (usize, &Node)| {
            let drops = node.network.drops().unwrap();
            let drops = drops
                .into_iter()
                .map(move |(reason, count)| (number, reason.name(), count));
            drops
                .filter(|(_, name, count)| *count != 0 && *name != "multicast")
                .collect::<Vec<_>>()
        };
        self.nodes.iter().enumerate().flat_map(of).collect()
    }
}

/// Where a test has failed, what was dropped may say why.
impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("dropped, by host: {:?}", self.drops());
        }
    }
}

impl Node {
    fn up(number: u8, switch: &Namespace, host: &support::Host, encryption: Option<Encryption>) -> Self {
        use std::os::fd::AsFd;
        let namespace = Namespace::new();
        let descriptor = namespace.as_fd().as_raw_fd();
        let inside = format!("/proc/{}/fd/{descriptor}", std::process::id());
        let (bridge, network) = if number % 2 == 1 {
            ("odd", [192, 0, 2])
        } else {
            ("even", [198, 51, 100])
        };
        let [a, b, c] = network;
        let address = Ipv4Addr::new(a, b, c, number);
        let port = format!("port{number}");
        switch.run(move || {
            ip(&[
                "link", "add", &port, "type", "veth", "peer", "name", "uplink", "netns", &inside,
            ]);
            ip(&["link", "set", &port, "master", bridge, "up"]);
        });
        namespace.run(move || {
            ip(&["link", "set", "lo", "up"]);
            ip(&["address", "add", &format!("{address}/24"), "dev", "uplink"]);
            ip(&["link", "set", "uplink", "up"]);
            ip(&["route", "add", "default", "via", &format!("{a}.{b}.{c}.254")]);
        });
        let config = NetworkConfig {
            subnet: format!("100.100.{number}.0/24").parse().unwrap(),
            pins: host.pins.with_file_name(format!("host{number}")),
            encryption,
            ..host.config()
        };
        let runtime = Arc::new(Builder::new_current_thread().enable_all().build().unwrap());
        let network = bring_up(&namespace, &runtime, &config);
        Self {
            namespace,
            address,
            config,
            network,
            runtime,
        }
    }

    /// Does what a daemon that is started anew does.
    pub(crate) fn restart(&mut self) {
        self.network = bring_up(&self.namespace, &self.runtime, &self.config);
    }

    /// Runs something with the host's network, in its namespace.
    pub(crate) fn run<R, F>(&self, run: F) -> R
    where
        R: Send + 'static,
        F: AsyncFnOnce(Arc<Network>) -> R + Send + 'static,
    {
        let (runtime, network) = (Arc::clone(&self.runtime), Arc::clone(&self.network));
        self.namespace.run(move || runtime.block_on(run(network)))
    }

    /// How others know it to WireGuard, if it encrypts.
    pub(crate) fn peer(&self) -> Option<Peer> {
        match self.network.wireguard() {
            Wireguard::On(key) => Some(Peer {
                key,
                port: WIREGUARD_PORT,
            }),
            Wireguard::Off => None,
            Wireguard::Unavailable(why) => panic!("{why}"),
        }
    }

    /// Follows changes of routes until the result is dropped.
    pub(crate) fn follow_routes(&self) -> Following {
        self.follow(async |network| network.follow_routes().await.unwrap())
    }

    /// Looks for handshakes until the result is dropped.
    pub(crate) fn follow_handshakes(&self) -> Following {
        self.follow(async |network| network.follow_handshakes().await)
    }

    fn follow(&self, follow: impl AsyncFnOnce(Arc<Network>) + Send + 'static) -> Following {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (runtime, network) = (Arc::clone(&self.runtime), Arc::clone(&self.network));
        self.namespace.spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = follow(network) => {}
                    _ = receiver => {}
                }
            });
        });
        Following(Some(sender))
    }

    /// A container with the address that ends so.
    pub(crate) fn attach(&self, last: u8) -> Container {
        self.attach_as(last, Attachment::default())
    }

    /// A container that is something to policy.
    pub(crate) fn attach_as(&self, last: u8, attachment: Attachment) -> Container {
        self.run(async move |network| Container::attach_as(&network, last, &attachment).await)
    }
}

fn bring_up(namespace: &Namespace, runtime: &Arc<Runtime>, config: &NetworkConfig) -> Arc<Network> {
    let (runtime, config) = (Arc::clone(runtime), config.clone());
    namespace.run(move || Arc::new(runtime.block_on(Network::up(config)).unwrap()))
}
