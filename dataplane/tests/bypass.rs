//! Services' virtual addresses for what goes past the programs at the cgroup, with real sockets: these are in none.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

#[path = "support/hosts.rs"]
mod hosts;
mod support;

use std::{
    fs,
    io::{ErrorKind, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use flynn_dataplane::{
    Dataplane, DropReason, Prefix, Program,
    service::{Instance, Services},
};
use hosts::{BACKEND_PORT, Node, PATIENCE, Place, connect, container, container6, exchange};
use support::alone;

const EMSGSIZE: i32 = 90;
const SERVICE: u16 = 5;
const NETWORK4: Prefix<Ipv4Addr> = Prefix {
    address: Ipv4Addr::new(100, 101, 0, 0),
    length: 16,
};
const NETWORK6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6c79, 0x6e73, 0, 0, 0, 0, 0);

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            ("an_instance_of_the_same_host", an_instance_of_the_same_host),
            ("an_instance_of_another_host", an_instance_of_another_host),
            ("connections_to_who_is_gone_end", connections_to_who_is_gone_end),
            ("a_closed_port_is_told_of", a_closed_port_is_told_of),
            ("what_does_not_fit_is_told_of", what_does_not_fit_is_told_of),
            (
                "no_datagram_is_lost_to_an_upgrade",
                no_datagram_is_lost_to_an_upgrade,
            ),
        ],
    )
}

struct World {
    /// Joins the hosts, as long as it is there.
    _switch: Place,
    client: Place,
    hosts: [Node; 2],
    services: Services,
}

impl World {
    /// A client's container at the first host, and one more at each.
    fn new(bpffs: &Path) -> Self {
        let switch = Place::new();
        switch.ip("link add br0 type bridge");
        switch.ip("link set dev br0 up");
        let mut hosts = [1, 2].map(|number| Node::new(&switch, number, bpffs, false));
        let client = hosts[0].add(2);
        hosts[0].add(3);
        hosts[1].add(2);
        let mut services = Services::open(&hosts[0].pins).unwrap();
        services.configure(NETWORK4, NETWORK6).unwrap();
        Self {
            _switch: switch,
            client,
            hosts,
            services,
        }
    }

    fn set(&mut self, instance: Instance) {
        self.services
            .set(SERVICE.into(), &[instance], Some(instance))
            .unwrap();
    }

    /// The client is answered, over all protocols, whatever the size, by whom it has asked.
    fn works(&self) {
        for named in addresses() {
            self.client.run(|| {
                for size in [1, 1400, 1 << 20] {
                    let mut stream = connect((named, BACKEND_PORT).into());
                    exchange(&mut stream, size);
                }
                // Connected and not: the kernel compares the sender, or tells of it.
                let (socket, to) = (datagrams(named), (named, BACKEND_PORT));
                for size in [1_usize, 512, 1300] {
                    let sent: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
                    let mut received = [0; 2000];
                    socket.send_to(&sent, to).unwrap();
                    let (length, from) = socket
                        .recv_from(&mut received)
                        .unwrap_or_else(|error| panic!("{named} {size}: {error}"));
                    assert_eq!((&received[..length], from), (&sent[..], to.into()));
                }
                socket.connect(to).unwrap();
                socket.send(b"?").unwrap();
                assert_eq!(socket.recv(&mut [0; 1]).unwrap(), 1);
            });
        }
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        let drops = self.hosts[0].dataplane.drops().unwrap();
        drops
            .into_iter()
            .find_map(|(of, count)| (of == reason).then_some(count))
            .unwrap()
    }
}

/// Where a test has failed, what the hosts have dropped says how far packets came.
impl Drop for World {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        for (host, number) in self.hosts.iter().zip(1..) {
            let mut drops = host.dataplane.drops().unwrap_or_default();
            drops.retain(|(_, count)| *count > 0);
            eprintln!("host {number}: dropped {drops:?}");
        }
    }
}

/// The service's, and its leader's.
fn addresses() -> [IpAddr; 4] {
    let offset = 2 * u32::from(SERVICE);
    let (first4, first6) = (NETWORK4.address.to_bits(), NETWORK6.to_bits());
    let four = |offset| Ipv4Addr::from_bits(first4 + offset).into();
    let six = |offset| Ipv6Addr::from_bits(first6 + u128::from(offset)).into();
    [four(offset), six(offset), four(offset + 1), six(offset + 1)]
}

fn instance(id: u64, host: u8, last: u8) -> Instance {
    Instance {
        id,
        address: container(host, last).into(),
        address6: Some(container6(host, last)),
    }
}

