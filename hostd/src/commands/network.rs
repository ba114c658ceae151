//! `flynn-host network`: the host's part of the cluster's network.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flynn_api::client::host::HostClient;
use flynn_api::host::{EndpointStatus, Flow, NetworkStatus, ServiceStatus};

use super::show::{age, table};
use super::{print_json, reach};

/// `flynn-host network`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What to look at; an overview unless given
    #[command(subcommand)]
    view: Option<View>,
    /// As JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand, Debug)]
enum View {
    /// Containers of this host: whose they are, what they are allowed, what they sent and received
    Endpoints {
        /// Only those of this app
        #[arg(long)]
        app: Option<String>,
        /// Also those of other hosts, by address and identity
        #[arg(short, long)]
        all: bool,
    },
    /// The hosts of the cluster and their subnets
    Hosts,
    /// How packets get to the other hosts
    Routes,
    /// Packets that were dropped, by reason
    Drops {
        /// Only those of this app's containers on this host: what they sent, and what was for them
        #[arg(long)]
        app: Option<String>,
        /// Also reasons for which none was
        #[arg(short, long)]
        all: bool,
    },
    /// How full the data plane's maps are
    Maps,
    /// Connections and flows of datagrams of this host's containers: round-trip times, segments sent again
    Flows {
        /// Only those of this app
        #[arg(long)]
        app: Option<String>,
        /// Only those that came to this service
        #[arg(long)]
        service: Option<String>,
        /// Only those with this address at either end, or sent to it as a route's
        #[arg(long)]
        address: Option<IpAddr>,
    },
    /// Virtual addresses of services, and the instances that they lead to
    Services {
        /// Only this one
        #[arg(long)]
        service: Option<String>,
        /// Only those with this address, or with an instance there
        #[arg(long)]
        address: Option<IpAddr>,
    },
}

/// Shows it.
pub(super) async fn run(host: &HostClient, args: &Args) -> anyhow::Result<()> {
    if let Some(View::Flows {
        app,
        service,
        address,
    }) = &args.view
    {
        let mut flows = reach(host.flows().await)?;
        flows.retain(|flow| {
            app.as_ref().is_none_or(|app| flow.app == *app)
                && service
                    .as_ref()
                    .is_none_or(|service| flow.service.as_ref() == Some(service))
                && address.is_none_or(|address| {
                    let route = flow.route.is_some_and(|route| route.ip() == address);
                    route || [flow.local.ip(), flow.remote.ip()].contains(&address)
                })
        });
        if args.json {
            return print_json(&flows);
        }
        println!("{}", flows_table(&flows));
        return Ok(());
    }
    if let Some(View::Services { service, address }) = &args.view {
        let mut services = reach(host.services().await)?;
        services.retain(|of| {
            service.as_ref().is_none_or(|service| of.service == *service)
                && address.is_none_or(|address| is_at(of, address))
        });
        if args.json {
            return print_json(&services);
        }
        println!("{}", services_table(&services));
        return Ok(());
    }
    let mut network = reach(host.network().await)?;
    if network.gateway.is_none() && !args.json {
        println!("this host has no cluster network yet: run flynn-host bootstrap or flynn-host join");
        return Ok(());
    }
    if let Some(View::Endpoints { app: Some(app), .. } | View::Drops { app: Some(app), .. }) = &args.view {
        network.endpoints.retain(|endpoint| endpoint.app == *app);
    }
    if args.json {
        return match &args.view {
            None | Some(View::Flows { .. } | View::Services { .. }) => print_json(&network),
            Some(View::Endpoints { all: true, .. }) => {
                print_json(&serde_json::json!({"endpoints": network.endpoints, "remote": network.remote}))
            }
            Some(View::Endpoints { .. }) => print_json(&network.endpoints),
            Some(View::Hosts | View::Routes) => print_json(&network.hosts),
            Some(View::Drops { app: Some(_), .. }) => print_json(&drops_of(&network)),
            Some(View::Drops { .. }) => print_json(&network.drops),
            Some(View::Maps) => print_json(&network.maps),
        };
    }
    println!("{}", shown(&network, args.view.as_ref()));
    Ok(())
}

fn shown(network: &NetworkStatus, view: Option<&View>) -> String {
    match view {
        None | Some(View::Flows { .. } | View::Services { .. }) => overview(network),
        Some(View::Endpoints { all, .. }) => endpoints(network, *all),
        Some(View::Hosts) => hosts(network),
        Some(View::Routes) => routes(network),
        Some(View::Drops { app: Some(_), .. }) => drops_of_app(network),
        Some(View::Drops { all, .. }) => drops(network, *all),
        Some(View::Maps) => maps(network),
    }
}

