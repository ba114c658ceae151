//! The load balancer with real sockets: a client, two hosts and a container of each, joined by a bridge.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

#[path = "support/hosts.rs"]
mod hosts;
mod support;

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    path::Path,
    thread,
};

use flynn_dataplane::{
    Protocol,
    lb::{Backend, Balancer, Event, Limits, Mode, Service, Uplink, Vip},
};
use hosts::{BACKEND_PORT, Node, PATIENCE, Place, address, address6, connect, exchange, index, mac, plug};
use support::{alone, ip, pins};

const PORT: u16 = 3000;

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            ("a_container_of_the_first_host", a_container_of_the_first_host),
            ("a_container_of_another_host", a_container_of_another_host),
            ("answers_through_the_first_host", answers_through_the_first_host),
            ("hosts_on_one_link", hosts_on_one_link),
            (
                "connections_survive_other_backends",
                connections_survive_other_backends,
            ),
            (
                "connections_are_found_by_way_of_a_third",
                connections_are_found_by_way_of_a_third,
            ),
            ("a_closed_port_is_told_of", a_closed_port_is_told_of),
            ("foreign_programs_stay", foreign_programs_stay),
        ],
    )
}

struct World {
    /// Joins the others, as long as it is there.
    _switch: Place,
    client: Place,
    hosts: [Balanced; 2],
}

/// A host with its container.
struct Balanced {
    node: Node,
    balancer: Balancer,
}

fn container(host: u8) -> Ipv4Addr {
    hosts::container(host, 2)
}

impl World {
    fn new(bpffs: &Path, mode: Mode, direct: bool) -> Self {
        let (switch, client) = (Place::new(), Place::new());
        switch.ip("link add br0 type bridge");
        switch.ip("link set dev br0 up");
        plug(&switch, &client, 9);
        let hosts = [1, 2].map(|number| Balanced::new(&switch, number, bpffs, mode, direct));
        Self {
            _switch: switch,
            client,
            hosts,
        }
    }

    fn set(&mut self, service: &Service) {
        for Balanced { node, balancer } in &mut self.hosts {
            node.place
                .run(move || balancer.set(std::slice::from_ref(service)).unwrap());
        }
    }

    fn event(&self, host: usize, event: Event) -> u64 {
        let events = self.hosts[host].balancer.events().unwrap();
        events.iter().find(|(other, _)| *other == event).unwrap().1
    }

    /// The client is answered, over all protocols, whatever the size.
    fn works(&self) {
        for vip in [IpAddr::V4(address(1)), IpAddr::V6(address6(1))] {
            self.client.run(|| {
                for size in [1, 1400, 1 << 20] {
                    let mut stream = connect((vip, PORT).into());
                    exchange(&mut stream, size);
                }
                let socket = UdpSocket::bind((if vip.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.connect((vip, PORT)).unwrap();
                for size in [1_usize, 512, 1300] {
                    let sent: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
                    socket.send(&sent).unwrap();
                    let mut received = [0; 2000];
                    let length = socket
                        .recv(&mut received)
                        .unwrap_or_else(|error| panic!("{vip} {size}: {error}"));
                    assert_eq!(received[..length], sent);
                }
            });
        }
    }
}

/// Where a test has failed, what the hosts have counted says how far packets came.
impl Drop for World {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        for (host, number) in self.hosts.iter().zip(1..) {
            let mut drops = host.node.dataplane.drops().unwrap_or_default();
            drops.retain(|(_, count)| *count > 0);
            let mut events = host.balancer.events().unwrap_or_default();
            events.retain(|(_, count)| *count > 0);
            eprintln!("host {number}: dropped {drops:?}, counted {events:?}");
        }
    }
}

impl Balanced {
    fn new(switch: &Place, number: u8, bpffs: &Path, mode: Mode, direct: bool) -> Self {
        let mut node = Node::new(switch, number, bpffs, direct);
        node.add(2);
        let pins = &node.pins;
        let balancer = node.place.run(|| {
            let uplink = Uplink {
                name: "up0".into(),
                index: index("up0"),
                mtu: 1500,
                mac: mac(1, number),
                is_device: false,
            };
            let limits = Limits {
                flows: 1 << 12,
                flood: 100_000,
            };
            Balancer::open(pins, uplink, mode, &limits).unwrap()
        });
        Self { node, balancer }
    }
}

fn service(hosts: &[u8]) -> Service {
    let vip = |address: IpAddr, protocol| Vip {
        address,
        port: PORT,
        protocol,
    };
    let addresses = [1, 2]
        .into_iter()
        .flat_map(|host| [IpAddr::V4(address(host)), IpAddr::V6(address6(host))]);
    Service {
        vips: addresses
            .flat_map(|address| [vip(address, Protocol::Tcp), vip(address, Protocol::Udp)])
            .collect(),
        backends: hosts
            .iter()
            .map(|host| Backend::new(container(*host), BACKEND_PORT))
            .collect(),
        ..Service::default()
    }
}

fn a_container_of_the_first_host() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, Mode::Auto, false);
        world.set(&service(&[1]));
        world.works();
        assert_eq!(world.event(0, Event::Encapsulated), 0);
    });
}

fn a_container_of_another_host() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, Mode::Auto, false);
        world.set(&service(&[2]));
        world.works();
        assert!(world.event(0, Event::Encapsulated) > 10);
        assert_eq!(
            world.event(0, Event::Answered),
            0,
            "answers do not come by the first host"
        );
        assert!(world.event(1, Event::Answered) > 10);
    });
}

fn answers_through_the_first_host() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, Mode::Auto, false);
        world.set(&Service {
            first_host: true,
            ..service(&[2])
        });
        world.works();
        assert!(world.event(0, Event::Answered) > 10);
    });
}

