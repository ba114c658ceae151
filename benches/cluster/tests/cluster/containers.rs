//! Containers of the lab's hosts, and the traffic between them.

use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_api::host::{ActiveJob, label};
use flynn_cluster_tests::traffic::{self, Streamed};
use flynn_cluster_tests::{PROGRAM, Platform, until};
use serde::de::DeserializeOwned;

use crate::fixture::{APP, Cluster, MEMBERS};

const LIMIT: Duration = Duration::from_mins(2);

/// A container as the test sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) host: u8,
    pub(crate) job: String,
    pub(crate) pid: u32,
    pub(crate) address: Ipv4Addr,
}

impl Container {
    pub(crate) fn address6(&self) -> Ipv6Addr {
        const CLUSTER: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6c79, 0x6e6e, 0, 0, 0, 0, 0);
        Ipv6Addr::from_bits(CLUSTER.to_bits() | u128::from(self.address.to_bits()))
    }

    /// One end of some traffic, in its network.
    pub(crate) fn traffic(&self, platform: &Platform, args: &[&str]) -> Result<Command> {
        let mut command = platform.lab().host(self.host).command("nsenter")?;
        command
            .arg(format!("--net=/proc/{}/ns/net", self.pid))
            .args([PROGRAM, traffic::COMMAND])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Ok(command)
    }

    pub(crate) fn says<T: DeserializeOwned>(&self, platform: &Platform, args: &[&str]) -> Result<T> {
        let output = self.traffic(platform, args)?.output()?;
        ensure!(output.status.success(), "{args:?} in {self:?}: {}", output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    pub(crate) fn connects(&self, platform: &Platform, to: SocketAddr) -> Result<bool> {
        self.says(platform, &["connects", &to.to_string()])
    }
}

/// A program that ends with its value.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(mut command: Command) -> Result<(Self, BufReader<std::process::ChildStdout>)> {
        let mut child = command.spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let running = Self(child);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        ensure!(line.trim() == "ready", "it says {line:?}");
        Ok((running, stdout))
    }

    /// What it is told through.
    pub(crate) fn stdin(&mut self) -> Result<&mut ChildStdin> {
        self.0.stdin.as_mut().context("it cannot be told anything")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a host's daemon says.
pub(crate) fn ask<T: DeserializeOwned>(platform: &Platform, host: u8, path: &str) -> Result<T> {
    let url = format!("http://localhost{path}");
    let curl = [
        "-sSf",
        "--max-time",
        "5",
        "--unix-socket",
        flynn_api::host::SOCKET,
        &url,
    ];
    let output = platform.lab().host(host).exec("curl", curl)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

pub(crate) fn jobs(platform: &Platform, host: u8) -> Result<Vec<ActiveJob>> {
    let jobs: std::collections::BTreeMap<String, ActiveJob> = ask(platform, host, "/host/jobs")?;
    Ok(jobs
        .into_values()
        .filter(|job| !job.status.is_terminal())
        .collect())
}

pub(crate) fn app_of(job: &ActiveJob) -> &str {
    job.job.metadata.get(label::APP_NAME).map_or("", String::as_str)
}

/// The containers of an app on some hosts.
pub(crate) fn containers_on(platform: &Platform, app: &str, hosts: &[u8]) -> Result<Vec<Container>> {
    let mut found = Vec::new();
    for &host in hosts {
        for job in jobs(platform, host)?
            .iter()
            .filter(|job| app_of(job) == app && job.healthy)
        {
            if let (Some(pid), Some(address)) = (job.pid, job.internal_ip) {
                let job = job.job.id.clone();
                found.push(Container {
                    host,
                    job,
                    pid,
                    address,
                });
            }
        }
    }
    Ok(found)
}

/// So many containers of an app, on every one of the hosts.
pub(crate) fn spread(platform: &Platform, app: &str, count: usize, hosts: &[u8]) -> Result<Vec<Container>> {
    until(
        LIMIT,
        &format!("{count} jobs of {app} run on hosts {hosts:?}"),
        || {
            let found = containers_on(platform, app, hosts)?;
            let everywhere = hosts
                .iter()
                .all(|host| found.iter().any(|container| container.host == *host));
            ensure!(found.len() == count && everywhere, "there are {found:?}");
            Ok(Some(found))
        },
    )
}

pub(crate) fn answering(platform: &Platform, containers: &[Container]) -> Result<Vec<Running>> {
    containers
        .iter()
        .map(|container| Ok(Running::start(container.traffic(platform, &["answer"])?)?.0))
        .collect()
}

/// Everybody to everybody, over TCP and UDP, IPv4 and IPv6.
pub(crate) fn all_exchange(platform: &Platform, containers: &[Container]) -> Result<()> {
    let mut asking = Vec::new();
    for from in containers {
        let others = containers.iter().filter(|other| *other != from);
        let to: Vec<String> = others
            .flat_map(|other| [IpAddr::from(other.address), other.address6().into()])
            .map(|address| address.to_string())
            .collect();
        let mut args = vec!["exchange"];
        args.extend(to.iter().map(String::as_str));
        let failures: std::collections::BTreeMap<String, String> = from.says(platform, &args)?;
        if !failures.is_empty() {
            asking.push(format!(
                "from {} on host {}: {failures:?}",
                from.address, from.host
            ));
        }
    }
    ensure!(asking.is_empty(), "{}", asking.join("\n"));
    Ok(())
}

/// The example on all hosts of the cluster, two jobs on each if the scheduler places them evenly.
pub(crate) fn example(cluster: &mut Cluster) -> Result<(&Platform, Vec<Container>)> {
    cluster.app()?;
    let platform = cluster.members()?;
    let count = 2 * MEMBERS.len();
    platform.run(["-a", APP, "scale", &format!("web={count}")])?;
    let containers = spread(platform, APP, count, &MEMBERS)?;
    Ok((platform, containers))
}

/// Streams between containers of different hosts.
pub(crate) struct Streams(Vec<(String, Running, BufReader<std::process::ChildStdout>)>);

impl Streams {
    /// TCP and UDP between the first containers of each two hosts, over IPv4 and IPv6.
    pub(crate) fn start(platform: &Platform, containers: &[Container]) -> Result<Self> {
        let first = |host: u8| {
            let found = containers.iter().find(|container| container.host == host);
            found.with_context(|| format!("none on host {host}"))
        };
        let mut streams = Vec::new();
        let hosts = MEMBERS.iter().zip(MEMBERS.iter().cycle().skip(1));
        for (number, (from, to)) in hosts.enumerate() {
            let (from, to) = (first(*from)?, first(*to)?);
            let address = match number % 2 {
                0 => SocketAddr::from((to.address, traffic::PORT)),
                _ => SocketAddr::from((to.address6(), traffic::PORT)),
            };
            // One stream of a thousand a second; more of them would only keep the machine busy.
            let udp = if number < 2 { "1000" } else { "100" };
            for (kind, rate) in [("tcp", "50"), ("udp", udp)] {
                let command = from.traffic(platform, &["stream", kind, &address.to_string(), rate])?;
                let (running, stdout) = Running::start(command)?;
                streams.push((
                    format!("{kind} from host {} to {address}", from.host),
                    running,
                    stdout,
                ));
            }
        }
        Ok(Self(streams))
    }

    /// Ends them: each must have got everything back.
    pub(crate) fn stop(self) -> Result<()> {
        for (name, mut running, mut stdout) in self.0 {
            drop(running.0.stdin.take());
            let mut line = String::new();
            stdout.read_line(&mut line)?;
            let streamed: Streamed =
                serde_json::from_str(&line).with_context(|| format!("{name}: {line:?}"))?;
            eprintln!(
                "    {name}: {} of {} came back, longest pause {} ms",
                streamed.echoed, streamed.sent, streamed.longest_gap_ms
            );
            ensure!(
                streamed.broken.is_none() && streamed.echoed == streamed.sent,
                "{name}: {streamed:?}"
            );
        }
        Ok(())
    }
}
