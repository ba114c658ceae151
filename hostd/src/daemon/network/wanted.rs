//! From the documents to what the data plane of this host shall know. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use flynn_api::discovery::{self, NetworkLeases};
use flynn_api::network::{HostEndpoints, NetworkIdentities, NetworkPolicy};
use flynn_overlay::{AppPolicy, Host, Identity, Peer, Policy, Port, Protocol, RemoteEndpoint};
use ipnet::Ipv4Net;

/// What the documents say.
#[derive(Debug, Default)]
pub(super) struct Documented {
    pub(super) leases: NetworkLeases,
    pub(super) identities: NetworkIdentities,
    pub(super) policy: NetworkPolicy,
    /// Of each host that was heard of.
    pub(super) endpoints: Vec<HostEndpoints>,
}

/// What the data plane shall know.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    pub(super) hosts: Vec<Host>,
    pub(super) remote: Vec<RemoteEndpoint>,
    pub(super) policy: Policy,
}

/// Whether the leases give this host the subnet that it uses. Leases that were never seen say nothing.
pub(super) fn holds(leases: &NetworkLeases, own: &str, subnet: &str) -> bool {
    leases.leases.is_empty() || leases.leases.get(own).is_some_and(|lease| lease.subnet == subnet)
}

impl Wanted {
    /// For the host `own`. One that holds no lease knows no other host: what it sends under addresses that may be
    /// another's by now gets nowhere.
    pub(super) fn new(documents: &Documented, own: &str, subnet: &str) -> Self {
        let leases = &documents.leases;
        let mut hosts = BTreeMap::new();
        if holds(leases, own, subnet) {
            for (id, lease) in leases.leases.iter().filter(|(id, _)| *id != own) {
                match lease.subnet.parse::<Ipv4Net>() {
                    Ok(subnet) => {
                        let host = Host {
                            address: lease.address,
                            subnet,
                            direct: leases.direct,
                            wireguard: wireguard(documents, id),
                        };
                        hosts.insert(id.as_str(), host);
                    }
                    Err(error) => tracing::error!(host = id, subnet = lease.subnet, %error, "a lease"),
                }
            }
        }
        let mut remote = Vec::new();
        for endpoints in &documents.endpoints {
            // A host speaks for its own subnet, and for no other.
            let Some(host) = hosts.get(endpoints.host.as_str()) else {
                continue;
            };
            let of_host = |(address, identity): (&Ipv4Addr, &Identity)| {
                host.subnet.contains(address).then_some(RemoteEndpoint {
                    address: *address,
                    identity: *identity,
                })
            };
            remote.extend(endpoints.identities.iter().filter_map(of_host));
        }
        remote.sort_unstable();
        Self {
            hosts: hosts.into_values().collect(),
            remote,
            policy: policy(&documents.identities, &documents.policy),
        }
    }
}

/// How WireGuard knows a host, by what that says of itself.
fn wireguard(documents: &Documented, host: &str) -> Option<Peer> {
    let endpoints = documents
        .endpoints
        .iter()
        .find(|endpoints| endpoints.host == host)?;
    let said = endpoints.wireguard.as_ref()?;
    match said.key.parse() {
        Ok(key) => Some(Peer { key, port: said.port }),
        Err(error) => {
            tracing::error!(host, %error, "the host's key");
            None
        }
    }
}

fn policy(identities: &NetworkIdentities, policy: &NetworkPolicy) -> Policy {
    let mut apps: BTreeMap<Identity, AppPolicy> = BTreeMap::new();
    let number = |app: &String| identities.apps.get(app).copied();
    for identity in identities.system.iter().filter_map(number) {
        apps.entry(identity).or_default().system = true;
    }
    let mut allowed = BTreeSet::new();
    for (app, own) in &policy.apps {
        let Some(identity) = number(app).filter(|_| own.isolated) else {
            continue;
        };
        apps.entry(identity).or_default().isolated = true;
        let others = own.allow.iter().filter(|other| policy.allows(app, other));
        for other in others.filter_map(number) {
            allowed.extend([(identity, other), (other, identity)]);
        }
    }
    Policy {
        apps,
        allowed,
        host_ports: Some(host_ports(&policy.routed)),
    }
}

/// DNS, discoverd's plain API, and where the router listens.
fn host_ports(routed: &BTreeSet<u16>) -> BTreeSet<Port> {
    let tcp = |number| Port {
        protocol: Protocol::Tcp,
        number,
    };
    let udp = |number| Port {
        protocol: Protocol::Udp,
        number,
    };
    let own = [
        tcp(53),
        udp(53),
        tcp(discovery::PORT),
        tcp(80),
        tcp(443),
        udp(443),
    ];
    let routed = routed.iter().flat_map(|&number| [tcp(number), udp(number)]);
    own.into_iter().chain(routed).collect()
}