fn overview(network: &NetworkStatus) -> String {
    let gateway = network
        .gateway
        .map_or_else(String::new, |gateway| gateway.to_string());
    let dropped: u64 = network.drops.values().sum();
    let others = network.hosts.iter().filter(|host| !host.own).count();
    let encrypted = network.hosts.iter().filter(|host| host.way == "encrypted");
    let fullest = network
        .maps
        .iter()
        .max_by_key(|map| map.entries * 1000 / map.room.max(1));
    let mut lines = vec![
        format!("network    {}, {}", network.network, network.network6),
        format!("subnet     {}, gateway {gateway}", network.subnet),
        format!(
            "endpoints  {} here, {} on {others} other hosts",
            network.endpoints.len(),
            network.remote.len()
        ),
        format!("encrypted  with {} of {others} other hosts", encrypted.count()),
        format!("dropped    {dropped} packets (flynn-host network drops)"),
    ];
    if let Some(map) = fullest {
        lines.push(format!(
            "maps       the fullest is {} with {} of {}",
            map.name, map.entries, map.room
        ));
    }
    lines.join("\n")
}

fn endpoints(network: &NetworkStatus, all: bool) -> String {
    let mut local = table(&[
        "ADDRESS", "APP", "TYPE", "IDENTITY", "POLICY", "SENT", "RECEIVED", "JOB",
    ]);
    for endpoint in &network.endpoints {
        local.add_row([
            endpoint.address.to_string(),
            endpoint.app.clone(),
            endpoint.process_type.clone(),
            endpoint.identity.to_string(),
            policy(endpoint),
            amount(endpoint.tx_bytes),
            amount(endpoint.rx_bytes),
            endpoint.job_id.clone(),
        ]);
    }
    if !all {
        return local.trim_fmt();
    }
    let mut remote = table(&["ADDRESS", "HOST", "IDENTITY"]);
    for endpoint in &network.remote {
        remote.add_row([
            endpoint.address.to_string(),
            endpoint.host_id.clone(),
            endpoint.identity.to_string(),
        ]);
    }
    format!("{}\n\n{}", local.trim_fmt(), remote.trim_fmt())
}

/// What an endpoint is allowed, in a few words.
fn policy(endpoint: &EndpointStatus) -> String {
    let mut words = Vec::new();
    if endpoint.isolated {
        words.push("isolated".to_owned());
    }
    if endpoint.system {
        words.push(format!("system: {}", endpoint.open_ports.join(" ")));
    }
    let limit = |what: &str, limit: Option<u64>| Some(format!("{what} {}/s", amount(limit?)));
    words.extend(limit("out", endpoint.tx_limit));
    words.extend(limit("in", endpoint.rx_limit));
    if words.is_empty() {
        "open".into()
    } else {
        words.join(", ")
    }
}

fn hosts(network: &NetworkStatus) -> String {
    let now = jiff::Timestamp::now();
    let mut hosts = table(&["HOST", "ADDRESS", "SUBNET", "ENDPOINTS", "LEASE RENEWED"]);
    for host in &network.hosts {
        let renewed = host
            .renewed_at
            .map_or_else(|| "-".to_owned(), |then| format!("{} ago", age(then, now)));
        hosts.add_row([
            format!("{}{}", host.id, if host.own { " (this)" } else { "" }),
            host.address.to_string(),
            host.subnet.clone(),
            host.endpoints.to_string(),
            renewed,
        ]);
    }
    hosts.trim_fmt()
}

