//! Floating addresses between hosts that are network namespaces on one switch, and a client whose neighbour table is
//! warm.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

#[expect(dead_code, reason = "nothing is pinned here")]
#[path = "../../../dataplane/tests/support/mod.rs"]
mod alone;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use alone::ip;
use flynn_hostd::floating::{self, Held, Settings};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tokio::sync::watch;

/// Far more than it takes: what it took is printed.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where hosts say who they are.
const PORT: u16 = 7;
const ADDRESSES: [&str; 2] = ["192.0.2.100/24", "2001:db8::100/64"];

fn main() {
    alone::main(
        &["ip"],
        |_| None,
        &[
            (
                "another_host_answers_when_one_is_lost",
                another_host_answers_when_one_is_lost,
            ),
            (
                "addresses_go_when_they_are_removed",
                addresses_go_when_they_are_removed,
            ),
            (
                "who_has_not_the_key_is_not_heard",
                who_has_not_the_key_is_not_heard,
            ),
        ],
    )
}

/// A network namespace on the switch, by a veth whose other end is in the test's own.
struct Namespace {
    descriptor: OwnedFd,
    port: String,
}

impl Namespace {
    fn new(name: &str, last: u8) -> Self {
        let descriptor = thread::spawn(|| {
            alone::unshare(UnshareFlags::NEWNET);
            OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap())
        })
        .join()
        .unwrap();
        let namespace = Self {
            port: format!("port-{name}"),
            descriptor,
        };
        let path = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            namespace.descriptor.as_raw_fd()
        );
        let port = &namespace.port;
        ip(&[
            "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", &path,
        ]);
        ip(&["link", "set", port, "master", "switch", "up"]);
        namespace.run(move || {
            ip(&["link", "set", "lo", "up"]);
            ip(&["address", "add", &format!("192.0.2.{last}/24"), "dev", "eth0"]);
            ip(&[
                "address",
                "add",
                &format!("2001:db8::{last}/64"),
                "dev",
                "eth0",
                "nodad",
            ]);
            ip(&["link", "set", "eth0", "up"]);
        });
        namespace
    }

    fn spawn<R: Send + 'static>(&self, run: impl FnOnce() -> R + Send + 'static) -> JoinHandle<R> {
        let namespace = self.descriptor.try_clone().unwrap();
        thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            run()
        })
    }

    fn run<R: Send + 'static>(&self, run: impl FnOnce() -> R + Send + 'static) -> R {
        self.spawn(run).join().unwrap()
    }
}

/// A host: its share of the addresses, and somebody on them who says its name.
struct Host {
    name: &'static str,
    namespace: Namespace,
    settings: watch::Sender<Option<Settings>>,
    held: Held,
}

impl Host {
    fn start(name: &'static str, last: u8, settings: Settings) -> Self {
        let namespace = Namespace::new(name, last);
        let (settings, receiver) = watch::channel(Some(settings));
        let held = Held::default();
        let own = held.clone();
        namespace.spawn(move || {
            let never = flynn_api::server::CancellationToken::new();
            floating::run(name, Ipv4Addr::new(192, 0, 2, last), receiver, &own, &never).unwrap();
        });
        namespace.spawn(move || {
            let listener = TcpListener::bind(("::", PORT)).unwrap();
            for mut client in listener.incoming().flatten() {
                // One that has gone meanwhile gets no answer.
                let _ = client.write_all(name.as_bytes());
            }
        });
        Self {
            name,
            namespace,
            settings,
            held,
        }
    }

    fn holds(&self, ip: IpAddr) -> bool {
        self.held.get().contains(&ip)
    }
}

fn settings(hosts: &[(&str, u8)], key: u8) -> Settings {
    Settings {
        key: [key; 32],
        hosts: hosts
            .iter()
            .map(|(name, last)| ((*name).to_owned(), Ipv4Addr::new(192, 0, 2, *last)))
            .collect::<BTreeMap<_, _>>(),
        addresses: ADDRESSES.iter().map(|address| address.parse().unwrap()).collect(),
    }
}

