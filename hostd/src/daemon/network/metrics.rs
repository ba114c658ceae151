//! The network's part of `GET /metrics`, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use flynn_api::host::{EndpointStatus, Flow, NetworkStatus};
use flynn_overlay::{DropReason, Drops, Traffic};

use super::flows::{self, Service};

/// One of the counters.
type Value = fn(&Traffic) -> u64;

/// One of a service's figures.
type Gauge = fn(&Service) -> u64;

/// App and process type.
pub(super) type Owner = (String, String);

/// What is counted of a container, or of several.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted {
    traffic: Traffic,
    /// Packets of theirs, by side (`sent`, `received`) and reason.
    drops: BTreeMap<(&'static str, String), u64>,
}

impl Counted {
    pub(super) fn new(traffic: Traffic, drops: Drops) -> Self {
        let named = |side, of: BTreeMap<DropReason, u64>| {
            let of = of.into_iter();
            of.map(move |(reason, count)| ((side, reason.name().to_owned()), count))
        };
        let drops = named(SENT, drops.sent).chain(named(RECEIVED, drops.for_it));
        Self {
            traffic,
            drops: drops.collect(),
        }
    }

    fn of(endpoint: &EndpointStatus) -> Self {
        let named = |side, of: &BTreeMap<String, u64>| {
            let of = of.clone().into_iter();
            of.map(move |(reason, count)| ((side, reason), count))
        };
        let drops = named(SENT, &endpoint.tx_drops).chain(named(RECEIVED, &endpoint.rx_drops));
        Self {
            traffic: Traffic {
                sent_packets: endpoint.tx_packets,
                sent_bytes: endpoint.tx_bytes,
                received_packets: endpoint.rx_packets,
                received_bytes: endpoint.rx_bytes,
            },
            drops: drops.collect(),
        }
    }

    /// Adds what is counted of another.
    pub(super) fn add(&mut self, other: Self) {
        self.traffic.sent_packets += other.traffic.sent_packets;
        self.traffic.sent_bytes += other.traffic.sent_bytes;
        self.traffic.received_packets += other.traffic.received_packets;
        self.traffic.received_bytes += other.traffic.received_bytes;
        for (key, count) in other.drops {
            *self.drops.entry(key).or_default() += count;
        }
    }
}

const SENT: &str = "sent";
const RECEIVED: &str = "received";

