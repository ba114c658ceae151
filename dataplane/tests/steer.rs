//! The router's ports, with real sockets: each test in a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use flynn_dataplane::{Port, Protocol, Steered, steer::Steer};
use support::{alone, joined, pins};

const PATIENCE: Duration = Duration::from_mins(1);
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            ("routed_ports_lead_to_one_socket", routed_ports_lead_to_one_socket),
            ("any_address_of_the_host_will_do", any_address_of_the_host_will_do),
            (
                "five_hundred_routes_bind_nothing",
                five_hundred_routes_bind_nothing,
            ),
            ("other_ports_are_left_alone", other_ports_are_left_alone),
            ("datagrams_are_steered", datagrams_are_steered),
            (
                "ports_are_refused_without_a_router",
                ports_are_refused_without_a_router,
            ),
            (
                "a_new_router_takes_over_under_load",
                a_new_router_takes_over_under_load,
            ),
            ("opening_again_keeps_one_program", opening_again_keeps_one_program),
        ],
    )
}

fn tcp(numbers: impl IntoIterator<Item = u16>) -> BTreeSet<Port> {
    let port = |number| Port {
        protocol: Protocol::Tcp,
        number,
    };
    numbers.into_iter().map(port).collect()
}

/// A router in a thread: answers each connection with its name and the port that the client has dialled.
struct Router {
    listener: TcpListener,
    answered: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Router {
    fn new(name: &'static str) -> Self {
        // On one address and for both families, as the program does not care what it is bound to.
        let listener = TcpListener::bind("[::]:0").unwrap();
        let accepting = listener.try_clone().unwrap();
        let (answered, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end) = (Arc::clone(&answered), Arc::clone(&stop));
        accepting.set_nonblocking(true).unwrap();
        let thread = thread::spawn(move || {
            loop {
                match accepting.accept() {
                    Ok((mut stream, _)) => {
                        let port = stream.local_addr().unwrap().port();
                        writeln!(stream, "{name} {port}").unwrap();
                        count.fetch_add(1, Ordering::SeqCst);
                        // The client closes first: where this side does and becomes TIME_WAIT, the client's last
                        // packet may find neither of the two on a slow machine, and is answered with a reset.
                        stream.set_read_timeout(Some(PATIENCE)).unwrap();
                        let _ = stream.read(&mut [0; 1]);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        // What was in the queue has been served.
                        if end.load(Ordering::SeqCst) {
                            return;
                        }
                        thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        Self {
            listener,
            answered,
            stop,
            thread,
        }
    }

    /// Answers what is in its queue and goes.
    fn drain(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        joined(self.thread.join());
        drop(self.listener);
        self.answered.load(Ordering::SeqCst)
    }
}

fn ask(to: SocketAddr) -> std::io::Result<String> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

fn count(steer: &Steer, wanted: Steered) -> u64 {
    let counts = steer.counts().unwrap();
    counts
        .into_iter()
        .find(|(outcome, _)| *outcome == wanted)
        .unwrap()
        .1
}

fn eventually(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn refused(address: IpAddr, port: u16) -> bool {
    ask((address, port).into()).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn routed_ports_lead_to_one_socket() {
    alone(|bpffs| {
        let router = Router::new("router");
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        steer.serve(Protocol::Tcp, &router.listener).unwrap();
        // A range and single ones, the first and the last that there are.
        let ports = tcp((3000..3100).chain([1, 6379, 65535]));
        steer.set_ports(&ports).unwrap();
        assert_eq!(steer.ports().unwrap(), ports);
        for address in ADDRESSES {
            for port in [1, 3000, 3050, 3099, 6379, 65535] {
                assert_eq!(ask((address, port).into()).unwrap(), format!("router {port}"));
            }
            for port in [2, 2999, 3100, 65534] {
                assert!(refused(address, port), "{address} {port}");
            }
        }
        // A packet that comes when its connection has ended already is sought a socket for as well.
        assert!(count(&steer, Steered::Taken) >= 12);
        assert_eq!(count(&steer, Steered::NoRouter), 0);

        steer.set_ports(&tcp([3001])).unwrap();
        assert!(refused(ADDRESSES[0], 3000));
        assert_eq!(ask((ADDRESSES[0], 3001).into()).unwrap(), "router 3001");
        router.drain();
    });
}

fn any_address_of_the_host_will_do() {
    alone(|bpffs| {
        support::ip(&["link", "add", "one", "type", "veth", "peer", "name", "two"]);
        support::ip(&["address", "add", "192.0.2.7/24", "dev", "one"]);
        support::ip(&["address", "add", "2001:db8::7/64", "dev", "one", "nodad"]);
        support::ip(&["link", "set", "one", "up"]);
        // The kernel makes an IPv6 address the host's own a moment after it has been added.
        eventually(|| support::ip(&["-6", "route", "show", "table", "local"]).contains("2001:db8::7"));
        let router = Router::new("router");
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        steer.serve(Protocol::Tcp, &router.listener).unwrap();
        steer.set_ports(&tcp([5555])).unwrap();
        for address in ["192.0.2.7:5555", "[2001:db8::7]:5555"] {
            assert_eq!(ask(address.parse().unwrap()).unwrap(), "router 5555");
        }
        router.drain();
    });
}

/// How many sockets of this namespace listen, as the kernel counts them.
fn listening() -> usize {
    ["tcp", "tcp6"]
        .iter()
        .map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap())
        .map(|table| {
            table
                .lines()
                .filter(|line| line.split_whitespace().nth(3) == Some("0A"))
                .count()
        })
        .sum()
}

fn five_hundred_routes_bind_nothing() {
    alone(|bpffs| {
        let router = Router::new("router");
        let before = listening();
        assert_eq!(before, 1);
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        steer.serve(Protocol::Tcp, &router.listener).unwrap();
        steer.set_ports(&tcp(3000..3500)).unwrap();
        assert_eq!(listening(), before);
        for port in 3000..3500 {
            assert_eq!(
                ask((ADDRESSES[0], port).into()).unwrap(),
                format!("router {port}")
            );
        }
        assert_eq!(listening(), before);
        router.drain();
    });
}

fn other_ports_are_left_alone() {
    alone(|bpffs| {
        let (router, other) = (Router::new("router"), Router::new("other"));
        let port = other.listener.local_addr().unwrap().port();
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        steer.serve(Protocol::Tcp, &router.listener).unwrap();
        steer.set_ports(&tcp([3000])).unwrap();
        for address in ADDRESSES {
            assert_eq!(ask((address, port).into()).unwrap(), format!("other {port}"));
        }
        // Nor does a route for TCP take datagrams.
        let socket = UdpSocket::bind("127.0.0.1:3000").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .send_to(b"own", "127.0.0.1:3000")
            .unwrap();
        assert_eq!(socket.recv(&mut [0; 9]).unwrap(), 3);
        assert_eq!(count(&steer, Steered::Taken), 0);
        router.drain();
        other.drain();
    });
}

fn datagrams_are_steered() {
    alone(|bpffs| {
        let router = UdpSocket::bind("[::]:0").unwrap();
        router.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        steer.serve(Protocol::Udp, &router).unwrap();
        let wanted = BTreeSet::from([Port {
            protocol: Protocol::Udp,
            number: 443,
        }]);
        steer.set_ports(&wanted).unwrap();
        for (from, to) in [("127.0.0.1:0", "127.0.0.1:443"), ("[::1]:0", "[::1]:443")] {
            let client = UdpSocket::bind(from).unwrap();
            client.send_to(b"datagram", to).unwrap();
            let mut buffer = [0; 16];
            let (length, peer) = router.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"datagram");
            assert_eq!(peer.port(), client.local_addr().unwrap().port());
        }
        // A socket that is connected with its peer keeps what that sends, on the same port.
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = UdpSocket::bind("127.0.0.1:443").unwrap();
        own.connect(peer.local_addr().unwrap()).unwrap();
        own.set_read_timeout(Some(PATIENCE)).unwrap();
        peer.send_to(b"own", "127.0.0.1:443").unwrap();
        assert_eq!(own.recv(&mut [0; 9]).unwrap(), 3);
    });
}

fn ports_are_refused_without_a_router() {
    alone(|bpffs| {
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        steer.set_ports(&tcp([3000])).unwrap();
        assert!(refused(ADDRESSES[0], 3000));
        assert_eq!(count(&steer, Steered::NoRouter), 1);
        let router = Router::new("router");
        steer.serve(Protocol::Tcp, &router.listener).unwrap();
        assert_eq!(ask((ADDRESSES[0], 3000).into()).unwrap(), "router 3000");
        // It dies, and nothing else does.
        router.drain();
        drop(steer);
        for address in ADDRESSES {
            assert!(refused(address, 3000));
        }
        // What listens there by itself is then reached again.
        let other = TcpListener::bind("127.0.0.1:3000").unwrap();
        drop(TcpStream::connect("127.0.0.1:3000").unwrap());
        other.accept().unwrap();
        // Its successor finds the ports as they were.
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        assert_eq!(steer.ports().unwrap(), tcp([3000]));
        let router = Router::new("successor");
        steer.serve(Protocol::Tcp, &router.listener).unwrap();
        assert_eq!(ask((ADDRESSES[0], 3000).into()).unwrap(), "successor 3000");
        router.drain();
    });
}

/// Clients connect without a pause while one router after the other takes over: none is refused or left waiting.
fn a_new_router_takes_over_under_load() {
    const ROUTERS: usize = 10;
    const CLIENTS: usize = 4;
    alone(|bpffs| {
        let mut router = Router::new("router");
        take_over(bpffs, &router);
        let stop = Arc::new(AtomicBool::new(false));
        let asked: [_; CLIENTS] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
        let all_asked = || asked.each_ref().map(|count| count.load(Ordering::SeqCst));
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (stop, asked) = (Arc::clone(&stop), Arc::clone(&asked[client]));
                let address = ADDRESSES[client % 2];
                // In the namespace of this thread, as threads begin in that of their maker.
                thread::spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        assert_eq!(ask((address, 3000).into()).unwrap(), "router 3000");
                        asked.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let mut answered = 0;
        for _ in 0..ROUTERS {
            let well = || {
                assert!(
                    !clients.iter().any(JoinHandle::is_finished),
                    "a client has failed"
                );
            };
            // Each has served some before the next comes.
            let before = router.answered.load(Ordering::SeqCst);
            eventually(|| {
                well();
                router.answered.load(Ordering::SeqCst) >= before + 50
            });
            let next = Router::new("router");
            take_over(bpffs, &next);
            let old = std::mem::replace(&mut router, next);
            // What had begun with it ends with it.
            let before = all_asked();
            eventually(|| {
                well();
                all_asked().iter().zip(before).all(|(now, then)| *now > then)
            });
            answered += old.drain();
        }
        stop.store(true, Ordering::SeqCst);
        for client in clients {
            joined(client.join());
        }
        answered += router.drain();
        assert_eq!(answered, all_asked().iter().sum());
    });
}

/// What a router process does at its start.
fn take_over(bpffs: &Path, router: &Router) {
    let mut steer = Steer::open(&pins(bpffs)).unwrap();
    steer.set_ports(&tcp([3000])).unwrap();
    steer.serve(Protocol::Tcp, &router.listener).unwrap();
}

fn opening_again_keeps_one_program() {
    alone(|bpffs| {
        for _ in 0..20 {
            drop(Steer::open(&pins(bpffs)).unwrap());
        }
        let router = Router::new("router");
        let mut steer = Steer::open(&pins(bpffs)).unwrap();
        steer.serve(Protocol::Tcp, &router.listener).unwrap();
        steer.set_ports(&tcp([3000])).unwrap();
        // The kernel lets go of links a moment after they were left.
        eventually(|| {
            let before = count(&steer, Steered::Taken);
            assert_eq!(ask((ADDRESSES[0], 3000).into()).unwrap(), "router 3000");
            count(&steer, Steered::Taken) == before + 1
        });
        steer.detach().unwrap();
        eventually(|| refused(ADDRESSES[0], 3000));
        router.drain();
    });
}
