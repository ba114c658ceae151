//! Hosts and containers as network namespaces, and what talks between them.

#[path = "../../../dataplane/tests/support/mod.rs"]
mod alone;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

pub(crate) use alone::{ip, main};
use flynn_overlay::{Attachment, DropReason, Network, NetworkConfig};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// A payload of many packets.
pub(crate) const MEGABYTES: usize = 8 << 20;

/// How long anything may take that is not a hang.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// How often to do a thing that is to be done often: each time has the kernel look through all programs.
pub(crate) fn rounds() -> usize {
    let long = std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1");
    if long { 40 } else { 4 }
}

/// The host that a test runs in.
pub(crate) struct Host {
    pub(crate) pins: PathBuf,
}

impl Host {
    /// Runs a test in a host of its own.
    pub(crate) fn run<F>(test: impl FnOnce(Host) -> F + Send + 'static)
    where
        F: Future<Output = ()>,
    {
        alone::alone(move |bpffs| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test(Host {
                pins: alone::pins(bpffs),
            }));
        });
    }

    /// The network that the tests have.
    pub(crate) fn config(&self) -> NetworkConfig {
        NetworkConfig {
            cluster: "100.100.0.0/16".parse().unwrap(),
            cluster6: Some(NetworkConfig::DEFAULT_CLUSTER6),
            subnet: "100.100.7.0/24".parse().unwrap(),
            pins: self.pins.clone(),
            uplink: None,
            address: None,
            encryption: None,
        }
    }

    /// That network, up.
    pub(crate) async fn network(&self) -> Network {
        Network::up(self.config()).await.unwrap()
    }

    /// The namespace that the test runs in.
    pub(crate) fn namespace() -> Namespace {
        Namespace::current()
    }

    /// A namespace that is joined with the host's by a veth, both ends with an address of 192.0.2.0/24 and 2001:db8::/64;
    /// the host's default route leads there.
    pub(crate) fn outside() -> Outside {
        let namespace = Namespace::new();
        let descriptor = namespace.as_fd().as_raw_fd();
        let path = format!("/proc/{}/fd/{descriptor}", std::process::id());
        ip(&[
            "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", &path,
        ]);
        let outside = Outside {
            namespace,
            host_address: Ipv4Addr::new(192, 0, 2, 1),
            address: Ipv4Addr::new(192, 0, 2, 2),
        };
        outside.namespace.run(|| {
            ip(&["address", "add", "192.0.2.2/24", "dev", "eth0"]);
            ip(&["address", "add", "2001:db8::2/64", "dev", "eth0", "nodad"]);
            ip(&["link", "set", "eth0", "up"]);
        });
        ip(&["address", "add", "192.0.2.1/24", "dev", "uplink"]);
        ip(&["address", "add", "2001:db8::1/64", "dev", "uplink", "nodad"]);
        ip(&["link", "set", "uplink", "up"]);
        ip(&["route", "add", "default", "via", "192.0.2.2"]);
        ip(&["route", "add", "default", "via", "2001:db8::2"]);
        outside
    }
}

/// What is beyond a host's uplink.
pub(crate) struct Outside {
    pub(crate) namespace: Namespace,
    pub(crate) address: Ipv4Addr,
    /// The host, as it is seen from there.
    pub(crate) host_address: Ipv4Addr,
}

/// A container that has only a network.
pub(crate) struct Container {
    pub(crate) namespace: Namespace,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: IpAddr,
}

impl Container {
    /// One with the address that ends so.
    pub(crate) async fn attach(network: &Network, last: u8) -> Self {
        Self::attach_as(network, last, &Attachment::default()).await
    }

    /// One that is something to policy.
    pub(crate) async fn attach_as(network: &Network, last: u8, attachment: &Attachment) -> Self {
        let namespace = Namespace::new();
        let [a, b, c, _] = network.gateway().octets();
        let address = Ipv4Addr::new(a, b, c, last);
        let endpoint = network
            .attach(namespace.as_fd(), address, attachment)
            .await
            .unwrap();
        Self {
            namespace,
            ipv4: endpoint.address,
            ipv6: endpoint.address6.unwrap().into(),
        }
    }

    pub(crate) fn addresses(&self) -> [IpAddr; 2] {
        [self.ipv4.into(), self.ipv6]
    }
}

/// Containers with nothing said about them.
pub(crate) fn live(addresses: &[Ipv4Addr]) -> BTreeMap<Ipv4Addr, Attachment> {
    addresses
        .iter()
        .map(|&address| (address, Attachment::default()))
        .collect()
}

