//! Hosts with containers, as namespaces that a bridge joins. Checksums are left to the interfaces, as veth pairs have it
//! unless they are told otherwise.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use flynn_dataplane::{Attachment, Container, Dataplane, Host, Network, Prefix, Program, Way};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::support::{ip, joined, pins, unshare};

/// The port that containers answer at.
pub(crate) const BACKEND_PORT: u16 = 8080;
/// How long anything may take that is not a hang.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A network namespace.
#[derive(Clone)]
pub(crate) struct Place(Arc<File>);

impl Place {
    pub(crate) fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(UnshareFlags::NEWNET);
            ip(&["link", "set", "dev", "lo", "up"]);
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(Arc::new(joined(made.join())))
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Does something there.
    pub(crate) fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
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

    pub(crate) fn ip(&self, line: &str) {
        let line = line.to_owned();
        self.run(move || ip(&line.split_whitespace().collect::<Vec<_>>()));
    }
}

pub(crate) fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, host)
}

pub(crate) fn address6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, host.into())
}

pub(crate) fn container(host: u8, last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, host, last)
}

pub(crate) fn container6(host: u8, last: u8) -> Ipv6Addr {
    Ipv6Addr::from_bits(
        Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0).to_bits() | u128::from(container(host, last).to_bits()),
    )
}

pub(crate) fn mac(kind: u8, host: u8) -> [u8; 6] {
    [2, 0, 0, 0, kind, host]
}

pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Joins a namespace to the bridge.
pub(crate) fn plug(switch: &Place, place: &Place, host: u8) {
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

pub(crate) fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap_or_else(|error| panic!("{to}: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends and gets the same back.
pub(crate) fn exchange(stream: &mut TcpStream, size: usize) {
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

/// A host.
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) dataplane: Dataplane,
    pub(crate) pins: PathBuf,
    number: u8,
}

impl Node {
    pub(crate) fn new(switch: &Place, number: u8, bpffs: &Path, direct: bool) -> Self {
        let place = Place::new();
        plug(switch, &place, number);
        for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
            place.run(|| std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap());
        }
        let pins = pins(&bpffs.join(number.to_string()));
        let dataplane = place.run(|| {
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
                    gateway_mac: mac(2, number),
                })
                .unwrap();
            dataplane.attach(Program::FromUplink, "up0").unwrap();
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
            dataplane
        });
        Self {
            place,
            dataplane,
            pins,
            number,
        }
    }

    /// Adds a container whose address ends so, and which echoes what it is sent.
    pub(crate) fn add(&mut self, last: u8) -> Place {
        let (number, inside) = (self.number, Place::new());
        let gateway = mac(2, number);
        let (outer, mac) = (format!("c{last}"), mac(last + 1, number));
        let place = &self.place;
        place.ip(&format!(
            "link add {outer} type veth peer name eth0 netns {}",
            inside.path()
        ));
        place.ip(&format!("link set dev {outer} address {} up", mac_text(gateway)));
        inside.ip(&format!("link set dev eth0 address {} up", mac_text(mac)));
        inside.ip(&format!("address add {}/32 dev eth0", container(number, last)));
        inside.ip(&format!(
            "address add {}/128 dev eth0 nodad",
            container6(number, last)
        ));
        for (family, gateway_address, cluster) in [
            ("-4", "100.100.0.1", "100.100.0.0/16"),
            ("-6", "fd66::1", "fd66::/64"),
        ] {
            inside.ip(&format!(
                "{family} neighbour add {gateway_address} lladdr {} dev eth0",
                mac_text(gateway)
            ));
            inside.ip(&format!(
                "{family} route add default via {gateway_address} dev eth0 onlink"
            ));
            inside.ip(&format!(
                "{family} route add {cluster} via {gateway_address} dev eth0 onlink mtu 1450"
            ));
        }
        let dataplane = &mut self.dataplane;
        place.run(|| {
            dataplane.attach(Program::FromContainer, &outer).unwrap();
            let container = Container {
                ipv4: container(number, last),
                ipv6: Some(container6(number, last)),
                mac,
                ifindex: index(&outer),
            };
            dataplane.add(&container, &Attachment::default()).unwrap();
        });
        echo(&inside);
        inside
    }
}

/// The index of an interface of this thread's namespace.
pub(crate) fn index(name: &str) -> u32 {
    let line = ip(&["-o", "link", "show", "dev", name]);
    line.split(':').next().unwrap().parse().unwrap()
}