fn ips() -> [IpAddr; 2] {
    ADDRESSES.map(|address| address.split('/').next().unwrap().parse().unwrap())
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn switched(test: impl FnOnce() + Send + 'static) {
    alone::alone(|_| {
        ip(&["link", "add", "switch", "type", "bridge", "forward_delay", "0"]);
        ip(&["link", "set", "switch", "up"]);
        test();
    });
}

/// Who answers at an address, if anybody does soon.
fn who(client: &Namespace, ip: IpAddr) -> Option<String> {
    client.run(move || {
        let patience = Duration::from_millis(100);
        let mut stream = TcpStream::connect_timeout(&(ip, PORT).into(), patience).ok()?;
        stream.set_read_timeout(Some(patience)).unwrap();
        let mut name = String::new();
        stream.read_to_string(&mut name).ok()?;
        (!name.is_empty()).then_some(name)
    })
}

fn another_host_answers_when_one_is_lost() {
    switched(|| {
        let names = [("one", 1), ("two", 2), ("three", 3)];
        let client = Namespace::new("client", 9);
        let hosts: Vec<Host> = names
            .iter()
            .map(|(name, last)| Host::start(name, *last, settings(&names, 1)))
            .collect();
        for ip in ips() {
            let holders = || {
                hosts
                    .iter()
                    .filter(|host| host.holds(ip))
                    .map(|host| host.name)
                    .collect::<Vec<_>>()
            };
            // All have settled once nothing has changed for longer than that takes.
            let mut stable = (holders(), Instant::now());
            let begun = Instant::now();
            while stable.0.len() != 1 || stable.1.elapsed() < Duration::from_millis(1500) {
                assert!(
                    begun.elapsed() < PATIENCE,
                    "the hosts do not settle: {:?}",
                    stable.0
                );
                thread::sleep(Duration::from_millis(10));
                if holders() != stable.0 {
                    stable = (holders(), Instant::now());
                }
            }
            eventually("it answers", || {
                who(&client, ip).as_deref() == holders().first().copied()
            });
            let holder = hosts.iter().find(|host| host.holds(ip)).unwrap();
            cut(&holder.namespace.port, "down");
            let lost = Instant::now();
            eventually("another answers", || {
                who(&client, ip).is_some_and(|name| name != holder.name)
            });
            println!("{ip}: another host answered after {:?}", lost.elapsed());
            eventually("the lost one is back, and there is one", || {
                cut(&holder.namespace.port, "up");
                holders().len() == 1 && who(&client, ip).as_deref() == holders().first().copied()
            });
        }
    });
}

/// Cuts a host off at the switch, or joins it again. The host itself is not told.
fn cut(port: &str, state: &str) {
    let master: &[&str] = if state == "down" {
        &["nomaster"]
    } else {
        &["master", "switch"]
    };
    ip(&[&["link", "set", port], master].concat());
}

fn addresses_go_when_they_are_removed() {
    switched(|| {
        let names = [("one", 1)];
        let host = Host::start("one", 1, settings(&names, 1));
        let client = Namespace::new("client", 9);
        let [ip, ip6] = ips();
        eventually("it holds both", || host.holds(ip) && host.holds(ip6));
        eventually("it answers", || {
            who(&client, ip).is_some() && who(&client, ip6).is_some()
        });
        host.settings.send_modify(|settings| {
            settings
                .as_mut()
                .unwrap()
                .addresses
                .remove(&ADDRESSES[0].parse().unwrap());
        });
        let shown = || host.namespace.run(ip_addresses);
        eventually("the address is gone", || !shown().contains("192.0.2.100"));
        assert!(who(&client, ip6).is_some());
        host.settings
            .send_modify(|settings| settings.as_mut().unwrap().addresses = BTreeSet::new());
        eventually("the other one, too", || !shown().contains("2001:db8::100"));
        eventually("and it knows", || host.held.get().is_empty());
        assert!(shown().contains("192.0.2.1/24"), "its own stays");

        // A daemon that is killed: its addresses are gone with it, sooner or later.
        host.settings.send_replace(Some(settings(&names, 1)));
        eventually("it holds both", || host.holds(ip) && host.holds(ip6));
        drop(host.settings);
        eventually("what nobody renews is gone", || {
            let shown = host.namespace.run(ip_addresses);
            !shown.contains("192.0.2.100") && !shown.contains("2001:db8::100")
        });
    });
}

fn ip_addresses() -> String {
    ip(&["-o", "address", "show", "dev", "eth0"])
}

fn who_has_not_the_key_is_not_heard() {
    switched(|| {
        // As each hears nobody, each holds all: with one key, only one would.
        let names = [("one", 1), ("two", 2)];
        let hosts = [
            Host::start("one", 1, settings(&names, 1)),
            Host::start("two", 2, settings(&names, 2)),
        ];
        let [ip, _] = ips();
        eventually("both hold it", || hosts.iter().all(|host| host.holds(ip)));
        hosts[1].settings.send_replace(Some(settings(&names, 1)));
        eventually("one gives it up", || {
            hosts.iter().filter(|host| host.holds(ip)).count() == 1
        });
    });
}