/// An address of the host's subnet.
pub(crate) fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, 7, last)
}

/// A network namespace.
pub(crate) struct Namespace(OwnedFd);

impl Clone for Namespace {
    fn clone(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }
}

impl Namespace {
    /// One that is empty.
    pub(crate) fn new() -> Self {
        join(thread::spawn(|| {
            alone::unshare(UnshareFlags::NEWNET);
            Self::current()
        }))
    }

    fn current() -> Self {
        Self(File::open("/proc/thread-self/ns/net").unwrap().into())
    }

    /// Runs something in it, in a thread of its own.
    pub(crate) fn spawn<R: Send + 'static>(&self, run: impl FnOnce() -> R + Send + 'static) -> JoinHandle<R> {
        let namespace = self.0.try_clone().unwrap();
        thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            run()
        })
    }

    /// The same, and waits for it.
    pub(crate) fn run<R: Send + 'static>(&self, run: impl FnOnce() -> R + Send + 'static) -> R {
        join(self.spawn(run))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The result of a thread, or its panic.
pub(crate) fn join<R>(thread: JoinHandle<R>) -> R {
    alone::joined(thread.join())
}

/// Bytes that are nowhere the same, others for each seed.
pub(crate) fn payload(length: usize, seed: usize) -> &'static [u8] {
    const LARGEST_SEED: usize = 1 << 16;
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        words.take(MEGABYTES / 8 + LARGEST_SEED).flatten().collect()
    });
    &BYTES[seed * 8..][..length]
}

/// Sends bytes over TCP from one namespace to an address in another, which sends others back: both must arrive whole.
/// Returns the address from which the server saw the client come.
pub(crate) fn tcp_echo(client: &Namespace, server: &Namespace, address: IpAddr, length: usize) -> IpAddr {
    let (sender, port) = mpsc::channel();
    let server = server.spawn(move || {
        let listener = TcpListener::bind((address, 0)).unwrap();
        sender.send(listener.local_addr().unwrap()).unwrap();
        let (mut stream, peer) = listener.accept().unwrap();
        patient(&stream);
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert!(
            received == payload(length, 1),
            "the server got other bytes than were sent"
        );
        stream.write_all(payload(length, 2)).unwrap();
        peer.ip()
    });
    let to = port.recv_timeout(PATIENCE).unwrap();
    client.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        patient(&stream);
        stream.write_all(payload(length, 1)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert!(
            received == payload(length, 2),
            "the client got other bytes than were sent"
        );
    });
    join(server)
}

/// Sends datagrams of these sizes there and back.
pub(crate) fn udp_echo(client: &Namespace, server: &Namespace, address: IpAddr, sizes: &[usize]) {
    let socket = server.run(move || udp(SocketAddr::new(address, 0)));
    let to = socket.local_addr().unwrap();
    let count = sizes.len();
    let server = server.spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        for _ in 0..count {
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&buffer[..length], from).unwrap();
        }
    });
    let sizes = sizes.to_vec();
    client.run(move || {
        let unspecified = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = udp(unspecified.parse().unwrap());
        socket.connect(to).unwrap();
        let mut buffer = vec![0; 1 << 16];
        for size in sizes {
            let sent = payload(size, size);
            socket.send(sent).unwrap();
            let length = socket.recv(&mut buffer).unwrap();
            assert!(
                buffer[..length] == *sent,
                "a datagram of {size} bytes came back changed"
            );
        }
    });
    join(server);
}

/// Sends datagrams of one size in one system call, which leaves it to the network to cut them.
pub(crate) fn segmented(client: &Namespace, server: &Namespace, address: IpAddr, size: u16, count: usize) {
    let socket = server.run(move || udp(SocketAddr::new(address, 0)));
    let to = socket.local_addr().unwrap();
    let length = usize::from(size) * count;
    client.run(move || {
        let unspecified = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let sender = udp(unspecified.parse().unwrap());
        let size = libc::c_int::from(size);
        // SAFETY: a pointer to an integer that outlives the call, with its length.
        let set = unsafe {
            libc::setsockopt(
                sender.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                (&raw const size).cast(),
                libc::socklen_t::try_from(size_of_val(&size)).unwrap(),
            )
        };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        assert_eq!(sender.send_to(payload(length, 3), to).unwrap(), length);
    });
    let mut received = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while received.len() < length {
        let size = socket.recv(&mut buffer).unwrap();
        received.extend_from_slice(&buffer[..size]);
    }
    assert!(
        received == payload(length, 3),
        "datagrams came changed or in another order"
    );
}

