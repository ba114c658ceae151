//! What this host's part of the network looks like: for `GET /host/network` and for metrics.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use flynn_api::Result;
use flynn_api::host::{EndpointStatus, Job, MapFill, NetworkHost, NetworkStatus, RemoteEndpoint, label};
use flynn_overlay::{Attachment, DropReason, Port, Protocol, Reached};
use ipnet::Ipv4Net;

use super::wanted::Documented;
use super::{Up, failed, metrics};
use crate::daemon::Daemon;
use crate::identities;

impl Daemon {
    /// What `GET /metrics` shows.
    pub(crate) async fn metrics(&self) -> Result<String> {
        let gone = self.network.peek().map(|up| up.gone()).unwrap_or_default();
        let network = metrics::text(&self.network_status().await?, &gone, &self.flows().await?);
        let volumes = tokio::task::block_in_place(|| self.volumes.metrics());
        Ok(network + &volumes + &identities::metrics(self.paths.state()) + &self.layer_metrics())
    }

    /// What `GET /host/network` shows.
    pub(crate) async fn network_status(&self) -> Result<NetworkStatus> {
        let Some(up) = self.network.peek() else {
            return Ok(NetworkStatus::default());
        };
        let jobs = self.table.addresses().into_iter();
        let jobs: BTreeMap<Ipv4Addr, _> = jobs
            .filter_map(|(address, id)| Some((address, self.table.get(&id)?.job)))
            .collect();
        let documents = self.documented();
        let ways = up
            .network
            .ways()
            .await
            .map_err(failed("look for the ways to other hosts"))?;
        let endpoints = up.network.endpoints().map_err(failed("read the counters"))?;
        let attached = up.attachments();
        let of_containers = up.network.container_drops();
        let mut of_containers = of_containers.map_err(failed("read the counters"))?;
        // Not those that are reserved for jobs to come.
        let endpoints = endpoints
            .iter()
            .filter(|(container, _)| attached.contains_key(&container.ipv4));
        let endpoints = endpoints.map(|(container, traffic)| {
            let (job, attachment) = (jobs.get(&container.ipv4), attached.get(&container.ipv4));
            let drops = of_containers.remove(&container.ipv4).unwrap_or_default();
            EndpointStatus {
                tx_drops: named(drops.sent),
                rx_drops: named(drops.for_it),
                tx_packets: traffic.sent_packets,
                tx_bytes: traffic.sent_bytes,
                rx_packets: traffic.received_packets,
                rx_bytes: traffic.received_bytes,
                ..endpoint(container.ipv4, job.map(|job| &**job), attachment, &documents)
            }
        });
        let drops = up.network.drops().map_err(failed("read the counters"))?;
        let fills = up.network.fill().into_iter();
        Ok(NetworkStatus {
            subnet: up.config.subnet.clone(),
            gateway: Some(up.network.gateway()),
            network: up.config.network.clone(),
            network6: up.config.network6.clone(),
            endpoints: endpoints.collect(),
            hosts: hosts(&documents, &self.host_id, &up, &ways),
            remote: remote(&documents, &self.host_id),
            drops: named(drops),
            maps: fills
                .map(|(name, entries, room)| MapFill {
                    name: name.to_owned(),
                    entries,
                    room,
                })
                .collect(),
        })
    }
}

fn named(drops: impl IntoIterator<Item = (DropReason, u64)>) -> BTreeMap<String, u64> {
    let drops = drops.into_iter();
    drops
        .map(|(reason, count)| (reason.name().to_owned(), count))
        .collect()
}

fn endpoint(
    address: Ipv4Addr,
    job: Option<&Job>,
    attachment: Option<&Attachment>,
    documents: &Documented,
) -> EndpointStatus {
    let label = |name: &str| {
        let value = job.and_then(|job| job.metadata.get(name));
        value.cloned().unwrap_or_default()
    };
    let port = |port: &Port| {
        let protocol = match port.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        format!("{}/{protocol}", port.number)
    };
    let policy = documents.policy.apps.get(&label(label::APP_ID));
    let limits = attachment.map(|attachment| attachment.limits).unwrap_or_default();
    EndpointStatus {
        address,
        job_id: job.map(|job| job.id.clone()).unwrap_or_default(),
        app: label(label::APP_NAME),
        process_type: label(label::PROCESS_TYPE),
        identity: attachment.map_or(0, |attachment| attachment.identity),
        system: attachment.is_some_and(|attachment| attachment.system),
        isolated: policy.is_some_and(|policy| policy.isolated),
        open_ports: attachment.map_or_else(Vec::new, |attachment| {
            attachment.open_ports.iter().map(port).collect()
        }),
        tx_limit: limits.sent.map(Into::into),
        rx_limit: limits.received.map(Into::into),
        tx_packets: 0,
        tx_bytes: 0,
        rx_packets: 0,
        rx_bytes: 0,
        tx_drops: BTreeMap::new(),
        rx_drops: BTreeMap::new(),
    }
}

fn hosts(
    documents: &Documented,
    own: &str,
    up: &Up,
    ways: &BTreeMap<Ipv4Addr, (Reached, String)>,
) -> Vec<NetworkHost> {
    let leases = documents.leases.leases.iter();
    let host = |(id, lease): (&String, &flynn_api::discovery::SubnetLease)| {
        let subnet = lease.subnet.parse::<Ipv4Net>().ok();
        let way = subnet.and_then(|subnet| ways.get(&subnet.network()));
        let endpoints = if id == own {
            up.attachments().len()
        } else {
            let of_host = documents.endpoints.iter().find(|endpoints| endpoints.host == *id);
            of_host.map_or(0, |endpoints| endpoints.identities.len())
        };
        NetworkHost {
            id: id.clone(),
            address: lease.address,
            subnet: lease.subnet.clone(),
            own: id == own,
            way: match way {
                _ if id == own => "own",
                Some((reached, _)) if reached.encrypted => "encrypted",
                Some((reached, _)) if reached.direct => "direct",
                Some(_) => "tunnel",
                None => "none",
            }
            .into(),
            next_hop: way.map(|(reached, _)| reached.way.next_hop),
            interface: way.map(|(_, interface)| interface.clone()),
            endpoints: endpoints as u64,
            renewed_at: lease.renewed_at,
        }
    };
    leases.map(host).collect()
}

fn remote(documents: &Documented, own: &str) -> Vec<RemoteEndpoint> {
    let others = documents
        .endpoints
        .iter()
        .filter(|endpoints| endpoints.host != own);
    let known = others.filter(|endpoints| documents.leases.leases.contains_key(&endpoints.host));
    let remote = known.flat_map(|endpoints| {
        let of_host = endpoints.identities.iter();
        of_host.map(|(address, identity)| RemoteEndpoint {
            address: *address,
            host_id: endpoints.host.clone(),
            identity: *identity,
        })
    });
    remote.collect()
}
