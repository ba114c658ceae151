//! Services' virtual addresses, with real sockets in a cgroup of their own: these programs have no test run.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use std::{
    collections::HashSet,
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use flynn_dataplane::{
    Dataplane, DropReason, Prefix,
    service::{Instance, Services},
};
use support::{alone, joined, pins};

/// How long anything may take that is not a hang.
const PATIENCE: Duration = Duration::from_mins(1);

const NETWORK4: Prefix<Ipv4Addr> = Prefix {
    address: Ipv4Addr::new(100, 101, 0, 0),
    length: 16,
};
const NETWORK6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6c79, 0x6e73, 0, 0, 0, 0, 0);

fn main() {
    let cgroup = Cgroup::create();
    let why = cgroup.is_none().then_some("a cgroup v2 of its own with threads");
    drop(cgroup);
    support::main(
        &["ip"],
        |_| why,
        &[
            ("a_connection_goes_to_an_instance_and_never_learns", connects),
            ("ipv6_and_mapped_addresses_lead_there_as_well", connects_by_ipv6),
            ("instances_get_equal_shares", shares),
            ("the_leader_has_an_address_of_its_own", leader),
            ("without_an_instance_it_is_refused_at_once", refused),
            ("other_addresses_are_left_alone", others),
            ("connected_datagrams", connected_datagrams),
            ("unconnected_datagrams_are_right_both_ways", unconnected_datagrams),
            ("unconnected_datagrams_stay_with_their_instance", datagrams_stay),
            ("a_deposed_leader_is_cut_off_at_once", deposed),
            ("a_dead_instance_is_cut_off_and_others_are_not", dead),
            ("everything_outlives_the_process", outlives),
            ("no_connection_fails_while_instances_change", under_load),
            ("a_new_cgroup_takes_the_place_of_one_that_is_gone", new_cgroup),
        ],
    )
}

/// A cgroup that single threads can be in.
struct Cgroup {
    parent: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    fn create() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts
            .lines()
            .find(|line| line.contains(" - cgroup2 "))?
            .split(' ')
            .nth(4)?;
        let own = fs::read_to_string("/proc/thread-self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let parent = Path::new(mount).join(own);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("flynn-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let cgroup = Self { parent, path };
        fs::write(cgroup.path.join("cgroup.type"), "threaded").ok()?;
        Some(cgroup)
    }

    fn enter(&self) {
        move_to(&self.path);
    }
}

