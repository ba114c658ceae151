//! How long a cluster of three takes to notice: leaders that are killed until writes go on, hosts that are lost until
//! their instances are gone from DNS.
//!
//! A leader is killed as a process; its host refuses connections. A host is lost with all that it would say: its process
//! is stopped, and no packet goes to its address or comes from there.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{
    HEARTBEAT_SECS, HOST_SERVICE, Instance, NetworkLeases, ServiceConfig, ServiceMeta, SubnetLease,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::cluster::{Cluster, Kind, MEMBERS};
use super::load::percentile;
use super::{alone, disk};
use crate::inside::discoverd::host_id;
use crate::row::{Row, Subject};
use crate::suites::Thoroughness;

const SERVICE: &str = "web";
/// Instances on each host: an answer over UDP holds three.
const INSTANCES: u8 = 1;
/// How long a change may take to be seen.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between looks at DNS.
const LOOK: Duration = Duration::from_millis(5);

const WRITES: Subject = alone("leader killed: writes go on, 99 of 100 within", "ms", 1_000.0);
const NAMES: Subject = alone("host lost: gone from DNS, 99 of 100 within", "ms", 2_000.0);

/// Takes both rows.
pub(super) async fn measured(thoroughness: Thoroughness) -> [Row; 2] {
    let rounds = thoroughness.pick(10, 50);
    let row = |subject: Subject, times: Result<Vec<Duration>>| match times {
        Ok(mut times) => {
            let of = |times: &mut Vec<Duration>, percent| percentile(times, percent).unwrap_or_default();
            let (half, p99) = (of(&mut times, 50), of(&mut times, 99));
            eprintln!("    {}: half {half:.0} ms, 99 of 100 {p99:.0} ms", subject.name);
            subject.figure(p99, times.len())
        }
        Err(error) => subject.missing(format!("{error:#}")),
    };
    [
        row(WRITES, leaders(rounds).await),
        row(NAMES, hosts(rounds).await),
    ]
}

/// From each kill until a write is answered that began after it. The writer is at another host.
async fn leaders(rounds: usize) -> Result<Vec<Duration>> {
    let dir = disk()?;
    let mut cluster = Cluster::start(Kind::Ours, dir.path()).await?;
    let mut times = Vec::new();
    let mut index = 0;
    for round in 0..rounds {
        let leader = cluster.settled().await?;
        let client = cluster.client((leader + 1 + round % (MEMBERS - 1)) % MEMBERS)?;
        if round == 0 {
            client.create_service(SERVICE, &ServiceConfig::default()).await?;
        }
        let mut write = async || {
            let meta = ServiceMeta {
                data: round.into(),
                index,
                leader_id: None,
            };
            let written = client.set_meta(SERVICE, &meta).await?;
            ensure!(written.index > index, "a write without an index of its own");
            index = written.index;
            anyhow::Ok(())
        };
        for _ in 0..50 {
            write().await?;
        }
        cluster.kill(leader)?;
        let killed = Instant::now();
        write().await?;
        times.push(killed.elapsed());
        eprintln!(
            "    leader {} killed: {} ms",
            leader + 1,
            killed.elapsed().as_millis()
        );
        ensure!(client.meta(SERVICE).await?.index == index, "a write is lost");
        cluster.restart(leader)?;
    }
    Ok(times)
}

/// From each loss until the name server of another host gives none of the lost host's addresses.
async fn hosts(rounds: usize) -> Result<Vec<Duration>> {
    let dir = disk()?;
    let mut cluster = Cluster::start(Kind::Ours, dir.path()).await?;
    open_dns(&cluster).await?;
    nft(
        "table inet lost { set hosts { type ipv4_addr; }; chain out { type filter hook output priority 0; \
         ip daddr @hosts drop; ip saddr @hosts drop; }; }",
    )?;
    let mut beating = JoinSet::new();
    for at in 0..MEMBERS {
        let http = Http::new(&format!("https://{}", cluster.addr(at)))?.identity(&cluster.identity)?;
        let client = DiscoveryClient::new(http.timeout(Duration::from_secs(1)));
        for number in 0..INSTANCES {
            beating.spawn(beat(client.clone(), instance(at, number)));
        }
    }
    let mut times = Vec::new();
    for round in 0..rounds {
        let leader = cluster.settled().await?;
        let lost = round % MEMBERS;
        let gateway = gateway((lost + 1) % MEMBERS);
        let all: Vec<Ipv4Addr> = (0..MEMBERS).flat_map(addresses).collect();
        seen(gateway, |found| all.iter().all(|address| found.contains(address))).await?;

        let (pid, ip) = (pid(&cluster, lost)?, cluster.ip(lost));
        nft(&format!("add element inet lost hosts {{ {ip} }}"))?;
        let begun = Instant::now();
        kill_process(pid, Signal::STOP)?;
        let gone: Vec<Ipv4Addr> = addresses(lost).collect();
        seen(gateway, |found| {
            gone.iter().all(|address| !found.contains(address))
        })
        .await?;
        times.push(begun.elapsed());
        eprintln!(
            "    host {} lost, led by {}: {} ms",
            lost + 1,
            leader + 1,
            begun.elapsed().as_millis()
        );
        let found = ask(gateway)?;
        ensure!(
            all.iter()
                .all(|address| gone.contains(address) || found.contains(address)),
            "the instances of a living host are gone too"
        );

        cluster.kill(lost)?;
        nft(&format!("delete element inet lost hosts {{ {ip} }}"))?;
        cluster.restart(lost)?;
    }
    Ok(times)
}

