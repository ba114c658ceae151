//! Which services are balanced, and by whom they are served. Pure: time comes from outside.
//!
//! - An instance that discoverd no longer has drains: it keeps its connections for a while and gets no new ones.
//! - One that does not answer probes gets no new ones either, unless none of its service does: then it is more likely
//!   that the probes are wrong than that all are dead.
//! - One that drains and does not answer is gone.
//! - One that died, as discoverd says, or does not answer, is nobody that a connection is looked for at.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use flynn_api::discovery::Instance;
use flynn_api::route::{Route, RouteKind};
use flynn_dataplane::Protocol;
use flynn_dataplane::lb::{Backend, Service, Vip};

/// How long an instance that is gone from discoverd may finish what it has.
pub const DRAIN: Duration = Duration::from_mins(1);
/// Probes in a row after which an instance counts as dead.
const FAILURES: u32 = 2;
/// The label that says how much of the load an instance gets; 1 without it.
const WEIGHT: &str = "weight";
const MOST_WEIGHT: u32 = 1000;

/// A route by port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The port.
    pub port: u16,
    /// Whether for datagrams.
    pub protocol: Protocol,
}

/// Where an instance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Standing {
    weight: u32,
    /// Since when discoverd has it no more.
    gone: Option<Instant>,
    /// Whether discoverd has it no more because nobody answered for it.
    lost: bool,
    /// Probes that failed since the last one that did not.
    failures: u32,
}

/// What is known of the routes' instances.
#[derive(Debug, Default)]
pub struct Instances(BTreeMap<Key, BTreeMap<SocketAddrV4, Standing>>);

/// What a route is given.
#[derive(Debug)]
pub struct Wanted<'r> {
    /// The route.
    pub route: &'r Route,
    /// Its service's instances.
    pub instances: &'r [Instance],
    /// The id of the service's leader.
    pub leader: Option<&'r str>,
    /// Addresses of instances that died of late.
    pub lost: &'r BTreeSet<String>,
}

/// The key of a route by port.
pub fn key(route: &Route) -> Option<Key> {
    let protocol = match route.kind {
        RouteKind::Http => return None,
        RouteKind::Tcp => Protocol::Tcp,
        RouteKind::Udp => Protocol::Udp,
    };
    (route.port != 0).then_some(Key {
        port: route.port,
        protocol,
    })
}

impl Wanted<'_> {
    /// The addresses that serve it, with their weights. `None` where one of them is no container's: packets cannot be
    /// sent there.
    fn addresses(&self, is_container: impl Fn(&SocketAddrV4) -> bool) -> Option<BTreeMap<SocketAddrV4, u32>> {
        let datagrams = self.route.kind == RouteKind::Udp;
        let says = self.instances.iter().any(|instance| instance.proto == "udp");
        let mut addresses = BTreeMap::new();
        for instance in self.instances {
            let fits = (instance.proto == "udp") == datagrams || datagrams && !says;
            let leads = !self.route.leader || self.leader == Some(instance.id.as_str());
            if !fits || !leads {
                continue;
            }
            let address = match instance.addr.parse() {
                Ok(SocketAddr::V4(address)) if is_container(&address) => address,
                _ => return None,
            };
            let weight = instance.meta.get(WEIGHT).and_then(|weight| weight.parse().ok());
            addresses.insert(address, weight.unwrap_or(1).min(MOST_WEIGHT));
        }
        Some(addresses)
    }
}