fn move_to(cgroup: &Path) {
    let thread = rustix::thread::gettid().as_raw_nonzero();
    fs::write(cgroup.join("cgroup.threads"), thread.to_string()).unwrap();
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let inside = fs::read_to_string("/proc/thread-self/cgroup").unwrap();
        if self
            .path
            .file_name()
            .is_some_and(|name| inside.contains(name.to_str().unwrap()))
        {
            move_to(&self.parent);
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.path).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs a test in such a cgroup, with the programs attached to it.
fn in_cgroup(test: impl FnOnce(&mut Services, &Path) + Send + 'static) {
    alone(move |bpffs| {
        let cgroup = Cgroup::create().unwrap();
        cgroup.enter();
        let mut services = Services::open(&pins(bpffs)).unwrap();
        services.attach(&cgroup.path).unwrap();
        services.configure(NETWORK4, NETWORK6).unwrap();
        test(&mut services, bpffs);
    });
}

fn virtual4(number: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(NETWORK4.address.to_bits() + 2 * u32::from(number))
}

fn virtual6(number: u16) -> Ipv6Addr {
    Ipv6Addr::from_bits(NETWORK6.to_bits() + 2 * u128::from(number))
}

fn leader4(number: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(virtual4(number).to_bits() + 1)
}

/// The `id`th instance, on an address of its own.
fn instance(id: u8) -> Instance {
    Instance {
        id: id.into(),
        address: Ipv4Addr::new(127, 0, 1, id).into(),
        address6: None,
    }
}

/// Instances that listen on one port.
struct Listeners {
    port: u16,
    listeners: Vec<TcpListener>,
}

impl Listeners {
    fn new(ids: impl IntoIterator<Item = u8>) -> Self {
        let mut port = 0;
        let listeners = ids.into_iter().map(|id| {
            let listener = TcpListener::bind((instance(id).address, port)).unwrap();
            port = listener.local_addr().unwrap().port();
            listener
        });
        let listeners = listeners.collect();
        Self { port, listeners }
    }

    /// Connects and sees which listener it was.
    fn connect(&self, address: impl Into<IpAddr>) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect((address.into(), self.port)).unwrap();
        let server = self.accept(client.local_addr().unwrap());
        (client, server)
    }

    fn accept(&self, client: SocketAddr) -> TcpStream {
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        for _ in 0..1000 {
            for listener in &self.listeners {
                listener.set_nonblocking(true).unwrap();
                if let Ok((server, peer)) = listener.accept() {
                    assert_eq!(peer, client);
                    return server;
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("nobody was connected to");
    }
}

fn connects() {
    in_cgroup(|services, _| {
        let listeners = Listeners::new([1]);
        services.set(5, &[instance(1)], None).unwrap();
        let (mut client, server) = listeners.connect(virtual4(5));
        assert_eq!(
            client.peer_addr().unwrap(),
            SocketAddr::from((virtual4(5), listeners.port))
        );
        assert_eq!(server.local_addr().unwrap().ip(), instance(1).address);
        (&server).write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
    });
}

fn connects_by_ipv6() {
    in_cgroup(|services, _| {
        let listeners = Listeners::new([1]);
        services.set(5, &[instance(1)], None).unwrap();
        // An IPv6 socket finds an instance that only has IPv4.
        for address in [virtual6(5), virtual4(5).to_ipv6_mapped()] {
            let (client, server) = listeners.connect(address);
            assert_eq!(client.peer_addr().unwrap().ip(), address);
            assert_eq!(server.local_addr().unwrap().ip(), instance(1).address);
        }
        // And one that has IPv6.
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let by_ipv6 = Instance {
            id: 7,
            address: Ipv6Addr::LOCALHOST.into(),
            address6: None,
        };
        services.set(6, &[by_ipv6], None).unwrap();
        let client = TcpStream::connect((virtual6(6), port)).unwrap();
        assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
        assert_eq!(client.peer_addr().unwrap(), SocketAddr::from((virtual6(6), port)));
        // Which an IPv4 socket cannot reach.
        let error = TcpStream::connect((virtual4(6), port)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
    });
}

fn shares() {
    in_cgroup(|services, _| {
        const CONNECTIONS: u32 = 600;
        let listeners = Listeners::new([1, 2, 3]);
        services
            .set(9, &[instance(1), instance(2), instance(3)], None)
            .unwrap();
        let mut counts = [0_u32; 4];
        for _ in 0..CONNECTIONS {
            let (_, server) = listeners.connect(virtual4(9));
            let IpAddr::V4(at) = server.local_addr().unwrap().ip() else {
                panic!()
            };
            counts[usize::from(at.octets()[3])] += 1;
        }
        // Five standard deviations: one run in a million.
        assert!(
            counts[1..].iter().all(|count| (140..260).contains(count)),
            "{counts:?}"
        );
    });
}

fn leader() {
    in_cgroup(|services, _| {
        let listeners = Listeners::new([1, 2]);
        let both = [instance(1), instance(2)];
        for id in [1, 2, 1] {
            services.set(5, &both, Some(instance(id))).unwrap();
            for _ in 0..5 {
                let (client, server) = listeners.connect(leader4(5));
                assert_eq!(server.local_addr().unwrap().ip(), instance(id).address);
                assert_eq!(client.peer_addr().unwrap().ip(), leader4(5));
            }
        }
    });
}

fn refused() {
    in_cgroup(|services, bpffs| {
        let before = dropped(bpffs, DropReason::NoInstance);
        services.set(4, &[instance(1)], None).unwrap();
        services.remove(4).unwrap();
        let beyond = Ipv6Addr::from_bits(NETWORK6.to_bits() + (1 << 40));
        let nobodys: [IpAddr; 6] = [
            virtual4(4).into(),
            leader4(4).into(),
            virtual6(4).into(),
            virtual4(0).into(),
            Ipv4Addr::new(100, 101, 255, 255).into(),
            beyond.into(),
        ];
        for address in nobodys {
            let begun = Instant::now();
            let error = TcpStream::connect((address, 80)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
            assert!(begun.elapsed() < PATIENCE, "not at once");
            let any: IpAddr = if address.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            let socket = UdpSocket::bind((any, 0)).unwrap();
            assert_eq!(
                socket.send_to(b"?", (address, 80)).unwrap_err().kind(),
                ErrorKind::ConnectionRefused
            );
            assert_eq!(
                socket.connect((address, 80)).unwrap_err().kind(),
                ErrorKind::ConnectionRefused
            );
        }
        assert_eq!(dropped(bpffs, DropReason::NoInstance) - before, 18);
    });
}

fn dropped(bpffs: &Path, reason: DropReason) -> u64 {
    let drops = Dataplane::open(&pins(bpffs)).unwrap().drops().unwrap();
    drops
        .into_iter()
        .find_map(|(of, count)| (of == reason).then_some(count))
        .unwrap()
}

fn others() {
    in_cgroup(|services, _| {
        let listeners = Listeners::new([1]);
        services.set(5, &[instance(1)], None).unwrap();
        let (client, _server) = listeners.connect(instance(1).address);
        assert_eq!(client.peer_addr().unwrap().ip(), instance(1).address);
        let (one, other) = (udp(instance(1)), UdpSocket::bind("127.0.0.1:0").unwrap());
        other.send_to(b"?", one.local_addr().unwrap()).unwrap();
        let (_, from) = one.recv_from(&mut [0; 8]).unwrap();
        one.send_to(b"!", from).unwrap();
        assert_eq!(other.recv_from(&mut [0; 8]).unwrap().1, one.local_addr().unwrap());
    });
}

/// A socket of an instance.
fn udp(instance: Instance) -> UdpSocket {
    patient(UdpSocket::bind((instance.address, 0)).unwrap())
}

fn patient(socket: UdpSocket) -> UdpSocket {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn connected_datagrams() {
    in_cgroup(|services, _| {
        let server = udp(instance(1));
        let port = server.local_addr().unwrap().port();
        services.set(5, &[instance(1)], None).unwrap();
        let mapped = virtual4(5).to_ipv6_mapped();
        let pairs: [(&str, IpAddr); 3] = [
            ("0.0.0.0:0", virtual4(5).into()),
            ("[::]:0", virtual6(5).into()),
            ("[::]:0", mapped.into()),
        ];
        for (from, to) in pairs {
            let client = patient(UdpSocket::bind(from).unwrap());
            client.connect((to, port)).unwrap();
            client.send(b"?").unwrap();
            let (_, sender) = server.recv_from(&mut [0; 8]).unwrap();
            server.send_to(b"!", sender).unwrap();
            assert_eq!(client.peer_addr().unwrap().ip(), to);
            assert_eq!(
                client.recv_from(&mut [0; 8]).unwrap(),
                (1, SocketAddr::new(to, port))
            );
        }
    });
}

fn unconnected_datagrams() {
    in_cgroup(|services, _| {
        let server = udp(instance(1));
        let port = server.local_addr().unwrap().port();
        let on_both = Instance {
            address6: Some(Ipv6Addr::LOCALHOST),
            ..instance(1)
        };
        services.set(5, &[on_both], None).unwrap();
        services.set(6, &[instance(1)], None).unwrap();
        let exchange = |client: &UdpSocket, server: &UdpSocket, to: IpAddr| {
            client.send_to(b"?", (to, port)).unwrap();
            let (_, sender) = server.recv_from(&mut [0; 8]).unwrap();
            server.send_to(b"!", sender).unwrap();
            assert_eq!(
                client.recv_from(&mut [0; 8]).unwrap(),
                (1, SocketAddr::new(to, port))
            );
        };
        // One socket, two services behind one instance: the last one asked has answered.
        let client = patient(UdpSocket::bind("0.0.0.0:0").unwrap());
        for number in [5, 6, 5] {
            exchange(&client, &server, virtual4(number).into());
        }
        let client = patient(UdpSocket::bind("[::]:0").unwrap());
        exchange(&client, &server, virtual4(5).to_ipv6_mapped().into());
        let server6 = patient(UdpSocket::bind((Ipv6Addr::LOCALHOST, port)).unwrap());
        exchange(&client, &server6, virtual6(5).into());
        let error = client.send_to(b"?", (virtual6(6), port)).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::HostUnreachable,
            "an instance without IPv6"
        );
    });
}

fn datagrams_stay() {
    in_cgroup(|services, _| {
        let first = udp(instance(1));
        let port = first.local_addr().unwrap().port();
        let mut servers = vec![first];
        servers.extend((2..=8).map(|id| patient(UdpSocket::bind((instance(id).address, port)).unwrap())));
        for server in &servers {
            server.set_nonblocking(true).unwrap();
        }
        let all: Vec<_> = (1..=8).map(instance).collect();
        services.set(5, &all, None).unwrap();
        let client = patient(UdpSocket::bind("0.0.0.0:0").unwrap());
        let ask = || -> u64 {
            client.send_to(b"?", (virtual4(5), port)).unwrap();
            let deadline = Instant::now() + PATIENCE;
            loop {
                for (server, id) in servers.iter().zip(1..) {
                    if let Ok((_, sender)) = server.recv_from(&mut [0; 8]) {
                        server.send_to(b"!", sender).unwrap();
                        let from = client.recv_from(&mut [0; 8]).unwrap().1;
                        assert_eq!(from, SocketAddr::from((virtual4(5), port)));
                        return id;
                    }
                }
                assert!(Instant::now() < deadline, "nobody was asked");
            }
        };
        let chosen = ask();
        assert!((0..50).all(|_| ask() == chosen), "it goes from one to another");
        let rest: Vec<_> = all.iter().filter(|one| one.id != chosen).copied().collect();
        services.set(5, &rest, None).unwrap();
        let next = ask();
        assert_ne!(next, chosen);
        assert!((0..50).all(|_| ask() == next));
        let asked: HashSet<u64> = (0..50)
            .map(|_| {
                let other = patient(UdpSocket::bind("0.0.0.0:0").unwrap());
                other.send_to(b"?", (virtual4(5), port)).unwrap();
                let deadline = Instant::now() + PATIENCE;
                loop {
                    if let Some((_, id)) = servers
                        .iter()
                        .zip(1..)
                        .find(|(server, _)| server.recv(&mut [0; 8]).is_ok())
                    {
                        break id;
                    }
                    assert!(Instant::now() < deadline, "nobody was asked");
                }
            })
            .collect();
        assert!(asked.len() > 2, "each socket chooses by itself: {asked:?}");
    });
}

/// Waits in `read`, as a database client would, and gives what came of it.
fn blocked(mut client: TcpStream) -> thread::JoinHandle<ErrorKind> {
    thread::spawn(move || {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.read(&mut [0; 1]).unwrap_err().kind()
    })
}

fn deposed() {
    in_cgroup(|services, _| {
        let listeners = Listeners::new([1, 2]);
        let both = [instance(1), instance(2)];
        services.set(5, &both, Some(instance(1))).unwrap();
        let (client4, _server4) = listeners.connect(leader4(5));
        let leader6 = Ipv6Addr::from_bits(virtual6(5).to_bits() + 1);
        let (client6, _server6) = listeners.connect(leader6);
        services.set(5, &[instance(1)], Some(instance(1))).unwrap();
        let (mut any, mut any_server) = listeners.connect(virtual4(5));
        let (mut direct, mut direct_server) = listeners.connect(instance(1).address);
        let readers = [blocked(client4), blocked(client6)];
        thread::sleep(Duration::from_millis(50));

        services.set(5, &both, Some(instance(2))).unwrap();
        let flows = services.flows().unwrap();
        let severed = flows
            .sever(|flow| flow.leader && flow.service == 5 && flow.instance != 2, &[])
            .unwrap();
        assert_eq!(severed, 2);
        for reader in readers {
            let kind = joined(reader.join());
            assert_eq!(kind, ErrorKind::ConnectionAborted);
        }
        // The instance itself is well: who did not ask for the leader stays.
        for (client, server) in [(&mut any, &mut any_server), (&mut direct, &mut direct_server)] {
            server.write_all(b"!").unwrap();
            client.read_exact(&mut [0; 1]).unwrap();
        }
        let (_, server) = listeners.connect(leader4(5));
        assert_eq!(server.local_addr().unwrap().ip(), instance(2).address);
    });
}

fn dead() {
    in_cgroup(|services, _| {
        let listeners = Listeners::new([1, 2]);
        services.set(5, &[instance(1)], None).unwrap();
        let (gone, _gone_server) = listeners.connect(virtual4(5));
        let (direct, _direct_server) = listeners.connect(instance(1).address);
        services.set(5, &[instance(2)], None).unwrap();
        let (mut well, mut well_server) = listeners.connect(virtual4(5));
        let datagrams = udp(instance(1));
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(datagrams.local_addr().unwrap()).unwrap();
        let readers = [blocked(gone), blocked(direct)];
        thread::sleep(Duration::from_millis(50));
        let address = SocketAddr::new(instance(1).address, listeners.port);
        let flows = services.flows().unwrap();
        let severed = flows.sever(|flow| flow.instance == 1, &[address]).unwrap();
        assert_eq!(severed, 2);
        for reader in readers {
            assert_eq!(joined(reader.join()), ErrorKind::ConnectionAborted);
        }
        well_server.write_all(b"!").unwrap();
        well.read_exact(&mut [0; 1]).unwrap();
        // A datagram socket to another port of that address is none of them; asked for, it ends as well.
        assert_eq!(socket.send(b"?").unwrap(), 1);
        assert_eq!(
            flows
                .sever(|_| false, &[datagrams.local_addr().unwrap()])
                .unwrap(),
            1
        );
        assert_eq!(
            socket.recv(&mut [0; 1]).unwrap_err().kind(),
            ErrorKind::ConnectionAborted
        );
        assert_eq!(flows.sever(|flow| flow.instance == 1, &[address]).unwrap(), 0);
    });
}

fn outlives() {
    alone(|bpffs| {
        let cgroup = Cgroup::create().unwrap();
        cgroup.enter();
        let listeners = Listeners::new([1, 2]);
        let mut services = Services::open(&pins(bpffs)).unwrap();
        services.attach(&cgroup.path).unwrap();
        services.configure(NETWORK4, NETWORK6).unwrap();
        services
            .set(5, &[instance(1), instance(2)], Some(instance(2)))
            .unwrap();
        services.set(77, &[instance(1)], None).unwrap();
        let (before, _server) = listeners.connect(leader4(5));
        drop(services);
        listeners.connect(virtual4(5));

        let mut services = Services::open(&pins(bpffs)).unwrap();
        listeners.connect(virtual4(5));
        services.attach(&cgroup.path).unwrap();
        assert_eq!(services.numbers().into_iter().collect::<Vec<_>>(), [5, 77]);
        assert_eq!(
            services.service(5),
            (&[instance(1), instance(2)][..], Some(instance(2)))
        );
        assert_eq!(before.peer_addr().unwrap().ip(), leader4(5));
        assert_eq!(
            services
                .flows()
                .unwrap()
                .sever(|flow| flow.instance == 2, &[])
                .unwrap(),
            1
        );
        services.remove(77).unwrap();
        assert!(TcpStream::connect((virtual4(77), listeners.port)).is_err());
        assert!(
            services
                .memory()
                .unwrap()
                .iter()
                .any(|(name, bytes)| *name == "service_counts" && *bytes > 0)
        );
    });
}

fn under_load() {
    in_cgroup(|services, _| {
        let listeners = Listeners::new(1..=6);
        let port = listeners.port;
        services.set(5, &[instance(1)], Some(instance(1))).unwrap();
        let stop = AtomicBool::new(false);
        let connections = AtomicU32::new(0);
        thread::scope(|scope| {
            let clients: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            for address in [virtual4(5), leader4(5)] {
                                let client = TcpStream::connect((address, port)).unwrap();
                                // Reset at once, so that ports do not run out.
                                rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))
                                    .unwrap();
                                connections.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    })
                })
                .collect();
            let accepting = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for listener in &listeners.listeners {
                        listener.set_nonblocking(true).unwrap();
                        while listener.accept().is_ok() {}
                    }
                }
            });
            let begun = Instant::now();
            let mut changes = 0_u8;
            // For a while, and until it was a load, unless there is none to come.
            while begun.elapsed() < Duration::from_secs(2)
                || connections.load(Ordering::Relaxed) <= 100 && begun.elapsed() < PATIENCE
            {
                changes = changes.wrapping_add(1);
                let wanted: Vec<_> = (1..=6)
                    .filter(|id| changes >> (id - 1) & 1 == 1)
                    .map(instance)
                    .collect();
                if !wanted.is_empty() {
                    services.set(5, &wanted, wanted.last().copied()).unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
            for thread in clients.into_iter().chain([accepting]) {
                joined(thread.join());
            }
            let connections = connections.load(Ordering::Relaxed);
            assert!(connections > 100, "{connections} connections are no load");
        });
    });
}

fn new_cgroup() {
    alone(|bpffs| {
        let mut services = Services::open(&pins(bpffs)).unwrap();
        services.configure(NETWORK4, NETWORK6).unwrap();
        let listeners = Listeners::new([1]);
        services.set(5, &[instance(1)], None).unwrap();
        for _ in 0..2 {
            let cgroup = Cgroup::create().unwrap();
            services.attach(&cgroup.path).unwrap();
            services.attach(&cgroup.path).unwrap();
            cgroup.enter();
            listeners.connect(virtual4(5));
        }
        assert_eq!(fs::read_dir(pins(bpffs).join("links")).unwrap().count(), 8);
        drop(services);
        // The last one is gone as well: opening finds that and forgets it.
        Services::open(&pins(bpffs)).unwrap();
        assert_eq!(fs::read_dir(pins(bpffs).join("links")).unwrap().count(), 0);
        let missing = Path::new("/sys/fs/cgroup/there is no such cgroup");
        let error = Services::open(&pins(bpffs)).unwrap().attach(missing).unwrap_err();
        assert!(error.to_string().contains("there is no such cgroup"), "{error}");
    });
}