fn hosts_on_one_link() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, Mode::Auto, true);
        world.set(&service(&[2]));
        world.works();
        // IPv6 is never sent without the tunnel.
        assert!(world.event(0, Event::Direct) > 10 && world.event(0, Event::Encapsulated) > 10);
    });
}

/// The kernel of a container without a listener says so by ICMP, and the client hears it from the VIP.
fn a_closed_port_is_told_of() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, Mode::Auto, false);
        for (host, first_host) in [(1, false), (2, false), (2, true)] {
            world.set(&Service {
                first_host,
                backends: vec![Backend::new(container(host), BACKEND_PORT + 1)],
                ..service(&[])
            });
            for vip in [IpAddr::V4(address(1)), IpAddr::V6(address6(1))] {
                let told = world.client.run(|| {
                    let socket = UdpSocket::bind((if vip.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.connect((vip, PORT)).unwrap();
                    socket.send(b"?").unwrap();
                    socket.recv(&mut [0; 1]).unwrap_err().kind()
                });
                assert_eq!(
                    told,
                    ErrorKind::ConnectionRefused,
                    "{vip}, host {host}, {first_host}"
                );
            }
        }
    });
}

fn connections_survive_other_backends() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, Mode::Auto, false);
        world.set(&service(&[1, 2]));
        let client = world.client.clone();
        let mut streams: Vec<_> =
            client.run(|| (0..40).map(|_| connect((address(1), PORT).into())).collect());
        for stream in &mut streams {
            exchange(stream, 100);
        }
        let of_second = world.event(1, Event::Delivered);
        assert!(
            of_second > 0 && world.event(0, Event::Delivered) > 0,
            "both have some"
        );
        let mut draining = service(&[1, 2]);
        draining.backends[1].draining = true;
        world.set(&draining);
        for stream in &mut streams {
            exchange(stream, 5000);
        }
        let before = world.event(1, Event::Delivered);
        assert!(before > of_second, "those of the one that drains go on");
        client.run(|| (0..20).for_each(|_| exchange(&mut connect((address(1), PORT).into()), 100)));
        assert_eq!(world.event(1, Event::Delivered), before, "no new ones");

        // Another process takes over.
        let Balanced { node, balancer } = &mut world.hosts[0];
        let pins = pins(&bpffs.join("1"));
        let uplink = balancer.uplink().clone();
        let limits = Limits {
            flows: 1 << 12,
            flood: 100_000,
        };
        *balancer = node
            .place
            .run(move || Balancer::open(&pins, uplink, Mode::Auto, &limits).unwrap());
        for stream in &mut streams {
            exchange(stream, 5000);
        }
    });
}

/// The VIP is the second host's, then the first's; the containers are the other way round. What the first knows nothing of
/// it sends to the second, whose container has the slots now, and that back to the first's, which had them before.
fn connections_are_found_by_way_of_a_third() {
    const FLOATING: u8 = 99;
    alone(|bpffs| {
        let mut world = World::new(bpffs, Mode::Auto, false);
        let floating = [IpAddr::V4(address(FLOATING)), IpAddr::V6(address6(FLOATING))];
        let of = |backends: &[u8]| {
            let mut service = service(backends);
            let vip = |address| Vip {
                address,
                port: PORT,
                protocol: Protocol::Tcp,
            };
            service.vips = floating.map(vip).into();
            service
        };
        world.set(&of(&[1]));
        let client = world.client.clone();
        let held_by = |host: u8| {
            for vip in floating {
                let mac = hosts::mac_text(mac(1, host));
                client.ip(&format!("neigh replace {vip} lladdr {mac} dev up0 nud permanent"));
            }
        };
        held_by(2);
        let mut streams = client.run(|| floating.map(|vip| connect((vip, PORT).into())));
        for stream in &mut streams {
            exchange(stream, 100);
        }

        let mut moved = of(&[1, 2]);
        moved.backends[0].draining = true;
        world.set(&moved);
        held_by(1);
        for stream in &mut streams {
            for size in [1, 1400, 1 << 20] {
                exchange(stream, size);
            }
        }
        assert!(world.event(1, Event::Sought) > 10);
    });
}

fn foreign_programs_stay() {
    for (is_taken, mode) in [(false, Mode::Generic), (true, Mode::Tc)] {
        alone(move |bpffs| {
            let mut world = World::new(bpffs, Mode::Generic, false);
            let Balanced { node, balancer } = &world.hosts[0];
            let place = &node.place;
            let (pins, uplink) = (pins(&bpffs.join("other")), balancer.uplink().clone());
            // Ours plays the other's part: another directory of pins is another owner. It has VIPs of its own.
            let _other = is_taken.then(|| {
                let mut elsewhere = service(&[2]);
                for vip in &mut elsewhere.vips {
                    vip.port = BACKEND_PORT;
                }
                let limits = Limits {
                    flows: 1 << 12,
                    flood: 100_000,
                };
                place.run(move || {
                    let mut other = Balancer::open(&pins, uplink, Mode::Generic, &limits).unwrap();
                    other.set(&[elsewhere]).unwrap();
                    other
                })
            });
            let interface = |world: &World| {
                let place = &world.hosts[0].node.place;
                place.run(|| ip(&["link", "show", "dev", "up0"]))
            };
            let before = interface(&world);
            assert_eq!(before.contains("xdpgeneric"), is_taken);
            world.set(&service(&[2]));
            assert_eq!(
                world.hosts[0].balancer.mode(),
                mode,
                "in its place where that is free, else beside it"
            );
            world.works();
            let after = interface(&world);
            assert!(after.contains("xdpgeneric"));
            assert!(!is_taken || after == before, "{before} is now {after}");
        });
    }
}