fn pid(cluster: &Cluster, at: usize) -> Result<Pid> {
    let raw = i32::try_from(cluster.pid(at))?;
    Pid::from_raw(raw).context("no process")
}

/// The address on which a member answers names.
fn gateway(at: usize) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, 1 + u8::try_from(at).unwrap_or(u8::MAX), 1)
}

fn addresses(at: usize) -> impl Iterator<Item = Ipv4Addr> {
    let host = u8::try_from(at).unwrap_or(u8::MAX);
    (0..INSTANCES).map(move |number| Ipv4Addr::new(10, 20, host, 1 + number))
}

fn instance(at: usize, number: u8) -> Instance {
    let address = addresses(at).nth(number.into()).unwrap_or(Ipv4Addr::LOCALHOST);
    Instance::new("tcp", format!("{address}:80"), flynn_api::Meta::new())
}

/// Registers at its host, for ever.
async fn beat(client: DiscoveryClient, instance: Instance) {
    loop {
        let beaten = client.register(SERVICE, &instance).await;
        sleep(match beaten {
            Ok(()) => Duration::from_secs(HEARTBEAT_SECS),
            Err(_) => Duration::from_millis(500),
        })
        .await;
    }
}

/// Gives each host a subnet, whose gateway address it answers on.
async fn open_dns(cluster: &Cluster) -> Result<()> {
    let mut leases = NetworkLeases {
        network: "100.100.0.0/16".into(),
        ..NetworkLeases::default()
    };
    for at in 0..MEMBERS {
        let gateway = gateway(at);
        let added = Command::new("ip")
            .args(["address", "add", &format!("{gateway}/32"), "dev", "lo"])
            .status()?;
        ensure!(added.success(), "cannot add {gateway}");
        let [a, b, c, _] = gateway.octets();
        let lease = SubnetLease {
            subnet: format!("{a}.{b}.{c}.0/24"),
            address: cluster.ip(at),
            renewed_at: None,
        };
        leases.leases.insert(host_id(cluster.ip(at)), lease);
    }
    let client = cluster.client(0)?;
    client
        .change_meta(HOST_SERVICE, |document: &mut Option<NetworkLeases>| {
            *document = Some(leases.clone());
            Ok(())
        })
        .await?;
    client.create_service(SERVICE, &ServiceConfig::default()).await?;
    Ok(())
}

fn nft(rules: &str) -> Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot run nft")?;
    child
        .stdin
        .take()
        .context("no input")?
        .write_all(rules.as_bytes())?;
    ensure!(child.wait()?.success(), "nft refuses {rules:?}");
    Ok(())
}

/// Waits until the name server at `gateway` gives what is wanted.
async fn seen(gateway: Ipv4Addr, wanted: impl Fn(&[Ipv4Addr]) -> bool) -> Result<()> {
    let begun = Instant::now();
    loop {
        let found = ask(gateway);
        if found.as_ref().is_ok_and(|found| wanted(found)) {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            bail!("DNS at {gateway} does not change: {found:?}");
        }
        sleep(LOOK).await;
    }
}

/// The addresses of the service.
fn ask(gateway: Ipv4Addr) -> Result<Vec<Ipv4Addr>> {
    /// A name's pointer, type, class, TTL and length stand before each address.
    const RECORD: usize = 16;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(SocketAddr::from((gateway, 53)))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in [SERVICE, "discoverd"] {
        query.push(u8::try_from(label.len())?);
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    socket.send(&query)?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    let answer = &answer[..length];
    ensure!(length >= query.len() && answer[2] & 2 == 0, "no whole answer");
    let count = usize::from(u16::from_be_bytes([answer[6], answer[7]]));
    let records = answer[query.len()..].chunks_exact(RECORD).take(count);
    Ok(records
        .map(|record| Ipv4Addr::new(record[12], record[13], record[14], record[15]))
        .collect())
}
