//! The load balancer with real sockets: a client, two hosts and a container of each, joined by a bridge. Checksums are
//! left to the interfaces, as veth pairs have it unless they are told otherwise.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use flynn_dataplane::{
    Attachment, Container, Dataplane, Host, Network, Prefix, Program, Protocol, Way,
    lb::{Backend, Balancer, Event, Limits, Mode, Service, Uplink, Vip},
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use support::{alone, ip, joined, pins};

const PORT: u16 = 3000;
const BACKEND_PORT: u16 = 8080;
/// How long anything may take that is not a hang.
const PATIENCE: Duration = Duration::from_mins(1);

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
            ("a_closed_port_is_told_of", a_closed_port_is_told_of),
            ("foreign_programs_stay", foreign_programs_stay),
        ],
    )
}

/// A network namespace.
#[derive(Clone)]
struct Place(Arc<File>);

impl Place {
    fn new() -> Self {
        let made = thread::spawn(|| {
            support::unshare(UnshareFlags::NEWNET);
            ip(&["link", "set", "dev", "lo", "up"]);
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(Arc::new(joined(made.join())))
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Does something there.
    fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                self.enter();
                what()
            });
            joined(there.join())
        })
    }

    fn enter(&self) {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    fn ip(&self, line: &str) {
        let line = line.to_owned();
        self.run(move || ip(&line.split_whitespace().collect::<Vec<_>>()));
    }
}

struct World {
    /// Joins the others, as long as it is there.
    _switch: Place,
    client: Place,
    hosts: [Node; 2],
}

/// A host with its container.
struct Node {
    place: Place,
    dataplane: Dataplane,
    balancer: Balancer,
}

fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, host)
}

fn address6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, host.into())
}

fn container(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, host, 2)
}

fn container6(host: u8) -> Ipv6Addr {
    Ipv6Addr::from_bits(
        Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0).to_bits() | u128::from(container(host).to_bits()),
    )
}