/// A stream of numbered datagrams.
pub(crate) struct Datagrams {
    enough: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<u64>,
}

impl Datagrams {
    pub(crate) fn start(client: &Namespace, server: &Namespace, address: IpAddr) -> Self {
        let receiver = server.run(move || udp(SocketAddr::new(address, 0)));
        // A receiver that waits for its CPU is to lose nothing of what has arrived.
        let room: libc::c_int = 64 << 20;
        // SAFETY: a pointer to an integer that outlives the call, with its length.
        let set = unsafe {
            libc::setsockopt(
                receiver.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const room).cast(),
                libc::socklen_t::try_from(size_of_val(&room)).unwrap(),
            )
        };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        let to = receiver.local_addr().unwrap();
        let enough = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&enough);
        let sender = client.spawn(move || {
            let socket = udp("0.0.0.0:0".parse().unwrap());
            let mut sent = 0_u64;
            while !until.load(Ordering::Relaxed) {
                socket.send_to(&sent.to_be_bytes(), to).unwrap();
                sent += 1;
                thread::sleep(Duration::from_micros(100));
            }
            let end = [sent.to_be_bytes(), [0; 8]].concat();
            socket.send_to(&end, to).unwrap();
            sent
        });
        let receiver = thread::spawn(move || {
            // A sender that changes its CPU may overtake itself.
            let mut received = BTreeSet::new();
            let mut sent = u64::MAX;
            let mut buffer = [0; 16];
            while (received.len() as u64) < sent {
                // Waits longer than anything takes: what has not come by then is lost.
                let Ok(length) = receiver.recv(&mut buffer) else {
                    break;
                };
                let number = u64::from_be_bytes(buffer[..8].try_into().unwrap());
                if length == 16 {
                    // The end, which says how many there are.
                    sent = number;
                } else {
                    assert!(received.insert(number), "a datagram came twice");
                }
            }
            received.len() as u64
        });
        Self {
            enough,
            sender,
            receiver,
        }
    }

    /// Ends it; all of it must have arrived.
    pub(crate) fn arrive(self) {
        self.enough.store(true, Ordering::Relaxed);
        let sent = join(self.sender);
        assert_eq!(join(self.receiver), sent, "datagrams were lost");
        assert!(sent > 100, "{sent} datagrams are no stream");
    }
}

/// Whether a datagram gets from one namespace to an address in another at all.
pub(crate) fn arrives(client: &Namespace, server: &Namespace, address: IpAddr) -> bool {
    let socket = server.run(move || udp(SocketAddr::new(address, 0)));
    let to = socket.local_addr().unwrap();
    client.run(move || {
        let unspecified = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        // No way there at all is as good as a datagram that is lost on it.
        let _ = udp(unspecified.parse().unwrap()).send_to(b"?", to);
    });
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    socket.recv(&mut [0]).is_ok()
}

/// A UDP socket that does not wait for ever.
pub(crate) fn udp(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Has a stream not wait for ever.
pub(crate) fn patient(stream: &TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
}

/// Sends a frame as it is from an interface of this thread's namespace.
pub(crate) fn send_frame(interface: &str, frame: &[u8]) {
    let all = libc::c_int::from(u16::try_from(libc::ETH_P_ALL).unwrap().to_be());
    // SAFETY: a plain system call.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all) };
    assert!(socket >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: integers, for which zeros are values.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    to.sll_ifindex = index_of(interface);
    // SAFETY: pointers to a frame and an address that outlive the call, with their lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            libc::socklen_t::try_from(size_of_val(&to)).unwrap(),
        )
    };
    assert_eq!(
        usize::try_from(sent),
        Ok(frame.len()),
        "{}",
        std::io::Error::last_os_error()
    );
}

pub(crate) fn index_of(interface: &str) -> i32 {
    let line = ip(&["-o", "link", "show", interface]);
    line.split(':')
        .next()
        .and_then(|index| index.trim().parse().ok())
        .unwrap()
}

/// How often packets were dropped for a reason.
pub(crate) fn drops(network: &Network, reason: DropReason) -> u64 {
    let drops = network.drops().unwrap();
    drops
        .into_iter()
        .find_map(|(found, count)| (found == reason).then_some(count))
        .unwrap()
}

/// Waits until something is so.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
