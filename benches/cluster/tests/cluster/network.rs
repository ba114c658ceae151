//! The cluster's network across hosts: everybody reaches everybody, nobody in another's name, whatever is killed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flynn_api::discovery::Instance;
use flynn_api::host::{Flow, HostStatus, NetworkHost, NetworkStatus, ServiceStatus};
use flynn_cluster_tests::{DOMAIN, FLYNN_HOST, PROGRAM, Platform, traffic, until};

use crate::containers::{
    Container, Streams, all_exchange, answering, app_of, ask, containers_on, example, jobs, spread,
};
use crate::fixture::{APP, Cluster, MEMBERS, STRANGER};
use crate::join::{discoverd, flynn_host};

const LIMIT: Duration = Duration::from_mins(2);

/// How long what breaks is broken.
const WHILE: Duration = Duration::from_secs(3);

/// Packets that some hosts have dropped for a reason.
fn dropped(platform: &Platform, hosts: &[u8], reason: &str) -> Result<u64> {
    let mut sum = 0;
    for &host in hosts {
        let network: NetworkStatus = ask(platform, host, "/host/network")?;
        let count = network.drops.get(reason);
        sum += count.with_context(|| format!("no drops are counted for {reason}: {:?}", network.drops))?;
    }
    Ok(sum)
}

fn rises(platform: &Platform, hosts: &[u8], reason: &str, before: u64) -> Result<()> {
    until(LIMIT, &format!("drops for {reason} are counted"), || {
        Ok((dropped(platform, hosts, reason)? > before).then_some(()))
    })
}

pub(crate) fn reaches(cluster: &mut Cluster) -> Result<()> {
    let (platform, containers) = example(cluster)?;
    let _answering = answering(platform, &containers)?;
    all_exchange(platform, &containers)
}

pub(crate) fn forged(cluster: &mut Cluster) -> Result<()> {
    let (platform, containers) = example(cluster)?;
    let near = &containers[0];
    let far = containers
        .iter()
        .find(|other| other.host != near.host)
        .context("all are on one host")?;
    let _answering = answering(platform, std::slice::from_ref(far))?;

    // In another container's name, and in that of a container which is not there.
    for from in [far.address, Ipv4Addr::new(100, 100, near.host, 250)] {
        let before = dropped(platform, &[near.host], "spoofed_address")?;
        let args = ["forge", &from.to_string(), &far.address.to_string()];
        ensure!(
            near.traffic(platform, &args)?.status()?.success(),
            "nothing was forged"
        );
        rises(platform, &[near.host], "spoofed_address", before)?;
    }
    let network: NetworkStatus = ask(platform, near.host, "/host/network")?;
    let of_it = network.endpoints.iter().find(|of| of.address == near.address);
    let of_it = of_it.context("the container has no counters")?;
    ensure!(
        of_it.tx_drops.get("spoofed_address") >= Some(&2),
        "the drops are not known for its own: {:?}",
        of_it.tx_drops
    );

    // From a machine that is no host of the cluster: through a tunnel, and without.
    let before = dropped(platform, &[far.host], "unknown_host")?;
    let host = platform.lab().host(far.host).address().to_string();
    let stranger = platform.lab().host(STRANGER);
    let (from, to) = (near.address.to_string(), far.address.to_string());
    stranger.run(PROGRAM, [traffic::COMMAND, "vxlan", &host, &from, &to])?;
    rises(platform, &[far.host], "unknown_host", before)?;
    stranger.run("ip", ["route", "replace", "100.100.0.0/16", "via", &host])?;
    let to = SocketAddr::from((far.address, traffic::PORT)).to_string();
    let reached = stranger.run(PROGRAM, [traffic::COMMAND, "connects", &to])?;
    ensure!(reached.trim() == "false", "a stranger reaches a container");
    until(LIMIT, "a container reaches one of its own app", || {
        Ok(near.connects(platform, to.parse()?)?.then_some(()))
    })?;
    Ok(())
}

/// Kills the daemon and every process of the platform that each host has for itself.
fn kill_daemons(platform: &Platform) -> Result<()> {
    let processes = until(LIMIT, "each host has all of them", || {
        MEMBERS
            .map(|host| Ok((host, own_processes(platform, host)?)))
            .into_iter()
            .collect::<Result<Vec<_>>>()
            .map(Some)
    })?;
    for (host, processes) in processes {
        let host = platform.lab().host(host);
        host.kill(platform.daemon())?;
        for pid in processes {
            host.signal_process(pid, 9)?;
        }
    }
    Ok(())
}

