//! TCP and UDP routes of a cluster, as a client outside of it sees them.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_api::host::Flow;
use flynn_cluster_tests::connections::{ECHO, Seen};
use flynn_cluster_tests::{PROGRAM, Platform, traffic, until};
use serde_json::json;

use crate::containers::{Container, Running, ask, containers_on, spread};
use crate::fixture::{Cluster, MEMBERS, STRANGER};

const LIMIT: Duration = Duration::from_mins(2);

/// The app, whose service is `echo-web`.
pub(crate) const APP: &str = "echo";

/// Where it listens.
const PORT: u16 = 7007;

/// Makes the app.
pub(crate) fn push(platform: &Platform, name: &str) -> Result<()> {
    platform.push_example(name)?;
    let service = json!({"name": format!("{name}-web"), "create": true, "check": {"type": "tcp"}});
    let ports = ["tcp", "udp"].map(|proto| json!({"port": PORT, "proto": proto, "service": service}));
    let web = json!({"args": ["perl", "-e", ECHO], "ports": ports});
    let mut file = tempfile::NamedTempFile::new()?;
    write!(file, "{}", json!({"processes": {"web": web}}))?;
    let path = file.path().display().to_string();
    platform.run(["-a", name, "release", "update", &path]).map(drop)
}

/// It with so many jobs, some on each host.
pub(crate) fn scaled(cluster: &mut Cluster, count: usize) -> Result<(&Platform, Vec<Container>)> {
    let platform = cluster.echo(APP)?;
    platform.run(["-a", APP, "scale", &format!("web={count}")])?;
    let containers = spread(platform, APP, count, &MEMBERS)?;
    Ok((platform, containers))
}

/// The part of a client outside of the cluster, on a machine of its own.
fn client(platform: &Platform, args: &[&str], to: &[SocketAddr]) -> Result<Command> {
    let mut command = platform.lab().host(STRANGER).command(PROGRAM)?;
    command.arg(traffic::COMMAND).args(args);
    command.args(to.iter().map(ToString::to_string));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(command)
}

/// Connections that live long.
pub(crate) struct Held {
    running: Running,
    stdout: BufReader<ChildStdout>,
}

impl Held {
    /// So many to each address, with an exchange every so many milliseconds, or only when asked for with 0.
    pub(crate) fn open(platform: &Platform, interval: u32, count: usize, to: &[SocketAddr]) -> Result<Self> {
        let (interval, count) = (interval.to_string(), count.to_string());
        let command = client(platform, &["hold", &interval, &count], to)?;
        let (running, stdout) = Running::start(command)?;
        Ok(Self { running, stdout })
    }

    /// Has each exchange something, and gives what they have seen.
    pub(crate) fn ask(&mut self) -> Result<Vec<Seen>> {
        writeln!(self.running.stdin()?, "?")?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the client says {line:?}"))
    }

    /// The same where none may be broken.
    pub(crate) fn whole(&mut self) -> Result<Vec<Seen>> {
        let all = self.ask()?;
        let broken: Vec<_> = all.iter().filter(|seen| seen.broken.is_some()).collect();
        ensure!(
            broken.is_empty(),
            "{} of {} connections are broken, first {:?}",
            broken.len(),
            all.len(),
            broken[0]
        );
        Ok(all)
    }
}

/// Connections that are closed once each has seen who answers.
fn connections(platform: &Platform, count: usize, to: &[SocketAddr]) -> Result<Vec<Seen>> {
    Held::open(platform, 0, count, to)?.whole()
}

