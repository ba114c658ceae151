//! New TCP connections to containers of one host through another, all on one link: by our balancer at the uplink's tc
//! hook, by HAProxy in TCP mode, and by nftables (translating the destination, and the source, so that answers come
//! back).
//!
//! Client, server, kernel and proxy share one CPU and one connection follows the other, so that the CPU is never idle: the
//! time that a connection takes is the CPU time that it costs. What forwarding costs is that time less that of the same
//! load straight to the containers.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use flynn_dataplane::lb::{Backend, Balancer, Limits, Mode, Service, Vip};
use flynn_dataplane::{Attachment, Container, Program, Protocol};
use flynn_lab::netns;

use super::load::Load;
use super::{CPU, Node, SUITE, address, container, ip, path, stay, tell};
use crate::row::{Goal, Row, Subject};
use crate::samples::in_turns;
use crate::suites::Thoroughness;

const BACKENDS: [u8; 3] = [1, 10, 100];
const PORT: u16 = 3000;
const BACKEND_PORT: u16 = 8080;
/// Hosts: ours, the containers', HAProxy's, nftables', and the client.
const OURS: u8 = 1;
const THEIRS: u8 = 2;
const HAPROXY: u8 = 3;
const NFTABLES: u8 = 4;
const CLIENT: u8 = 9;
/// Another, for what goes straight: a port of one client is not to reach one container both ways.
const STRAIGHT: u8 = 10;
const CONTAINER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

macro_rules! subjects {
    ($count:literal) => {
        [
            subject(
                concat!($count, " backends: CPU to forward a connection"),
                "us",
                "HAProxy",
                Goal::RatioAtMost(0.333),
            ),
            subject(
                concat!($count, " backends: CPU to forward a connection"),
                "us",
                "nftables DNAT",
                Goal::RatioAtMost(0.667),
            ),
            subject(
                concat!($count, " backends: connections"),
                "1/s",
                "HAProxy",
                Goal::RatioAtLeast(1.0),
            ),
            subject(
                concat!($count, " backends: connections"),
                "1/s",
                "nftables DNAT",
                Goal::RatioAtLeast(1.0),
            ),
        ]
    };
}

const fn subject(name: &'static str, unit: &'static str, peer: &'static str, goal: Goal) -> Subject {
    Subject {
        suite: SUITE,
        name,
        unit,
        peer: Some(peer),
        goal,
    }
}

const ROWS: [[Subject; 4]; 3] = [subjects!("1"), subjects!("10"), subjects!("100")];

pub(super) fn rows(pins: &Path, thoroughness: Thoroughness) -> Vec<Row> {
    let measured = World::up(pins).and_then(|mut world| {
        let mut rows = Vec::new();
        for (subjects, count) in ROWS.iter().zip(BACKENDS) {
            rows.extend(world.measure(count, subjects, thoroughness)?);
        }
        Ok(rows)
    });
    measured.unwrap_or_else(|error| {
        let rows = ROWS.iter().flatten();
        rows.map(|row| row.missing(format!("{error:#}"))).collect()
    })
}

struct World {
    hosts: Vec<(u8, OwnedFd)>,
    _others: [OwnedFd; 2],
    balancers: [(u8, Node, Balancer); 2],
    server: Load,
    scratch: tempfile::TempDir,
}