fn own_processes(platform: &Platform, host: u8) -> Result<Vec<u32>> {
    let processes: Vec<(String, u32)> = jobs(platform, host)?
        .iter()
        .filter(|job| ["discoverd", "router", "scheduler"].contains(&app_of(job)))
        .filter_map(|job| Some((app_of(job).to_owned(), job.pid?)))
        .collect();
    ensure!(processes.len() >= 3, "host {host} has only {processes:?}");
    Ok(processes.into_iter().map(|(_, pid)| pid).collect())
}

fn start_daemons(platform: &Platform) -> Result<()> {
    for host in MEMBERS {
        platform.lab().host(host).start(platform.daemon())?;
    }
    for host in MEMBERS {
        until(
            LIMIT,
            &format!("the daemon of host {host} has its network"),
            || {
                let status: HostStatus = ask(platform, host, "/host/status")?;
                Ok(status.subnet.is_some().then_some(()))
            },
        )?;
    }
    Ok(())
}

pub(crate) fn killed(cluster: &mut Cluster) -> Result<()> {
    let (platform, containers) = example(cluster)?;
    let _answering = answering(platform, &containers)?;
    let streams = Streams::start(platform, &containers)?;
    kill_daemons(platform)?;
    std::thread::sleep(WHILE);
    start_daemons(platform)?;
    std::thread::sleep(WHILE);
    streams.stop()?;
    ensure!(
        spread(platform, APP, containers.len(), &MEMBERS)? == containers,
        "containers were replaced"
    );
    all_exchange(platform, &containers)
}

/// The daemons are replaced by another build, one host after the other.
pub(crate) fn upgraded(cluster: &mut Cluster) -> Result<()> {
    let (platform, containers) = example(cluster)?;
    let _answering = answering(platform, &containers)?;
    let streams = Streams::start(platform, &containers)?;
    for number in MEMBERS {
        let host = platform.lab().host(number);
        let size = || -> Result<u64> {
            let status: HostStatus = ask(platform, number, "/host/status")?;
            ensure!(status.subnet.is_some(), "it has no network");
            let exe = format!("/proc/{}/exe", status.pid);
            Ok(host.run("stat", ["-Lc", "%s", &exe])?.trim().parse()?)
        };
        let before = size()?;
        // Another file with other bytes, though it does the same.
        let replace = format!(
            "cp {FLYNN_HOST} /run/flynn-host.new && printf upgraded >>/run/flynn-host.new && \
             mount --bind /run/flynn-host.new {FLYNN_HOST}"
        );
        host.run("sh", ["-c", &replace])?;
        host.kill(platform.daemon())?;
        host.start(platform.daemon())?;
        until(LIMIT, &format!("host {number} runs the new daemon"), || {
            Ok((size()? != before).then_some(()))
        })?;
    }
    std::thread::sleep(WHILE);
    streams.stop()?;
    ensure!(
        spread(platform, APP, containers.len(), &MEMBERS)? == containers,
        "containers were replaced"
    );
    Ok(())
}