fn datagrams(platform: &Platform, count: usize, to: &[SocketAddr]) -> Result<Vec<Seen>> {
    let output = client(platform, &["datagrams", &count.to_string()], to)?.output()?;
    ensure!(output.status.success(), "no answer to a datagram");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A port of hosts, by IPv4 and by IPv6.
pub(crate) fn doors(platform: &Platform, hosts: &[u8], port: u16) -> Vec<SocketAddr> {
    let both = |host: &u8| {
        let host = platform.lab().host(*host);
        [IpAddr::from(host.address()), host.address6().into()]
    };
    let addresses = hosts.iter().flat_map(both);
    addresses.map(|address| SocketAddr::new(address, port)).collect()
}

fn backends(seen: &[Seen]) -> BTreeSet<Ipv4Addr> {
    seen.iter().map(|seen| seen.backend).collect()
}

pub(crate) fn addresses(containers: &[Container]) -> BTreeSet<Ipv4Addr> {
    containers.iter().map(|container| container.address).collect()
}

/// The app sees the client itself, whichever host it came by: nobody translated it, and the answer came straight.
fn see_the_client(seen: &[Seen]) -> Result<()> {
    for one in seen {
        ensure!(one.client == one.own, "the app sees another client: {one:?}");
    }
    Ok(())
}

/// Waits until new connections go to these containers, and to none besides.
pub(crate) fn reach(platform: &Platform, doors: &[SocketAddr], wanted: &BTreeSet<Ipv4Addr>) -> Result<()> {
    until(
        LIMIT,
        &format!("all of {} containers are reached", wanted.len()),
        || {
            let tcp = connections(platform, 10, doors)?;
            let udp = datagrams(platform, 10, doors)?;
            see_the_client(&tcp)?;
            see_the_client(&udp)?;
            let (tcp, udp) = (backends(&tcp), backends(&udp));
            ensure!(tcp == *wanted && udp == *wanted, "{tcp:?} by TCP, {udp:?} by UDP");
            Ok(Some(()))
        },
    )
}

/// Each of them is one of the live flows of its container's host, with where the client sent it.
fn are_shown(platform: &Platform, protocol: &str, connections: &[Seen]) -> Result<()> {
    let mut flows = Vec::new();
    for host in MEMBERS {
        flows.extend(ask::<Vec<Flow>>(platform, host, "/host/network/flows")?);
    }
    for seen in connections {
        let shown = |flow: &&Flow| {
            (flow.protocol.as_str(), flow.remote, flow.local.port()) == (protocol, seen.client, PORT)
        };
        let flow = flows.iter().find(shown);
        let flow = flow.with_context(|| format!("{seen:?} is none of {} flows", flows.len()))?;
        ensure!(
            flow.app == APP && flow.route == Some(seen.to),
            "{seen:?} is {flow:?}"
        );
    }
    Ok(())
}

pub(crate) fn lead(cluster: &mut Cluster) -> Result<()> {
    const SPREAD: u16 = 3100;
    const STICKY: u16 = 3101;
    let (platform, containers) = scaled(cluster, 6)?;
    let mut routes = Vec::new();
    for kind in ["tcp", "udp"] {
        for (port, sticky) in [(SPREAD, None), (STICKY, Some("--sticky"))] {
            let port = port.to_string();
            let args = ["-a", APP, "route", "add", kind, "--port", &port];
            let id = platform.run(args.into_iter().chain(sticky))?;
            routes.push(id.trim().to_owned());
        }
    }
    let (spread_doors, sticky_doors) = (
        doors(platform, &MEMBERS, SPREAD),
        doors(platform, &MEMBERS, STICKY),
    );
    reach(platform, &spread_doors, &addresses(&containers))?;
    // Those routes were made after the others.
    let (tcp, udp) = until(LIMIT, "sticky routes lead to containers", || {
        let tcp = connections(platform, 5, &sticky_doors)?;
        Ok(Some((tcp, datagrams(platform, 5, &sticky_doors)?)))
    })?;
    for seen in [tcp, udp] {
        see_the_client(&seen)?;
        // One address by IPv4 and one by IPv6.
        for four in [true, false] {
            let of_family = |seen: &&Seen| seen.to.is_ipv4() == four;
            let seen: Vec<_> = seen.iter().filter(of_family).cloned().collect();
            ensure!(backends(&seen).len() == 1, "a client of many backends: {seen:?}");
        }
    }

    // More of them: nobody who is there moves.
    let mut held = Held::open(platform, 50, 10, &spread_doors)?;
    let before = held.whole()?;
    ensure!(backends(&before).len() > 2, "they are not spread: {before:?}");
    are_shown(platform, "tcp", &before)?;
    are_shown(platform, "udp", &datagrams(platform, 3, &spread_doors)?)?;
    let (platform, containers) = scaled(cluster, 9)?;
    reach(platform, &spread_doors, &addresses(&containers))?;
    held.whole()?;

    // Fewer: those that are there stay until they are done, and new ones go to those who stay.
    platform.run(["-a", APP, "scale", "--no-wait", "web=3"])?;
    let left = until(LIMIT, "three are left to take connections", || {
        let new = backends(&connections(platform, 10, &spread_doors)?);
        ensure!(new.len() == 3, "new connections go to {new:?}");
        Ok(Some(new))
    })?;
    let after = held.whole()?;
    let drained = after.iter().filter(|seen| !left.contains(&seen.backend)).count();
    eprintln!(
        "    {drained} of {} connections are to containers that take no more",
        after.len()
    );
    ensure!(drained > 0, "nobody drains");
    drop(held);
    until(LIMIT, "those who were drained are gone", || {
        let there = addresses(&containers_on(platform, APP, &MEMBERS)?);
        ensure!(there == left, "there are {there:?}");
        Ok(Some(()))
    })?;
    reach(platform, &spread_doors, &left)?;

    for id in &routes {
        platform.run(["-a", APP, "route", "remove", id])?;
    }
    until(LIMIT, "nobody answers any more", || {
        for door in spread_doors.iter().chain(&sticky_doors) {
            let args = ["connects", &door.to_string()];
            let connects = client(platform, &args, &[])?.output()?;
            ensure!(connects.stdout.starts_with(b"false"), "{door} takes connections");
        }
        Ok(Some(()))
    })?;
    ensure!(
        datagrams(platform, 1, &spread_doors).is_err(),
        "datagrams are answered without a route"
    );
    Ok(())
}
