//! Live connections and flows of datagrams of this host's containers, and what connections add up to for each service.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use flynn_api::Result;
use flynn_api::host::{Flow, Job, label};
use flynn_dataplane::Protocol;

use super::PINS;
use super::sockets::{self, Connection};
use crate::daemon::Daemon;
use crate::prepare;

/// So many connections of the load balancer's are looked at.
const MOST_BALANCED: usize = 20_000;

/// A flow to a container: its protocol, the container's address, its port, and the client as the container sees it.
type Balanced = (Protocol, Ipv4Addr, u16, SocketAddr);

/// Where clients sent to what the load balancer gave to containers of this host.
fn routes() -> BTreeMap<Balanced, SocketAddr> {
    let flows = flynn_dataplane::lb::flows(PINS.as_ref(), MOST_BALANCED).unwrap_or_else(|error| {
        tracing::debug!(%error, "the load balancer's connections cannot be looked at");
        Vec::new()
    });
    let flows = flows.into_iter().map(|flow| {
        let vip = SocketAddr::new(flow.vip.address, flow.vip.port);
        let (address, port) = (*flow.backend.ip(), flow.backend.port());
        ((flow.vip.protocol, address, port, flow.seen), vip)
    });
    flows.collect()
}

/// What routes brought to a container by datagrams, whose sockets say nothing of it.
fn datagrams(routes: &BTreeMap<Balanced, SocketAddr>, address: Ipv4Addr) -> impl Iterator<Item = Connection> {
    let to_it = routes
        .keys()
        .filter(move |(protocol, to, ..)| (*protocol, *to) == (Protocol::Udp, address));
    to_it.map(|&(protocol, address, port, remote)| Connection {
        protocol,
        local: (address, port).into(),
        remote,
        rtt_us: 0,
        retransmits: 0,
        sent_bytes: 0,
        received_bytes: 0,
    })
}

/// A service's connections now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Service {
    /// How many there are.
    pub(super) connections: u64,
    /// Their round-trip times together, in microseconds.
    pub(super) rtt_us: u64,
    /// Segments that were sent again over them.
    pub(super) retransmits: u64,
}

/// By name.
pub(super) fn services(flows: &[Flow]) -> BTreeMap<&str, Service> {
    let mut services: BTreeMap<&str, Service> = BTreeMap::new();
    for flow in flows {
        let Some(name) = flow.service.as_ref().filter(|_| flow.protocol == "tcp") else {
            continue;
        };
        let service = services.entry(name).or_default();
        service.connections += 1;
        service.rtt_us += u64::from(flow.rtt_us);
        service.retransmits += u64::from(flow.retransmits);
    }
    services
}

fn flow(job: &Job, ports: &[u16], connection: &Connection) -> Flow {
    let label = |name| job.metadata.get(name).cloned().unwrap_or_default();
    let protocol = match connection.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let mut services = job.config.ports.iter().zip(ports);
    let service = services.find_map(|(port, number)| {
        let fits = *number == connection.local.port() && port.proto == protocol;
        port.service.as_ref().filter(|_| fits)
    });
    Flow {
        protocol: protocol.to_owned(),
        job_id: job.id.clone(),
        app: label(label::APP_NAME),
        process_type: label(label::PROCESS_TYPE),
        service: service.map(|service| service.name.clone()),
        local: connection.local,
        remote: connection.remote,
        route: None,
        rtt_us: connection.rtt_us,
        retransmits: connection.retransmits,
        tx_bytes: connection.sent_bytes,
        rx_bytes: connection.received_bytes,
    }
}

impl Daemon {
    /// What `GET /host/network/flows` shows. A container that ends meanwhile has none.
    pub(crate) async fn flows(&self) -> Result<Vec<Flow>> {
        let routes = routes();
        let mut flows = Vec::new();
        for (address, id) in self.table.addresses() {
            let Some(entry) = self.table.get(&id) else {
                continue;
            };
            let Some(supervisor) = entry.status.supervisor else {
                continue;
            };
            let connections = match sockets::of_process(supervisor.pid).await {
                Ok(connections) => connections,
                Err(error) => {
                    tracing::debug!(job = id, %error, "its connections cannot be looked at");
                    continue;
                }
            };
            let ports = prepare::ports(&entry.job.config, || Ok(0)).unwrap_or_default();
            flows.extend(
                connections
                    .into_iter()
                    .filter(|connection| !connection.local.ip().is_loopback())
                    .chain(datagrams(&routes, address))
                    .map(|connection| {
                        let Connection { local, remote, .. } = connection;
                        let balanced = (connection.protocol, address, local.port(), remote);
                        let route = routes.get(&balanced).copied();
                        Flow {
                            route,
                            ..flow(&entry.job, &ports, &connection)
                        }
                    }),
            );
        }
        Ok(flows)
    }
}

#[cfg(test)]
mod tests {
    use flynn_api::host::{Port, Service as PortService};

    use super::*;

    #[test]
    fn connections_are_counted_for_the_service_that_they_came_to() {
        let mut job = Job::default();
        job.config.ports = vec![Port {
            port: 80,
            proto: "tcp".into(),
            service: Some(PortService {
                name: "web".into(),
                ..PortService::default()
            }),
        }];
        let connection = |port: u16| Connection {
            protocol: Protocol::Tcp,
            local: ([100, 100, 1, 2], port).into(),
            remote: ([100, 100, 1, 3], 4000).into(),
            rtt_us: 50,
            retransmits: 2,
            sent_bytes: 0,
            received_bytes: 0,
        };
        let connections = [80, 80, 5000].map(connection);
        let datagrams = Connection {
            protocol: Protocol::Udp,
            ..connections[0]
        };
        let connections = connections.iter().chain([&datagrams]);
        let flows: Vec<_> = connections
            .map(|connection| flow(&job, &[80], connection))
            .collect();
        assert_eq!((flows[3].protocol.as_str(), &flows[3].service), ("udp", &None));
        let web = Service {
            connections: 2,
            rtt_us: 100,
            retransmits: 4,
        };
        assert_eq!(services(&flows), [("web", web)].into());
    }
}