#[cfg(test)]
mod tests {
    use flynn_api::discovery::SubnetLease;
    use flynn_api::network::{AppPolicy as Isolation, WireguardPeer};

    use super::*;

    fn documents() -> Documented {
        let lease = |last: u8| SubnetLease {
            subnet: format!("100.100.{last}.0/24"),
            address: Ipv4Addr::new(192, 0, 2, last),
            renewed_at: None,
        };
        let leases = [("a", lease(1)), ("b", lease(2)), ("c", lease(3))];
        let mut identities = NetworkIdentities::default();
        for app in ["web", "db", "other"] {
            identities.assign(app, false).unwrap();
        }
        identities.assign("postgres", true).unwrap();
        let endpoints = |host: &str, addresses: &[[u8; 4]]| HostEndpoints {
            version: 1,
            host: host.into(),
            identities: addresses
                .iter()
                .map(|address| (Ipv4Addr::from(*address), 16))
                .collect(),
            wireguard: None,
        };
        Documented {
            leases: NetworkLeases {
                network: "100.100.0.0/16".into(),
                leases: leases.map(|(id, lease)| (id.to_owned(), lease)).into(),
                ..NetworkLeases::default()
            },
            identities,
            policy: NetworkPolicy::default(),
            endpoints: vec![
                endpoints("b", &[[100, 100, 2, 5], [100, 100, 3, 5]]),
                endpoints("gone", &[[100, 100, 9, 5]]),
                endpoints("a", &[[100, 100, 1, 5]]),
            ],
        }
    }

    #[test]
    fn hosts_speak_for_their_own_subnets_alone() {
        let wanted = Wanted::new(&documents(), "a", "100.100.1.0/24");
        let hosts: Vec<_> = wanted.hosts.iter().map(|host| host.subnet.to_string()).collect();
        assert_eq!(hosts, ["100.100.2.0/24", "100.100.3.0/24"]);
        let remote: Vec<_> = wanted
            .remote
            .iter()
            .map(|endpoint| endpoint.address.to_string())
            .collect();
        assert_eq!(remote, ["100.100.2.5"]);
    }

    #[test]
    fn hosts_are_encrypted_with_by_the_keys_that_they_publish() {
        let mut documents = documents();
        let said = |key: &str| WireguardPeer {
            key: key.into(),
            port: 51820,
        };
        let key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        documents.endpoints[0].wireguard = Some(said(key));
        // Without a lease, nobody.
        documents.endpoints[1].wireguard = Some(said(key));
        let peers = |documents: &Documented| -> Vec<Option<Peer>> {
            let wanted = Wanted::new(documents, "a", "100.100.1.0/24");
            wanted.hosts.iter().map(|host| host.wireguard).collect()
        };
        let peer = Peer {
            key: key.parse().unwrap(),
            port: 51820,
        };
        assert_eq!(peers(&documents), [Some(peer), None]);
        documents.endpoints[0].wireguard = Some(said("not a key"));
        assert_eq!(peers(&documents), [None, None]);
    }

    #[test]
    fn a_host_without_its_lease_knows_nobody() {
        let mut documents = documents();
        assert!(Wanted::new(&documents, "a", "100.100.7.0/24").hosts.is_empty());
        documents.leases.leases.remove("a");
        let wanted = Wanted::new(&documents, "a", "100.100.1.0/24");
        assert!(wanted.hosts.is_empty() && wanted.remote.is_empty());
        assert!(holds(&NetworkLeases::default(), "a", "100.100.1.0/24"));
    }

    #[test]
    fn isolation_becomes_pairs() {
        let mut documents = documents();
        let isolated = |allow: &[&str]| Isolation {
            isolated: true,
            allow: allow.iter().map(|id| (*id).to_owned()).collect(),
        };
        documents
            .policy
            .apps
            .insert("web".into(), isolated(&["db", "postgres", "nowhere"]));
        let of = |documents: &Documented| Wanted::new(documents, "a", "100.100.1.0/24").policy;
        let number = |app: &str| documents.identities.apps[app];
        let (web, db, postgres) = (number("web"), number("db"), number("postgres"));
        let policy = of(&documents);
        assert_eq!(
            policy.allowed,
            [(web, db), (db, web), (web, postgres), (postgres, web)].into()
        );
        assert!(policy.apps[&web].isolated && policy.apps[&postgres].system);
        assert!(!policy.apps.contains_key(&db));
        // Who is isolated as well has a say.
        documents.policy.apps.insert("db".into(), isolated(&[]));
        assert_eq!(of(&documents).allowed, [(web, postgres), (postgres, web)].into());
    }
}