/// The text for what the host shows of its network, and for what is counted of containers that are gone: counters must
/// not go back when one ends.
pub(super) fn text(network: &NetworkStatus, gone: &BTreeMap<Owner, Counted>, flows: &[Flow]) -> String {
    let mut by_owner = gone.clone();
    for endpoint in &network.endpoints {
        let owner = (endpoint.app.clone(), endpoint.process_type.clone());
        by_owner.entry(owner).or_default().add(Counted::of(endpoint));
    }
    let mut text = String::new();
    let owners = |value: fn(&Traffic) -> u64| -> Vec<_> {
        by_owner
            .iter()
            .map(|((app, kind), counted)| {
                (
                    vec![("app", app.as_str()), ("process_type", kind.as_str())],
                    value(&counted.traffic),
                )
            })
            .collect()
    };
    let counters: [(&str, &str, Value); 4] = [
        ("sent_bytes", "Bytes that containers sent", |traffic| {
            traffic.sent_bytes
        }),
        ("sent_packets", "Packets that containers sent", |traffic| {
            traffic.sent_packets
        }),
        ("received_bytes", "Bytes that containers were given", |traffic| {
            traffic.received_bytes
        }),
        (
            "received_packets",
            "Packets that containers were given",
            |traffic| traffic.received_packets,
        ),
    ];
    for (name, help, value) in counters {
        family(
            &mut text,
            &format!("flynn_network_{name}_total"),
            "counter",
            help,
            &owners(value),
        );
    }
    let drops = network.drops.iter();
    let drops: Vec<_> = drops
        .map(|(reason, count)| (vec![("reason", reason.as_str())], *count))
        .collect();
    family(
        &mut text,
        "flynn_network_dropped_packets_total",
        "counter",
        "Packets that were dropped",
        &drops,
    );
    let mut drops = Vec::new();
    for ((app, kind), counted) in &by_owner {
        for ((side, reason), count) in &counted.drops {
            let labels = vec![
                ("app", app.as_str()),
                ("process_type", kind),
                ("direction", side),
                ("reason", reason),
            ];
            drops.push((labels, *count));
        }
    }
    family(
        &mut text,
        "flynn_network_app_dropped_packets_total",
        "counter",
        "Packets that were dropped, of those that containers sent or should have received on this host",
        &drops,
    );
    let maps = |value: fn(&flynn_api::host::MapFill) -> u64| -> Vec<_> {
        let maps = network.maps.iter();
        maps.map(|map| (vec![("map", map.name.as_str())], value(map)))
            .collect()
    };
    family(
        &mut text,
        "flynn_network_map_entries",
        "gauge",
        "Entries of the data plane's maps",
        &maps(|map| map.entries),
    );
    family(
        &mut text,
        "flynn_network_map_room",
        "gauge",
        "Entries that the data plane's maps have room for",
        &maps(|map| map.room),
    );
    let gauges = [
        (
            "endpoints",
            "Containers of this host with an address",
            network.endpoints.len(),
        ),
        (
            "remote_endpoints",
            "Containers of other hosts that are known",
            network.remote.len(),
        ),
        (
            "hosts",
            "Hosts of the cluster that are known",
            network.hosts.len(),
        ),
        (
            "encrypted_hosts",
            "Other hosts that packets are sent to encrypted",
            network
                .hosts
                .iter()
                .filter(|host| host.way == "encrypted")
                .count(),
        ),
    ];
    for (name, help, value) in gauges {
        let name = format!("flynn_network_{name}");
        family(&mut text, &name, "gauge", help, &[(Vec::new(), value as u64)]);
    }
    let services = flows::services(flows);
    let of_services = |value: fn(&Service) -> u64| -> Vec<_> {
        let services = services.iter();
        services
            .map(|(name, service)| (vec![("service", *name)], value(service)))
            .collect()
    };
    let gauges: [(&str, &str, Gauge); 3] = [
        (
            "connections",
            "TCP connections that containers of this host have for a service",
            |service| service.connections,
        ),
        (
            "rtt_microseconds",
            "Their mean round-trip time, smoothed by TCP",
            |service| service.rtt_us / service.connections.max(1),
        ),
        (
            "retransmitted_segments",
            "Segments that were sent again over those that are open now",
            |service| service.retransmits,
        ),
    ];
    for (name, help, value) in gauges {
        let name = format!("flynn_service_tcp_{name}");
        family(&mut text, &name, "gauge", help, &of_services(value));
    }
    text
}

fn family(text: &mut String, name: &str, kind: &str, help: &str, values: &[(Vec<(&str, &str)>, u64)]) {
    let mut write = || -> std::fmt::Result {
        writeln!(text, "# HELP {name} {help}.\n# TYPE {name} {kind}")?;
        for (labels, value) in values {
            let labels: Vec<String> = labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
                .collect();
            if labels.is_empty() {
                writeln!(text, "{name} {value}")?;
            } else {
                writeln!(text, "{name}{{{}}} {value}", labels.join(","))?;
            }
        }
        Ok(())
    };
    // Writing to a string does not fail.
    let _ = write();
}

fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_do_not_go_back() {
        let traffic = Traffic {
            sent_bytes: 7,
            ..Traffic::default()
        };
        let drops = Drops {
            sent: [(DropReason::SpoofedAddress, 2)].into(),
            for_it: BTreeMap::new(),
        };
        let owner = ("web".to_owned(), "a\"b".to_owned());
        let gone = [(owner, Counted::new(traffic, drops))].into();
        let mut network = NetworkStatus::default();
        network.drops.insert("isolated".into(), 3);
        let text = text(&network, &gone, &[]);
        assert!(
            text.contains("flynn_network_sent_bytes_total{app=\"web\",process_type=\"a\\\"b\"} 7\n"),
            "{text}"
        );
        assert!(text.contains("flynn_network_dropped_packets_total{reason=\"isolated\"} 3\n"));
        let of_web =
            "{app=\"web\",process_type=\"a\\\"b\",direction=\"sent\",reason=\"spoofed_address\"} 2\n";
        assert!(
            text.contains(&format!("flynn_network_app_dropped_packets_total{of_web}")),
            "{text}"
        );
        assert!(text.contains("flynn_network_hosts 0\n"));
        assert!(text.contains("flynn_network_encrypted_hosts 0\n"));
        for line in text.lines().filter(|line| line.starts_with("# TYPE")) {
            assert_eq!(text.matches(line).count(), 1, "{line} comes once");
        }
    }
}