pub(crate) fn isolated(cluster: &mut Cluster) -> Result<()> {
    const OTHER: &str = "other";
    cluster.other(OTHER)?;
    let (platform, containers) = example(cluster)?;
    platform.run(["-a", OTHER, "scale", &format!("web={}", MEMBERS.len())])?;
    let others = spread(platform, OTHER, MEMBERS.len(), &MEMBERS)?;
    let _answering = answering(platform, &[&containers[..], &others[..]].concat())?;
    let target = &containers[0];
    let reach = |from: &Container, to: &Container| {
        from.connects(platform, SocketAddr::from((to.address, traffic::PORT)))
    };
    let all = |wanted: bool| {
        until(LIMIT, &format!("others reach the app: {wanted}"), || {
            for other in &others {
                let (there, back) = (reach(other, target)?, reach(target, other)?);
                ensure!(
                    (there, back) == (wanted, wanted),
                    "from host {} {there}, to it {back}",
                    other.host
                );
            }
            Ok(Some(()))
        })
    };
    all(true)?;
    let before = dropped(platform, &MEMBERS, "isolated")?;
    platform.run(["-a", APP, "network", "isolate"])?;
    all(false)?;
    rises(platform, &MEMBERS, "isolated", before)?;
    for own in &containers[1..] {
        until(LIMIT, "its own app is reached", || {
            Ok(reach(own, target)?.then_some(()))
        })?;
    }
    ensure!(
        platform.get(&format!("{APP}.{DOMAIN}"), "/")?.status.is_success(),
        "the router does not reach an isolated app"
    );
    platform.run(["-a", APP, "network", "allow", OTHER])?;
    all(true)?;
    platform.run(["-a", APP, "network", "deny", OTHER])?;
    all(false)?;
    platform.run(["-a", APP, "network", "open"])?;
    all(true)?;

    // What the platform's apps do not offer as a service is closed to the others.
    let postgres = containers_on(platform, "postgres", &MEMBERS)?;
    let postgres = postgres.first().context("there is no postgres")?;
    for other in &others {
        let service = SocketAddr::from((postgres.address, 5432));
        until(LIMIT, "postgres is reached", || {
            Ok(other.connects(platform, service)?.then_some(()))
        })?;
        let before = dropped(platform, &MEMBERS, "port_closed")?;
        ensure!(
            !other.connects(platform, SocketAddr::from((postgres.address, 7)))?,
            "a port that is not offered answers"
        );
        rises(platform, &MEMBERS, "port_closed", before)?;
    }
    Ok(())
}

/// What goes on is shown, on the command line and to Prometheus; limits are the data plane's.
pub(crate) fn seen(cluster: &mut Cluster) -> Result<()> {
    let (platform, containers) = example(cluster)?;
    let _answering = answering(platform, &containers)?;
    let streams = Streams::start(platform, &containers)?;
    let first = &containers[0];
    let network = |args: &[&str]| -> Result<serde_json::Value> {
        let args = [&["network"], args, &["--json"]].concat();
        Ok(serde_json::from_str(&flynn_host(platform, first.host, &args)?)?)
    };
    let to = |other: &Container| SocketAddr::from((other.address, traffic::PORT));
    until(LIMIT, "the connection is shown", || {
        let flows: Vec<Flow> = serde_json::from_value(network(&["flows", "--app", APP])?)?;
        let own = |flow: &&Flow| flow.local.ip() == IpAddr::from(first.address);
        let found = flows
            .iter()
            .filter(own)
            .find(|flow| containers.iter().any(|other| to(other) == flow.remote));
        let found = found.with_context(|| format!("there are {flows:?}"))?;
        Ok((found.tx_bytes > 0 && found.rtt_us > 0).then_some(()))
    })?;
    let hosts: Vec<NetworkHost> = serde_json::from_value(network(&["hosts"])?)?;
    let ways: Vec<&str> = hosts.iter().map(|host| host.way.as_str()).collect();
    ensure!(
        hosts.len() == MEMBERS.len()
            && ways
                .iter()
                .filter(|way| matches!(**way, "tunnel" | "encrypted"))
                .count()
                == MEMBERS.len() - 1,
        "the hosts are {hosts:?}"
    );
    let status: HostStatus = ask(platform, first.host, "/host/status")?;
    let plain = "traffic between hosts is not encrypted";
    ensure!(
        ways.contains(&"encrypted") || status.notices.iter().any(|notice| notice.starts_with(plain)),
        "that nothing is encrypted is not among {:?}",
        status.notices
    );
    let services: Vec<ServiceStatus> =
        serde_json::from_value(network(&["services", "--service", "postgres"])?)?;
    let led = |service: &ServiceStatus| service.instances.iter().any(|instance| instance.leader);
    ensure!(
        services.len() == 1 && services.iter().all(led),
        "the services are {services:?}"
    );
    let shown: NetworkStatus = ask(platform, first.host, "/host/network")?;
    let elsewhere = containers.iter().filter(|other| other.host != first.host);
    for other in elsewhere {
        let known = shown.remote.iter().any(|remote| remote.address == other.address);
        ensure!(known, "{other:?} is not among {:?}", shown.remote);
    }
    let metrics = platform.lab().host(first.host).run(
        "curl",
        [
            "-sSf",
            "--unix-socket",
            flynn_api::host::SOCKET,
            "http://localhost/metrics",
        ],
    )?;
    for wanted in [
        format!("flynn_network_sent_bytes_total{{app=\"{APP}\",process_type=\"web\"}} "),
        "flynn_network_dropped_packets_total{reason=\"spoofed_address\"} ".into(),
        "flynn_network_map_entries{map=\"hosts4\"} 2".into(),
    ] {
        ensure!(metrics.contains(&wanted), "no {wanted} in\n{metrics}");
    }
    streams.stop()?;

    platform.run(["-a", APP, "limit", "set", "web", "network_out=10MB"])?;
    until(LIMIT, "the limit is the data plane's", || {
        let shown: NetworkStatus = ask(platform, first.host, "/host/network")?;
        let mut own = shown
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.app == APP)
            .peekable();
        Ok((own.peek().is_some() && own.all(|endpoint| endpoint.tx_limit == Some(10 << 20))).then_some(()))
    })?;
    platform
        .run(["-a", APP, "limit", "set", "web", "network_out=unlimited"])
        .map(drop)
}