fn routes(network: &NetworkStatus) -> String {
    let mut routes = table(&["SUBNET", "HOST", "WAY", "NEXT HOP", "INTERFACE"]);
    for host in &network.hosts {
        let next_hop = host
            .next_hop
            .map_or_else(|| "-".to_owned(), |next_hop| next_hop.to_string());
        routes.add_row([
            host.subnet.clone(),
            host.id.clone(),
            host.way.clone(),
            next_hop,
            host.interface.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    routes.trim_fmt()
}

fn drops(network: &NetworkStatus, all: bool) -> String {
    let counted: BTreeMap<&String, &u64> = network
        .drops
        .iter()
        .filter(|(_, count)| all || **count > 0)
        .collect();
    if counted.is_empty() {
        return "no packet was dropped".into();
    }
    let mut drops = table(&["REASON", "PACKETS"]);
    for (reason, count) in counted {
        drops.add_row([reason.clone(), count.to_string()]);
    }
    drops.trim_fmt()
}

/// Packets of containers that were dropped.
#[derive(Debug, Default, serde::Serialize)]
struct OfApp {
    sent: u64,
    received: u64,
}

/// By reason, all containers together.
fn drops_of(network: &NetworkStatus) -> BTreeMap<&str, OfApp> {
    let mut drops: BTreeMap<&str, OfApp> = BTreeMap::new();
    for endpoint in &network.endpoints {
        for (reason, count) in &endpoint.tx_drops {
            drops.entry(reason).or_default().sent += count;
        }
        for (reason, count) in &endpoint.rx_drops {
            drops.entry(reason).or_default().received += count;
        }
    }
    drops
}

fn drops_of_app(network: &NetworkStatus) -> String {
    if network.endpoints.is_empty() {
        return "the app has no container on this host".into();
    }
    let counted = drops_of(network);
    if counted.is_empty() {
        return "no packet of its containers on this host was dropped".into();
    }
    let mut drops = table(&["REASON", "SENT BY IT", "FOR IT"]);
    for (reason, of) in counted {
        drops.add_row([reason.to_owned(), of.sent.to_string(), of.received.to_string()]);
    }
    drops.trim_fmt()
}

fn maps(network: &NetworkStatus) -> String {
    let mut maps = table(&["MAP", "ENTRIES", "ROOM FOR"]);
    for map in &network.maps {
        maps.add_row([map.name.clone(), map.entries.to_string(), map.room.to_string()]);
    }
    maps.trim_fmt()
}

fn is_at(service: &ServiceStatus, address: IpAddr) -> bool {
    let of = &service.addresses;
    let own = [
        of.ipv4.into(),
        of.leader_ipv4.into(),
        of.ipv6.into(),
        of.leader_ipv6.into(),
    ];
    let instances = service.instances.iter();
    let mut instances =
        instances.flat_map(|instance| [Some(instance.address), instance.address6.map(IpAddr::V6)]);
    own.contains(&address) || instances.any(|instance| instance == Some(address))
}

fn services_table(services: &[ServiceStatus]) -> String {
    if services.is_empty() {
        return "there is no such service".into();
    }
    let mut table = table(&["SERVICE", "ADDRESS", "LEADER'S ADDRESS", "INSTANCES"]);
    for of in services {
        let instance = |instance: &flynn_api::host::ServiceInstance| {
            let leads = if instance.leader { " (leader)" } else { "" };
            format!("{}{leads}", instance.address)
        };
        let instances: Vec<String> = of.instances.iter().map(instance).collect();
        table.add_row([
            if of.service.is_empty() { "-" } else { &of.service }.to_owned(),
            format!("{}\n{}", of.addresses.ipv4, of.addresses.ipv6),
            format!("{}\n{}", of.addresses.leader_ipv4, of.addresses.leader_ipv6),
            if instances.is_empty() {
                "none".into()
            } else {
                instances.join("\n")
            },
        ]);
    }
    table.trim_fmt()
}

fn flows_table(flows: &[Flow]) -> String {
    let mut table = table(&[
        "PROTOCOL",
        "LOCAL",
        "REMOTE",
        "CAME BY",
        "APP",
        "TYPE",
        "SERVICE",
        "RTT",
        "SENT AGAIN",
        "SENT",
        "RECEIVED",
    ]);
    for flow in flows {
        let of_tcp = |value: String| if flow.protocol == "tcp" { value } else { "-".into() };
        table.add_row([
            flow.protocol.clone(),
            flow.local.to_string(),
            flow.remote.to_string(),
            flow.route.map_or_else(String::new, |route| route.to_string()),
            flow.app.clone(),
            flow.process_type.clone(),
            flow.service.clone().unwrap_or_default(),
            of_tcp(format!("{}.{:03} ms", flow.rtt_us / 1000, flow.rtt_us % 1000)),
            of_tcp(flow.retransmits.to_string()),
            of_tcp(amount(flow.tx_bytes)),
            of_tcp(amount(flow.rx_bytes)),
        ]);
    }
    table.trim_fmt()
}

/// Bytes in the largest unit that leaves a number before the point.
pub(super) fn amount(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..UNITS.len())
        .rev()
        .find(|unit| bytes >> (10 * unit) > 0)
        .unwrap_or(0);
    if unit == 0 {
        return format!("{bytes} B");
    }
    let tenths = (u128::from(bytes) * 10) >> (10 * unit);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        let shown = [0, 1023, 1536, 5 << 20, u64::MAX].map(amount);
        assert_eq!(shown, ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "16777215.9 TiB"]);
    }

    #[test]
    fn services_are_found_by_all_their_addresses() {
        let service = ServiceStatus {
            service: "db".into(),
            addresses: flynn_api::discovery::VirtualNetworks::default().addresses(7),
            instances: vec![flynn_api::host::ServiceInstance {
                index: 3,
                address: "100.100.1.5".parse().unwrap(),
                address6: Some("fd66::5".parse().unwrap()),
                leader: true,
            }],
        };
        let of = service.addresses;
        for address in [
            of.ipv4.into(),
            of.leader_ipv6.into(),
            IpAddr::from([100, 100, 1, 5]),
            "fd66::5".parse().unwrap(),
        ] {
            assert!(is_at(&service, address), "{address}");
        }
        assert!(!is_at(&service, [100, 100, 1, 6].into()));
        let shown = services_table(&[service]);
        assert!(
            shown.contains("db") && shown.contains("100.100.1.5 (leader)"),
            "{shown}"
        );
    }

    #[test]
    fn every_view_of_an_empty_network_says_something() {
        let network = NetworkStatus::default();
        for view in [
            None,
            Some(View::Endpoints { app: None, all: true }),
            Some(View::Hosts),
            Some(View::Routes),
            Some(View::Drops {
                app: None,
                all: false,
            }),
            Some(View::Drops {
                app: Some("web".into()),
                all: false,
            }),
            Some(View::Maps),
        ] {
            assert!(!shown(&network, view.as_ref()).is_empty(), "{view:?}");
        }
    }
}
