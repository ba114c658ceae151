//! Routes by port in the kernel: a client outside, a host with the part of the router that feeds the load balancer, and a
//! container.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../../dataplane/tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use flynn_api::Meta;
use flynn_api::discovery::Instance;
use flynn_api::route::{Route, RouteKind};
use flynn_dataplane::lb::Mode;
use flynn_dataplane::{Attachment, Container, Dataplane, Network, Prefix, Program};
use flynn_lb::l4::{L4, Options};
use flynn_lb::router::Router;
use flynn_lb::tls::{Certificates, default_certificate};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use support::{alone, ip, pins};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const CONTAINER: Ipv4Addr = Ipv4Addr::new(100, 100, 1, 2);
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];
const CONTAINER_MAC: [u8; 6] = [2, 0, 0, 0, 3, 1];

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            (
                "routes_by_port_lead_to_containers",
                routes_by_port_lead_to_containers,
            ),
            (
                "udp_routes_that_nobody_carries_are_refused",
                udp_routes_that_nobody_carries_are_refused,
            ),
        ],
    )
}

/// A network namespace, as long as the file is there.
fn place() -> File {
    let made = thread::spawn(|| {
        support::unshare(UnshareFlags::NEWNET);
        File::open("/proc/thread-self/ns/net").unwrap()
    });
    made.join().unwrap()
}

fn inside<T: Send>(place: &File, what: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let there = scope.spawn(|| {
            move_into_link_name_space(place.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            what()
        });
        there.join().unwrap()
    })
}

fn lines(lines: &str) {
    for line in lines.lines() {
        ip(&line.split_whitespace().collect::<Vec<_>>());
    }
}

fn path(place: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), place.as_raw_fd())
}

/// The host's network with the container behind it. The calling thread is in the host's namespace.
fn host(pins: &Path, client: &File, container: &File) -> Dataplane {
    lines(&format!(
        "link add up0 type veth peer name up0 netns {}
address add {HOST}/24 dev up0
link set dev up0 up
link add c0 type veth peer name eth0 netns {}
link set dev c0 address 02:00:00:00:02:01 up
route add {CONTAINER}/32 dev c0",
        path(client),
        path(container)
    ));
    inside(client, || {
        lines("address add 10.0.0.9/24 dev up0\nlink set dev up0 up");
    });
    inside(container, || {
        lines(&format!(
            "link set dev lo up
link set dev eth0 address 02:00:00:00:03:01 up
address add {CONTAINER}/32 dev eth0
neighbour add 100.100.1.1 lladdr 02:00:00:00:02:01 dev eth0
route add default via 100.100.1.1 dev eth0 onlink"
        ));
    });
    let index = ip(&["-o", "link", "show", "dev", "c0"]);
    let mut dataplane = Dataplane::open(pins).unwrap();
    dataplane
        .configure(&Network {
            cluster4: Prefix {
                address: Ipv4Addr::new(100, 100, 0, 0),
                length: 16,
            },
            cluster6: None,
            gateway4: Ipv4Addr::new(100, 100, 1, 1),
            gateway6: None,
            subnet_length: 24,
            address: Some(HOST),
            tunnel_mtu: 1450,
            device: None,
            gateway_mac: GATEWAY_MAC,
        })
        .unwrap();
    dataplane.attach(Program::FromContainer, "c0").unwrap();
    let container = Container {
        ipv4: CONTAINER,
        ipv6: None,
        mac: CONTAINER_MAC,
        ifindex: index.split(':').next().unwrap().parse().unwrap(),
    };
    dataplane.add(&container, &Attachment::default()).unwrap();
    dataplane
}

/// Answers over both protocols with what it is called.
fn serve(container: &File, port: u16, name: &'static str) {
    inside(container, move || {
        let listener = TcpListener::bind((CONTAINER, port)).unwrap();
        let socket = UdpSocket::bind((CONTAINER, port)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut stream| stream.write_all(name.as_bytes()));
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(name.as_bytes(), from);
            }
        });
    });
}