pub(crate) fn lost_and_found(cluster: &mut Cluster) -> Result<()> {
    let (platform, containers) = example(cluster)?;
    let [.., lost] = MEMBERS;
    let subnet = |host: u8| -> Result<Option<String>> {
        Ok(ask::<HostStatus>(platform, host, "/host/status")?.subnet)
    };
    let before = subnet(lost)?;
    let begun = Instant::now();
    platform.lab().host(lost).power_cut()?;
    let path = format!("/services/{APP}-web/instances");
    until(LIMIT, "discovery misses the host's containers", || {
        let there: Vec<Instance> = discoverd(platform, MEMBERS[0], &path)?;
        let is_lost = |instance: &Instance| {
            let lost = containers.iter().filter(|container| container.host == lost);
            lost.map(|container| container.address)
                .any(|address| instance.addr.starts_with(&format!("{address}:")))
        };
        Ok((!there.iter().any(is_lost)).then_some(()))
    })?;
    eprintln!("      {} ms after its power was cut", begun.elapsed().as_millis());
    let rest: Vec<u8> = MEMBERS.into_iter().filter(|host| *host != lost).collect();
    let left = spread(platform, APP, containers.len(), &rest)?;
    {
        let _answering = answering(platform, &left)?;
        all_exchange(platform, &left)?;
    }
    platform.lab().host(lost).boot()?;
    until(LIMIT, "the host is back with its subnet", || {
        Ok((subnet(lost)? == before).then_some(()))
    })?;
    until(LIMIT, "the host takes jobs again", || {
        platform.run(["-a", APP, "scale", "web=1"])?;
        until(LIMIT, "one job is left", || {
            Ok((containers_on(platform, APP, &MEMBERS)?.len() == 1).then_some(()))
        })?;
        // The scheduler places by the hosts that it follows by now.
        platform.run(["-a", APP, "scale", &format!("web={}", containers.len())])?;
        let all = until(LIMIT, "all jobs are back", || {
            let all = containers_on(platform, APP, &MEMBERS)?;
            Ok((all.len() == containers.len()).then_some(all))
        })?;
        Ok(all.iter().any(|container| container.host == lost).then_some(()))
    })?;
    let containers = containers_on(platform, APP, &MEMBERS)?;
    let _answering = answering(platform, &containers)?;
    all_exchange(platform, &containers)
}

pub(crate) fn removed(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.members()?;
    let [first, .., gone] = MEMBERS;
    let id = ask::<HostStatus>(platform, gone, "/host/status")?.id;
    let refused = |args: &[&str], words: &str| -> Result<()> {
        let Err(error) = flynn_host(platform, first, args) else {
            bail!("{args:?} was not refused")
        };
        let said = format!("{error:#}");
        eprintln!("      refused: {said}");
        ensure!(said.contains(words), "{said}");
        Ok(())
    };
    refused(&["remove", "nobody"], "there are:")?;
    refused(&["remove", &id], "--force")?;
    let own = ask::<HostStatus>(platform, first, "/host/status")?.id;
    refused(&["remove", &own], "another host")?;
    flynn_host(platform, first, &["remove", &id, "--force"])?;
    until(LIMIT, "the removed host says so", || {
        let status: HostStatus = ask(platform, gone, "/host/status")?;
        let says = |notice: &String| notice.contains("lease") && notice.contains("flynn-host join");
        ensure!(status.notices.iter().any(says), "{:?}", status.notices);
        Ok(Some(()))
    })
}