fn mac(kind: u8, host: u8) -> [u8; 6] {
    [2, 0, 0, 0, kind, host]
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Joins a namespace to the bridge.
fn plug(switch: &Place, place: &Place, host: u8) {
    switch.ip(&format!(
        "link add p{host} type veth peer name up0 netns {}",
        place.path()
    ));
    switch.ip(&format!("link set dev p{host} master br0 up"));
    place.ip(&format!("link set dev up0 address {}", mac_text(mac(1, host))));
    place.ip(&format!("address add {}/24 dev up0", address(host)));
    place.ip(&format!("address add {}/64 dev up0 nodad", address6(host)));
    place.ip("link set dev up0 up");
}

impl World {
    fn new(bpffs: &Path, mode: Mode, direct: bool) -> Self {
        let (switch, client) = (Place::new(), Place::new());
        switch.ip("link add br0 type bridge");
        switch.ip("link set dev br0 up");
        plug(&switch, &client, 9);
        let hosts = [1, 2].map(|number| Node::new(&switch, number, bpffs, mode, direct));
        Self {
            _switch: switch,
            client,
            hosts,
        }
    }

    fn set(&mut self, service: &Service) {
        for Node { place, balancer, .. } in &mut self.hosts {
            place.run(move || balancer.set(std::slice::from_ref(service)).unwrap());
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
        for (node, number) in self.hosts.iter().zip(1..) {
            let mut drops = node.dataplane.drops().unwrap_or_default();
            drops.retain(|(_, count)| *count > 0);
            let mut events = node.balancer.events().unwrap_or_default();
            events.retain(|(_, count)| *count > 0);
            eprintln!("host {number}: dropped {drops:?}, counted {events:?}");
        }
    }
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap_or_else(|error| panic!("{to}: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends and gets the same back.
fn exchange(stream: &mut TcpStream, size: usize) {
    let sent: Vec<u8> = (0..251).cycle().take(size).collect();
    let mut received = vec![0; size];
    thread::scope(|scope| {
        let mut writer = stream.try_clone().unwrap();
        let sent = &sent;
        scope.spawn(move || writer.write_all(sent).unwrap());
        stream
            .read_exact(&mut received)
            .unwrap_or_else(|error| panic!("{size} bytes: {error}"));
    });
    assert!(received == sent);
}

/// Answers what it is sent, until the process ends.
fn echo(place: &Place) {
    place.run(|| {
        let listener = TcpListener::bind(("::", BACKEND_PORT)).unwrap();
        let socket = UdpSocket::bind(("::", BACKEND_PORT)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut reader = stream.try_clone().unwrap();
                    // A client that goes away ends it.
                    let _ = std::io::copy(&mut reader, &mut stream);
                });
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 2000];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
    });
}

impl Node {
    fn new(switch: &Place, number: u8, bpffs: &Path, mode: Mode, direct: bool) -> Self {
        let (place, inside) = (Place::new(), Place::new());
        plug(switch, &place, number);
        let gateway = mac(2, number);
        place.ip(&format!(
            "link add c0 type veth peer name eth0 netns {}",
            inside.path()
        ));
        place.ip(&format!("link set dev c0 address {} up", mac_text(gateway)));
        inside.ip(&format!(
            "link set dev eth0 address {} up",
            mac_text(mac(3, number))
        ));
        inside.ip(&format!("address add {}/32 dev eth0", container(number)));
        inside.ip(&format!("address add {}/128 dev eth0 nodad", container6(number)));
        for (family, gateway_address) in [("-4", "100.100.0.1"), ("-6", "fd66::1")] {
            inside.ip(&format!(
                "{family} neighbour add {gateway_address} lladdr {} dev eth0",
                mac_text(gateway)
            ));
            inside.ip(&format!(
                "{family} route add default via {gateway_address} dev eth0 onlink"
            ));
        }
        for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
            place.run(|| std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap());
        }
        let pins = pins(&bpffs.join(number.to_string()));
        let (dataplane, balancer) = place.run(|| {
            let index = |name| {
                let line = ip(&["-o", "link", "show", "dev", name]);
                line.split(':').next().unwrap().parse::<u32>().unwrap()
            };
            let mut dataplane = Dataplane::open(&pins).unwrap();
            dataplane
                .configure(&Network {
                    cluster4: Prefix {
                        address: Ipv4Addr::new(100, 100, 0, 0),
                        length: 16,
                    },
                    cluster6: Some(Prefix {
                        address: Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0),
                        length: 64,
                    }),
                    gateway4: Ipv4Addr::new(100, 100, number, 1),
                    gateway6: None,
                    subnet_length: 24,
                    address: Some(address(number)),
                    tunnel_mtu: 1450,
                    device: None,
                    gateway_mac: gateway,
                })
                .unwrap();
            dataplane.attach(Program::FromContainer, "c0").unwrap();
            dataplane.attach(Program::FromUplink, "up0").unwrap();
            let container = Container {
                ipv4: container(number),
                ipv6: Some(container6(number)),
                mac: mac(3, number),
                ifindex: index("c0"),
            };
            dataplane.add(&container, &Attachment::default()).unwrap();
            let other = 3 - number;
            let way = Way {
                ifindex: index("up0"),
                next_hop: address(other),
                source: address(number),
            };
            let host = Host {
                subnet: Ipv4Addr::new(100, 100, other, 0),
                address: address(other),
                direct,
                encrypted: false,
                only_encrypted: false,
                way: Some(way),
            };
            dataplane.set_hosts(&[host]).unwrap();
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
            let balancer = Balancer::open(&pins, uplink, mode, &limits).unwrap();
            (dataplane, balancer)
        });
        echo(&inside);
        Self {
            place,
            dataplane,
            balancer,
        }
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
        let Node { place, balancer, .. } = &mut world.hosts[0];
        let pins = pins(&bpffs.join("1"));
        let uplink = balancer.uplink().clone();
        let limits = Limits {
            flows: 1 << 12,
            flood: 100_000,
        };
        *balancer = place.run(move || Balancer::open(&pins, uplink, Mode::Auto, &limits).unwrap());
        for stream in &mut streams {
            exchange(stream, 5000);
        }
    });
}

fn foreign_programs_stay() {
    for (is_taken, mode) in [(false, Mode::Generic), (true, Mode::Tc)] {
        alone(move |bpffs| {
            let mut world = World::new(bpffs, Mode::Generic, false);
            let Node { place, balancer, .. } = &world.hosts[0];
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
                let place = &world.hosts[0].place;
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