impl Instances {
    /// These are the routes and instances from now on. A route that is served by something else than containers is left
    /// out.
    pub fn update(
        &mut self,
        wanted: &[Wanted<'_>],
        is_container: impl Fn(&SocketAddrV4) -> bool,
        now: Instant,
    ) {
        let mut seen = BTreeSet::new();
        for one in wanted {
            // Of two routes for the same port the first counts.
            let Some(key) = key(one.route).filter(|key| seen.insert(*key)) else {
                continue;
            };
            let Some(addresses) = one.addresses(&is_container) else {
                self.0.remove(&key);
                continue;
            };
            let known = self.0.entry(key).or_default();
            for (address, weight) in &addresses {
                let fresh = Standing {
                    weight: *weight,
                    gone: None,
                    lost: false,
                    failures: 0,
                };
                let standing = known.entry(*address).or_insert(fresh);
                standing.weight = *weight;
                standing.gone = None;
                standing.lost = false;
            }
            known.retain(|address, standing| {
                if !addresses.contains_key(address) {
                    // A leader that was deposed keeps nothing: what it has belongs to its successor.
                    let since = *standing.gone.get_or_insert(now);
                    standing.lost = one.lost.contains(&address.to_string());
                    let over =
                        now.duration_since(since) >= DRAIN || one.route.leader || !one.route.drain_backends;
                    return !over && standing.failures < FAILURES;
                }
                true
            });
        }
        self.0.retain(|key, _| seen.contains(key));
    }

    /// Whether the route is served by containers, be it that there are none.
    pub fn serves(&self, key: &Key) -> bool {
        self.0.contains_key(key)
    }

    /// What there is to probe.
    pub fn probed(&self) -> BTreeSet<(SocketAddrV4, Protocol)> {
        let of_route = |(key, instances): (&Key, &BTreeMap<SocketAddrV4, Standing>)| {
            let protocol = key.protocol;
            let addresses: Vec<_> = instances.keys().map(|address| (*address, protocol)).collect();
            addresses
        };
        self.0.iter().flat_map(of_route).collect()
    }

    /// A probe's outcome.
    pub fn answered(&mut self, address: SocketAddrV4, protocol: Protocol, well: bool) {
        for (key, instances) in &mut self.0 {
            if key.protocol == protocol
                && let Some(standing) = instances.get_mut(&address)
            {
                standing.failures = if well {
                    0
                } else {
                    standing.failures.saturating_add(1)
                };
            }
        }
    }

    /// What the load balancer is to be told, for VIPs at these addresses.
    pub fn services(&self, routes: &[Route], addresses: &[IpAddr], first_host: bool) -> Vec<Service> {
        let sticky: BTreeSet<Key> = routes
            .iter()
            .filter(|route| route.sticky)
            .filter_map(key)
            .collect();
        self.0
            .iter()
            .map(|(key, instances)| {
                let vip = |address: &IpAddr| Vip {
                    address: *address,
                    port: key.port,
                    protocol: key.protocol,
                };
                let there = || instances.values().filter(|standing| standing.gone.is_none());
                let all_fail = there().all(|standing| standing.failures >= FAILURES);
                let backend = |(address, standing): (&SocketAddrV4, &Standing)| Backend {
                    address: *address.ip(),
                    port: address.port(),
                    weight: standing.weight,
                    draining: standing.gone.is_some() || !all_fail && standing.failures >= FAILURES,
                    lost: standing.lost || standing.failures >= FAILURES,
                };
                Service {
                    vips: addresses.iter().map(vip).collect(),
                    backends: instances.iter().map(backend).collect(),
                    affinity: sticky.contains(key),
                    first_host,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::Meta;

    fn route(kind: RouteKind) -> Route {
        Route {
            kind,
            port: 3000,
            service: "a".into(),
            drain_backends: true,
            ..Route::default()
        }
    }

    fn instances(proto: &str, hosts: &[u8]) -> Vec<Instance> {
        hosts
            .iter()
            .map(|host| Instance::new(proto, format!("100.100.0.{host}:80"), Meta::new()))
            .collect()
    }

    struct Bench {
        known: Instances,
        lost: BTreeSet<String>,
        start: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                known: Instances::default(),
                lost: BTreeSet::new(),
                start: Instant::now(),
            }
        }

        fn at(&mut self, seconds: u64, route: &Route, instances: &[Instance]) -> Vec<(u8, bool)> {
            let wanted = Wanted {
                route,
                instances,
                leader: instances.first().map(|instance| instance.id.as_str()),
                lost: &self.lost,
            };
            let is_container = |address: &SocketAddrV4| address.ip().octets()[..2] == [100, 100];
            let now = self.start + Duration::from_secs(seconds);
            self.known.update(&[wanted], is_container, now);
            let vip = [IpAddr::from([10, 0, 0, 1])];
            let services = self.known.services(std::slice::from_ref(route), &vip, false);
            let backends = services.iter().flat_map(|service| &service.backends);
            backends
                .map(|backend| (backend.address.octets()[3], backend.draining))
                .collect()
        }

        fn probe(&mut self, host: u8, well: bool) {
            let address = format!("100.100.0.{host}:80").parse().unwrap();
            self.known.answered(address, Protocol::Tcp, well);
        }
    }

    #[test]
    fn instances_drain_and_go() {
        let mut bench = Bench::new();
        let tcp = route(RouteKind::Tcp);
        assert_eq!(
            bench.at(0, &tcp, &instances("tcp", &[2, 3])),
            [(2, false), (3, false)]
        );
        assert_eq!(
            bench.at(1, &tcp, &instances("tcp", &[3])),
            [(2, true), (3, false)]
        );
        assert_eq!(
            bench.at(60, &tcp, &instances("tcp", &[3])),
            [(2, true), (3, false)]
        );
        assert_eq!(bench.at(61, &tcp, &instances("tcp", &[3])), [(3, false)]);
        assert_eq!(
            bench.at(62, &tcp, &instances("tcp", &[3, 4])),
            [(3, false), (4, false)]
        );
        assert_eq!(
            bench.at(63, &tcp, &instances("tcp", &[4])),
            [(3, true), (4, false)]
        );
        bench.probe(3, false);
        bench.probe(3, false);
        assert_eq!(
            bench.at(64, &tcp, &instances("tcp", &[4])),
            [(4, false)],
            "dead besides"
        );
        let now = route(RouteKind::Tcp);
        let now = Route {
            drain_backends: false,
            ..now
        };
        assert_eq!(bench.at(65, &now, &instances("tcp", &[5])), [(5, false)]);
    }

    #[test]
    fn who_fails_gets_nothing_new_unless_all_do() {
        let mut bench = Bench::new();
        let tcp = route(RouteKind::Tcp);
        let both = instances("tcp", &[2, 3]);
        bench.at(0, &tcp, &both);
        bench.probe(2, false);
        assert_eq!(
            bench.at(1, &tcp, &both),
            [(2, false), (3, false)],
            "once is nothing"
        );
        bench.probe(2, false);
        assert_eq!(bench.at(2, &tcp, &both), [(2, true), (3, false)]);
        for _ in 0..2 {
            bench.probe(3, false);
        }
        assert_eq!(bench.at(3, &tcp, &both), [(2, false), (3, false)]);
        bench.probe(3, true);
        assert_eq!(bench.at(4, &tcp, &both), [(2, true), (3, false)]);
    }

    #[test]
    fn routes_have_instances_of_their_kind() {
        let mut bench = Bench::new();
        let both = [instances("tcp", &[2]), instances("udp", &[3])].concat();
        assert_eq!(bench.at(0, &route(RouteKind::Udp), &both), [(3, false)]);
        assert_eq!(
            bench.known.probed(),
            [("100.100.0.3:80".parse().unwrap(), Protocol::Udp)].into()
        );
        assert_eq!(bench.at(0, &route(RouteKind::Tcp), &both), [(2, false)]);
        assert_eq!(bench.known.probed().len(), 1);
        assert_eq!(bench.at(0, &route(RouteKind::Http), &both), []);
        let leader = Route {
            leader: true,
            ..route(RouteKind::Tcp)
        };
        assert_eq!(bench.at(0, &leader, &instances("tcp", &[4, 5])), [(4, false)]);
        assert_eq!(
            bench.at(1, &leader, &instances("tcp", &[5, 4])),
            [(5, false)],
            "deposed at once"
        );
    }

    #[test]
    fn services_on_hosts_are_left_to_others() {
        let mut bench = Bench::new();
        let mut some = instances("tcp", &[2]);
        some.push(Instance::new("tcp", "10.0.0.1:80", Meta::new()));
        assert_eq!(bench.at(0, &route(RouteKind::Tcp), &some), []);
        let key = key(&route(RouteKind::Tcp)).unwrap();
        assert!(!bench.known.serves(&key));
        bench.at(1, &route(RouteKind::Tcp), &[]);
        assert!(bench.known.serves(&key), "nobody is no reason");
    }

    #[test]
    fn nothing_is_looked_for_at_the_dead() {
        let mut bench = Bench::new();
        let tcp = route(RouteKind::Tcp);
        bench.at(0, &tcp, &instances("tcp", &[2, 3, 4]));
        bench.lost.insert("100.100.0.2:80".into());
        assert_eq!(
            bench.at(1, &tcp, &instances("tcp", &[4])),
            [(2, true), (3, true), (4, false)]
        );
        let lost = |bench: &Bench| -> Vec<bool> {
            let services = bench.known.services(&[], &[], false);
            services[0].backends.iter().map(|backend| backend.lost).collect()
        };
        assert_eq!(
            lost(&bench),
            [true, false, false],
            "one has died, one said goodbye"
        );
        bench.at(2, &tcp, &instances("tcp", &[2, 3, 4]));
        assert_eq!(lost(&bench), [false; 3], "it was not dead");
    }

    #[test]
    fn weights_are_labels() {
        let tcp = route(RouteKind::Tcp);
        let mut one = instances("tcp", &[2]);
        one[0].meta.insert(WEIGHT.into(), "7".into());
        let mut bench = Bench::new();
        bench.at(0, &tcp, &one);
        let services = bench.known.services(&[tcp], &[], true);
        assert_eq!(services[0].backends[0].weight, 7);
        assert!(services[0].first_host);
    }
}
