//! A host of one's own for each test: a thread in a network and a mount namespace that nobody else has, with a BPF
//! file system, and namespaces for containers beside it. All of it is gone when the test is over.

use std::{
    any::Any,
    fs::File,
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use flynn_overlay::{DropReason, Network, NetworkConfig};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use tempfile::TempDir;

/// How long anything may take that is not a hang.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Why these tests cannot run here.
pub fn obstacle() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    let nft = Command::new("nft").arg("--version").output();
    if !nft.is_ok_and(|output| output.status.success()) {
        return Some("needs nft");
    }
    let ip = Command::new("ip").arg("-V").output();
    if !ip.is_ok_and(|output| output.status.success()) {
        Some("needs ip")
    } else {
        None
    }
}

/// What a test knows of the host that it runs in.
pub struct Host {
    bpffs: TempDir,
}

impl Host {
    /// Runs a test in a host of its own.
    pub fn run<F>(test: impl FnOnce(Host) -> F + Send + 'static)
    where
        F: Future<Output = ()>,
    {
        let run = move || {
            unshare(UnshareFlags::NEWNET | UnshareFlags::NEWNS);
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            let bpffs = TempDir::new().unwrap();
            mount("bpf", bpffs.path(), "bpf", MountFlags::empty(), None).unwrap();
            ip(&["link", "set", "lo", "up"]);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test(Host { bpffs }));
        };
        if let Err(panic) = thread::spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    }

    /// Where programs and maps are pinned.
    pub fn pins(&self) -> std::path::PathBuf {
        self.bpffs.path().join("flynn")
    }

    /// The network that the tests have.
    pub fn config(&self) -> NetworkConfig {
        NetworkConfig {
            cluster: "100.100.0.0/16".parse().unwrap(),
            cluster6: Some(NetworkConfig::DEFAULT_CLUSTER6),
            subnet: "100.100.7.0/24".parse().unwrap(),
            pins: self.pins(),
            uplink: None,
        }
    }

    /// That network, up.
    pub async fn network(&self) -> Network {
        Network::up(self.config()).await.unwrap()
    }

    /// The namespace that the test runs in.
    pub fn namespace(&self) -> Namespace {
        Namespace::current()
    }
}

/// A network namespace.
pub struct Namespace(OwnedFd);

impl Namespace {
    /// One that is empty.
    pub fn new() -> Self {
        thread::spawn(|| {
            unshare(UnshareFlags::NEWNET);
            Self::current()
        })
        .join()
        .unwrap()
    }

    fn current() -> Self {
        Self(File::open("/proc/thread-self/ns/net").unwrap().into())
    }

    /// Runs something in it, in a thread of its own.
    pub fn spawn<R: Send + 'static>(&self, run: impl FnOnce() -> R + Send + 'static) -> JoinHandle<R> {
        let namespace = self.0.try_clone().unwrap();
        thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            run()
        })
    }

    /// The same, and waits for it.
    pub fn run<R: Send + 'static>(&self, run: impl FnOnce() -> R + Send + 'static) -> R {
        join(self.spawn(run))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The result of a thread, or its panic.
pub fn join<R>(thread: JoinHandle<R>) -> R {
    thread
        .join()
        .unwrap_or_else(|panic: Box<dyn Any + Send>| std::panic::resume_unwind(panic))
}

/// Has iproute2 do something in the namespace of this thread.
pub fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Bytes that are nowhere the same.
pub fn payload(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Sends bytes over TCP from one namespace to an address in another, which sends them back: both must get them whole.
/// Returns the address from which the server saw the client come.
pub fn tcp_echo(client: &Namespace, server: &Namespace, address: IpAddr, length: usize) -> IpAddr {
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
        stream.write_all(&payload(length, 2)).unwrap();
        peer.ip()
    });
    let to = port.recv_timeout(PATIENCE).unwrap();
    client.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        patient(&stream);
        stream.write_all(&payload(length, 1)).unwrap();
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
pub fn udp_echo(client: &Namespace, server: &Namespace, address: IpAddr, sizes: &[usize]) {
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
            let sent = payload(size, size as u64);
            socket.send(&sent).unwrap();
            let length = socket.recv(&mut buffer).unwrap();
            assert!(
                buffer[..length] == sent,
                "a datagram of {size} bytes came back changed"
            );
        }
    });
    join(server);
}

/// A UDP socket that does not wait for ever.
pub fn udp(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Has a stream not wait for ever.
pub fn patient(stream: &TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
}

/// Sends a frame as it is from an interface of this thread's namespace.
pub fn send_frame(interface: &str, frame: &[u8]) {
    let all = libc::c_int::from((libc::ETH_P_ALL as u16).to_be());
    // SAFETY: a plain system call.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all) };
    assert!(socket >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: integers, for which zeros are values.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = index_of(interface);
    // SAFETY: pointers to a frame and an address that outlive the call, with their lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as libc::socklen_t,
        )
    };
    assert_eq!(
        usize::try_from(sent),
        Ok(frame.len()),
        "{}",
        std::io::Error::last_os_error()
    );
}

fn index_of(interface: &str) -> i32 {
    let line = ip(&["-o", "link", "show", interface]);
    line.split(':')
        .next()
        .and_then(|index| index.trim().parse().ok())
        .unwrap()
}

/// How often packets were dropped for a reason.
pub fn drops(network: &Network, reason: DropReason) -> u64 {
    let drops = network.drops().unwrap();
    drops
        .into_iter()
        .find_map(|(found, count)| (found == reason).then_some(count))
        .unwrap()
}

/// Waits until something is so.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn unshare(flags: UnshareFlags) {
    // SAFETY: no flag which takes from a thread what others count on it to share: no files, no memory.
    unsafe { unshare_unsafe(flags) }.unwrap();
}