impl World {
    fn up(pins: &Path) -> Result<Self> {
        let switch = netns::make()?;
        ip(&switch, "link add bridge type bridge\nlink set bridge up\n")?;
        let mut hosts = Vec::new();
        for number in [OURS, THEIRS, HAPROXY, NFTABLES, CLIENT, STRAIGHT] {
            let host = netns::make()?;
            ip(
                &switch,
                &format!(
                    "link add p{number} type veth peer name uplink netns {}\nlink set p{number} master bridge up\n",
                    path(&host)
                ),
            )?;
            ip(
                &host,
                &format!(
                    "link set lo up\naddress add {}/24 dev uplink\nlink set uplink up\n",
                    address(number)
                ),
            )?;
            if number != THEIRS {
                ip(
                    &host,
                    &format!("route add {}/24 via {}\n", container(THEIRS, 0), address(THEIRS)),
                )?;
            }
            hosts.push((number, host));
        }
        let of = |number: u8| {
            let found = hosts.iter().find(|(other, _)| *other == number);
            found.map(|(_, host)| host).context("a host")
        };
        // One container with all the addresses.
        let inside = netns::make()?;
        ip(
            of(THEIRS)?,
            &format!(
                "link add c0 type veth peer name eth0 netns {}\nlink set c0 address 02:00:00:00:00:01 up\nroute add {}/24 dev c0\n",
                path(&inside),
                container(THEIRS, 0)
            ),
        )?;
        // The program at the veth lets no ARP pass.
        let mut neighbours = String::new();
        for last in addresses(100) {
            let address = container(THEIRS, last);
            writeln!(
                neighbours,
                "neighbour add {address} lladdr 02:00:00:00:00:02 dev c0 nud permanent"
            )?;
        }
        ip(of(THEIRS)?, &neighbours)?;
        let mut lines = "link set lo up\nlink set eth0 address 02:00:00:00:00:02 up\n".to_owned();
        for last in addresses(100) {
            writeln!(lines, "address add {}/32 dev eth0", container(THEIRS, last))?;
        }
        lines.push_str("neighbour add 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent\n");
        lines.push_str("route add default via 169.254.1.1 dev eth0 onlink\n");
        ip(&inside, &lines)?;

        let node = |number: u8, other: u8| -> Result<(u8, Node, Balancer)> {
            netns::inside(of(number)?.as_fd(), || {
                let mut node = Node::up(pins, number, other, "uplink", true)?;
                if number == THEIRS {
                    let index = netns::output(&["-o", "link", "show", "dev", "c0"])?;
                    let ifindex = index.split(':').next().unwrap_or_default().trim().parse()?;
                    node.dataplane.attach(Program::FromContainer, "c0")?;
                    for last in addresses(100) {
                        let container = Container {
                            ipv4: container(THEIRS, last),
                            ipv6: None,
                            mac: CONTAINER_MAC,
                            ifindex,
                        };
                        node.dataplane.add(&container, &Attachment::default())?;
                    }
                }
                let limits = Limits::of_memory(4 << 30);
                let balancer = Balancer::open(&node.pins, node.uplink.clone(), Mode::Tc, &limits)?;
                Ok((number, node, balancer))
            })
        };
        let balancers = [node(OURS, THEIRS)?, node(THEIRS, OURS)?];
        netns::inside(of(NFTABLES)?.as_fd(), || {
            Ok(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?)
        })?;
        let server = Load::answer(&inside, CPU, BACKEND_PORT)?;
        Ok(Self {
            hosts,
            _others: [switch, inside],
            balancers,
            server,
            scratch: tempfile::tempdir()?,
        })
    }

    fn host(&self, number: u8) -> Result<&OwnedFd> {
        let found = self.hosts.iter().find(|(other, _)| *other == number);
        found.map(|(_, host)| host).context("a host")
    }