fn datagrams(to: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn an_instance_of_the_same_host() {
    alone(|bpffs| {
        let mut world = World::new(bpffs);
        world.set(instance(1, 1, 3));
        world.works();
    });
}

fn an_instance_of_another_host() {
    alone(|bpffs| {
        let mut world = World::new(bpffs);
        world.set(instance(1, 2, 2));
        world.works();
    });
}

fn connections_to_who_is_gone_end() {
    alone(|bpffs| {
        let mut world = World::new(bpffs);
        world.set(instance(1, 1, 3));
        let client = world.client.clone();
        for named in addresses() {
            let mut stream = client.run(|| connect((named, BACKEND_PORT).into()));
            exchange(&mut stream, 10);
            world.set(instance(2, 2, 2));
            exchange(&mut stream, 10);
            assert_eq!(
                world
                    .services
                    .sever_packets(|flow| flow.instance == 1, &[])
                    .unwrap(),
                1
            );
            let before = world.dropped(DropReason::UnknownConnection);
            std::io::Write::write_all(&mut stream, b"?").unwrap();
            let kind = stream.read(&mut [0; 1]).unwrap_err().kind();
            assert_eq!(kind, ErrorKind::ConnectionReset);
            assert!(world.dropped(DropReason::UnknownConnection) > before);
            // What comes next goes to who is there.
            exchange(&mut client.run(|| connect((named, BACKEND_PORT).into())), 10);
            world.set(instance(1, 1, 3));
        }
    });
}

/// The kernel of an instance without a listener says so by ICMP, and the client hears of the address that it asked.
fn a_closed_port_is_told_of() {
    alone(|bpffs| {
        let mut world = World::new(bpffs);
        for instance in [instance(1, 1, 3), instance(2, 2, 2)] {
            world.set(instance);
            for named in addresses() {
                let told = world.client.run(|| {
                    let socket = datagrams(named);
                    socket.connect((named, BACKEND_PORT + 1)).unwrap();
                    socket.send(b"?").unwrap();
                    socket.recv(&mut [0; 1]).unwrap_err().kind()
                });
                assert_eq!(told, ErrorKind::ConnectionRefused, "{named}");
            }
        }
    });
}

/// A container without a route that knows of the tunnel learns what fits into it, for the address that it has asked.
fn what_does_not_fit_is_told_of() {
    alone(|bpffs| {
        let mut world = World::new(bpffs);
        // The host's stack knows ways to the instance and, as by the overlay's device, to the client.
        let Node { place, dataplane, .. } = &mut world.hosts[0];
        for line in [
            "link add f0 type veth peer name f1",
            "link set dev f1 up",
            "link set dev f0 arp off up",
            "route add 100.100.1.0/24 dev f0",
            "-6 route add fd66::6464:100/120 dev f0",
            "route add 100.100.2.0/24 dev up0 mtu 1450",
            "-6 route add fd66::6464:200/120 dev up0 mtu 1450",
        ] {
            place.ip(line);
        }
        place.run(|| {
            for interface in ["all", "c2"] {
                fs::write(format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter"), "0").unwrap();
            }
            dataplane.attach(Program::ToOverlay, "f0").unwrap();
        });
        world.set(instance(1, 2, 2));
        for named in addresses() {
            world.client.run(|| {
                let socket = datagrams(named);
                socket.connect((named, BACKEND_PORT)).unwrap();
                let sent = [7; 1440];
                let told = || {
                    socket
                        .send(&sent)
                        .is_err_and(|error| error.raw_os_error() == Some(EMSGSIZE))
                };
                let deadline = Instant::now() + PATIENCE;
                while !told() {
                    assert!(
                        Instant::now() < deadline,
                        "{named}: nobody has said that it does not fit"
                    );
                    thread::sleep(Duration::from_millis(1));
                }
            });
        }
    });
}

/// Another daemon opens everything anew, over and over, while datagrams and a connection go on.
fn no_datagram_is_lost_to_an_upgrade() {
    const UPGRADES: u32 = 4;
    alone(|bpffs| {
        let mut world = World::new(bpffs);
        world.set(instance(1, 2, 2));
        let (client, upgraded) = (world.client.clone(), AtomicBool::new(false));
        let [named, ..] = addresses();
        thread::scope(|scope| {
            let streaming = scope.spawn(|| {
                client.run(|| {
                    let mut stream = connect((named, BACKEND_PORT).into());
                    let socket = datagrams(named);
                    while !upgraded.load(Ordering::Relaxed) {
                        socket.send_to(b"?", (named, BACKEND_PORT)).unwrap();
                        socket.recv_from(&mut [0; 1]).unwrap();
                        exchange(&mut stream, 1);
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            });
            let node = &mut world.hosts[0];
            for _ in 0..UPGRADES {
                let pins = &node.pins;
                node.dataplane = node.place.run(|| Dataplane::open(pins).unwrap());
            }
            upgraded.store(true, Ordering::Relaxed);
            support::joined(streaming.join());
        });
    });
}