fn tcp(client: &File, port: u16) -> std::io::Result<String> {
    inside(client, || {
        let to = SocketAddr::from((HOST, port));
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    })
}

fn udp(client: &File, port: u16) -> std::io::Result<String> {
    inside(client, || {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        socket.connect((HOST, port))?;
        socket.send(b"?")?;
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    })
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn route(kind: RouteKind, port: u16) -> Route {
    Route {
        kind,
        id: format!("{}/{port}", kind.name()),
        service: "app".into(),
        port,
        drain_backends: true,
        ..Route::default()
    }
}

fn instance(port: u16) -> Instance {
    Instance::new("tcp", format!("{CONTAINER}:{port}"), Meta::new())
}

fn router() -> Arc<Router> {
    let data = tempfile::tempdir().unwrap();
    let certificates = Certificates::new(&default_certificate(data.path(), None).unwrap()).unwrap();
    Arc::new(Router::new(Arc::new(certificates), "key".into()))
}

fn udp_routes_that_nobody_carries_are_refused() {
    let (router, stop) = (router(), CancellationToken::new());
    router.set_routes(vec![route(RouteKind::Tcp, 3000), route(RouteKind::Udp, 3000)]);
    let options = Options {
        host: HOST,
        mode: Mode::Auto,
        first_host: false,
    };
    let following = {
        let (router, stop) = (Arc::clone(&router), stop.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        thread::spawn(move || runtime.block_on(Arc::new(L4::default()).follow(router, None, options, stop)))
    };
    until("it is refused", || {
        let refused = router.refused();
        refused.len() == 1 && refused["3000/udp"].contains("BPF_PINS")
    });
    router.set_routes(vec![route(RouteKind::Tcp, 3000)]);
    until("a route that is gone is not", || router.refused().is_empty());
    stop.cancel();
    following.join().unwrap();
}

fn routes_by_port_lead_to_containers() {
    alone(|bpffs| {
        let pins = pins(bpffs);
        let (client, container) = (place(), place());
        let _dataplane = host(&pins, &client, &container);
        serve(&container, 8080, "first");
        serve(&container, 8081, "second");

        let router = router();
        let (l4, stop) = (Arc::new(L4::default()), CancellationToken::new());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let here = File::open("/proc/thread-self/ns/net").unwrap();
        let options = Options {
            host: HOST,
            mode: Mode::Auto,
            first_host: false,
        };
        let following = {
            let (l4, router, pins, stop) = (Arc::clone(&l4), Arc::clone(&router), pins.clone(), stop.clone());
            thread::spawn(move || {
                move_into_link_name_space(here.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                runtime.block_on(l4.follow(router, Some(pins), options, stop));
            })
        };

        thread::sleep(Duration::from_millis(300));
        assert!(
            !pins.join("links/lb_uplink@up0").exists(),
            "nothing to balance, nothing attached"
        );
        router.set_routes(vec![route(RouteKind::Tcp, 3000), route(RouteKind::Udp, 3000)]);
        let service = Arc::clone(&router.services()[0]);
        router.set_instances(&service, vec![instance(8080)], None, BTreeSet::new());
        until("TCP", || tcp(&client, 3000).is_ok_and(|said| said == "first"));
        until("UDP", || udp(&client, 3000).is_ok_and(|said| said == "first"));

        // New connections go to the new instance; the old one is there for a while for those that it has.
        router.set_instances(&service, vec![instance(8081)], None, BTreeSet::new());
        until("the other instance", || {
            tcp(&client, 3000).is_ok_and(|said| said == "second")
        });
        until("datagrams as well", || {
            udp(&client, 3000).is_ok_and(|said| said == "second")
        });
        until("metrics", || {
            l4.text()
                .contains("flynn_router_l4_flows_total{address=\"10.0.0.1\",port=\"3000\",protocol=\"udp\"}")
        });

        // Without the router the kernel goes on.
        stop.cancel();
        following.join().unwrap();
        assert_eq!(tcp(&client, 3000).unwrap(), "second");
        assert_eq!(udp(&client, 3000).unwrap(), "second");
    });
}