    fn measure(
        &mut self,
        count: u8,
        subjects: &[Subject; 4],
        thoroughness: Thoroughness,
    ) -> Result<Vec<Row>> {
        let service = Service {
            vips: vec![Vip {
                address: address(OURS).into(),
                port: PORT,
                protocol: Protocol::Tcp,
            }],
            backends: addresses(count)
                .map(|last| Backend::new(container(THEIRS, last), BACKEND_PORT))
                .collect(),
            ..Service::default()
        };
        for at in 0..self.balancers.len() {
            let (number, _, balancer) = &mut self.balancers[at];
            let found = self
                .hosts
                .iter()
                .find(|(other, _)| other == number)
                .context("a host")?;
            netns::inside(found.1.as_fd(), || {
                Ok(balancer.set(std::slice::from_ref(&service))?)
            })?;
        }
        self.translate(count)?;
        let _haproxy = self.haproxy(count)?;
        let time = Duration::from_millis(thoroughness.pick(700, 2000));
        let (client, straight) = (self.host(CLIENT)?, self.host(STRAIGHT)?);
        let mut places = [
            ("straight", SocketAddr::from((container(THEIRS, 2), BACKEND_PORT))),
            ("ours", SocketAddr::from((address(OURS), PORT))),
            ("HAProxy", SocketAddr::from((address(HAPROXY), PORT))),
            ("nftables DNAT", SocketAddr::from((address(NFTABLES), PORT))),
        ];
        let rates = in_turns(&mut places, thoroughness.pick(3, 5), |(name, to)| {
            let client = if *name == "straight" { straight } else { client };
            self.server
                .ask(client, CPU, *to, time)
                .with_context(|| format!("{name}, {count} backends"))
        })?;
        eprintln!("new connections to {count} backends:");
        for ((name, _), rates) in places.iter().zip(&rates) {
            tell(name, rates, "1/s");
        }
        let above = |which: usize| -> Vec<f64> {
            rates[which]
                .iter()
                .zip(&rates[0])
                .map(|(rate, straight)| 1e6 / rate - 1e6 / straight)
                .collect()
        };
        for (which, (name, _)) in places.iter().enumerate().skip(1) {
            tell(&format!("{name}, CPU to forward one"), &above(which), "us");
        }
        Ok(vec![
            subjects[0].row(&above(1), &above(2)),
            subjects[1].row(&above(1), &above(3)),
            subjects[2].row(&rates[1], &rates[2]),
            subjects[3].row(&rates[1], &rates[3]),
        ])
    }

    fn translate(&self, count: u8) -> Result<()> {
        let mut map = String::new();
        for (nth, last) in addresses(count).enumerate() {
            write!(map, "{nth} : {},", container(THEIRS, last))?;
        }
        let script = format!(
            "table ip lb\ndelete table ip lb\ntable ip lb {{
                chain in {{ type nat hook prerouting priority -100; tcp dport {PORT} dnat to numgen inc mod {count} map {{ {map} }} : {BACKEND_PORT}; }}
                chain out {{ type nat hook postrouting priority 100; ip daddr {}/24 masquerade; }}
            }}\n",
            container(THEIRS, 0)
        );
        netns::inside(self.host(NFTABLES)?.as_fd(), || netns::nft(&script))
    }

    fn haproxy(&self, count: u8) -> Result<Running> {
        let mut config = format!(
            "global\n maxconn 1000\n nbthread 1\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n timeout server 60s\nlisten l4\n bind :{PORT}\n balance roundrobin\n"
        );
        for last in addresses(count) {
            writeln!(
                config,
                " server s{last} {}:{BACKEND_PORT}",
                container(THEIRS, last)
            )?;
        }
        let file = self.scratch.path().join("haproxy.cfg");
        std::fs::write(&file, config)?;
        let child = netns::inside(self.host(HAPROXY)?.as_fd(), || {
            stay()?;
            Command::new(std::env::current_exe()?)
                .args([
                    "inside",
                    "settled",
                    "--cpu",
                    &CPU.to_string(),
                    "--",
                    "haproxy",
                    "-db",
                    "-f",
                ])
                .arg(&file)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("cannot start haproxy; `cargo xtask setup` installs it")
        })?;
        let running = Running(child);
        let began = Instant::now();
        let to = SocketAddr::from((address(HAPROXY), PORT));
        while let Err(error) = self.server.ask(self.host(CLIENT)?, CPU, to, Duration::ZERO) {
            if began.elapsed() > Duration::from_secs(10) {
                return Err(error.context("haproxy does not answer"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(running)
    }
}

/// The last bytes of so many containers' addresses.
fn addresses(count: u8) -> impl Iterator<Item = u8> {
    2..count + 2
}

/// A process that dies with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
