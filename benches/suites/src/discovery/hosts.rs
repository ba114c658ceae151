//! A hundred hosts with ten thousand instances that all say again and again that they live: what it costs the leader.
//!
//! Three members are processes of their own, the others share one, and memory in place of a disk, which could not sync for
//! a hundred; the figures are those of the leader's process. Each instance speaks to the member of its host, as supervisors
//! do.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flynn_api::Meta;
use flynn_api::discovery::{HEARTBEAT_SECS, Instance, MemberStatus, ServiceConfig};
use hyper::Method;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use uuid::Uuid;

use super::cluster::{Cluster, Kind, MEMBERS};
use super::wire::Http2;
use super::{alone, disk};
use crate::row::{Row, Subject};
use crate::suites::Thoroughness;

const HOSTS: usize = 100;
const OF_EACH: usize = 100;
const SERVICES: usize = 500;
/// How long it may take until everybody is there.
const PATIENCE: Duration = Duration::from_mins(3);
/// Until what was taken up at the beginning is given back.
const SETTLE: Duration = Duration::from_secs(10);

const CPU: Subject = alone("leader's CPU, 10,000 instances on 100 hosts", "% of a core", 10.0);
const MEMORY: Subject = alone("memory of the registry with them", "MB", 50.0);

/// Takes both rows.
pub(super) async fn measured(thoroughness: Thoroughness) -> [Row; 2] {
    let time = Duration::from_secs(thoroughness.pick(15, 60));
    match costs(time).await {
        Ok((cpu, memory)) => [CPU.figure(cpu, 1), MEMORY.figure(memory, 1)],
        Err(error) => {
            let why = format!("{error:#}");
            [CPU.missing(&why), MEMORY.missing(why)]
        }
    }
}

/// The leader's CPU in percent of a core over `time`, and its memory in MB beyond that of an empty registry.
async fn costs(time: Duration) -> Result<(f64, f64)> {
    let (dir, memory) = (disk()?, tempfile::tempdir_in("/dev/shm")?);
    let mut cluster = Cluster::start(Kind::Ours, dir.path()).await?;
    let mut addrs: Vec<_> = (0..MEMBERS).map(|at| cluster.addr(at)).collect();
    addrs.extend(cluster.add_crowd(u32::try_from(HOSTS - MEMBERS)?, memory.path())?);
    let client = cluster.client(0)?;
    settled(&client, |members| members.len() == HOSTS).await?;
    for number in 0..SERVICES {
        client
            .create_service(&service(number), &ServiceConfig::default())
            .await?;
    }
    let leader = leader(&cluster).await?;
    sleep(SETTLE).await;
    let empty = process(cluster.pid(leader))?;
    let begun = Instant::now();
    sleep(time / 3).await;
    let idle = process(cluster.pid(leader))?;
    eprintln!(
        "    {HOSTS} hosts without instances: {:.1} % of a core, {:.1} MB",
        100.0 * (idle.cpu - empty.cpu) / begun.elapsed().as_secs_f64(),
        idle.memory
    );

    let begun = Instant::now();
    let (registered, mut done) = tokio::sync::mpsc::channel(HOSTS);
    let mut beating = JoinSet::new();
    // All hosts at once, as after a power cut.
    for (host, addr) in addrs.into_iter().enumerate() {
        let connection = Http2::open(&cluster.identity, addr).await?;
        beating.spawn(beat(connection, host, registered.clone()));
    }
    for _ in 0..HOSTS * OF_EACH {
        tokio::select! {
            _ = done.recv() => {}
            Some(ended) = beating.join_next() => {
                ended?.context("an instance cannot be registered")?;
            }
        }
    }
    eprintln!("    all registered within {:.1} s", begun.elapsed().as_secs_f64());
    settled(&client, |members| members.len() == HOSTS).await?;
    sleep(SETTLE).await;
    let (before, begun) = (process(cluster.pid(leader))?, Instant::now());
    sleep(time).await;
    let (after, elapsed) = (process(cluster.pid(leader))?, begun.elapsed());
    if let Some(ended) = beating.try_join_next() {
        ended??;
    }
    ensure!(leader == self::leader(&cluster).await?, "another leads now");
    let mut there = 0;
    for number in 0..SERVICES {
        there += client.instances(&service(number)).await?.len();
    }
    ensure!(there == HOSTS * OF_EACH, "{there} instances are there");
    let cpu = 100.0 * (after.cpu - before.cpu) / elapsed.as_secs_f64();
    eprintln!(
        "    {there} instances on {HOSTS} hosts: {cpu:.1} % of a core, {:.1} MB in all, {:.1} MB when empty",
        after.memory, empty.memory
    );
    Ok((cpu, after.memory - empty.memory))
}

fn service(number: usize) -> String {
    format!("service-{number}")
}

/// Who leads; it must have a process of its own.
async fn leader(cluster: &Cluster) -> Result<usize> {
    let peers = cluster.client(0)?.peers().await?;
    let leader = peers
        .into_iter()
        .find(|peer| peer.leader)
        .context("nobody leads")?;
    let at = (0..MEMBERS).find(|at| cluster.addr(*at).to_string() == leader.addr);
    at.context("one of many in a process leads")
}

/// Waits until that is so, and all members are as far as the leader.
async fn settled(
    client: &flynn_api::client::discovery::DiscoveryClient,
    wanted: impl Fn(&[MemberStatus]) -> bool,
) -> Result<()> {
    let begun = Instant::now();
    loop {
        let members = client.members().await;
        if let Ok(members) = &members
            && wanted(members)
            && members
                .iter()
                .all(|member| member.lag.is_some_and(|lag| lag < 100))
        {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            let lags = members.map(|members| members.iter().map(|member| member.lag).collect::<Vec<_>>());
            bail!("not all members are there, or as far as the leader: {lags:?}");
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Has all instances of a host say that they live, each for itself as supervisors do, for ever; tells when each has done so
/// once.
async fn beat(connection: Http2, host: usize, registered: tokio::sync::mpsc::Sender<()>) -> Result<()> {
    let mut beating = JoinSet::new();
    for number in 0..OF_EACH {
        let (mut connection, registered) = (connection.clone(), registered.clone());
        beating.spawn(async move {
            let instance = instance(host, number);
            let path = format!(
                "/services/{}/instances/{}",
                service((host * OF_EACH + number) % SERVICES),
                instance.id
            );
            let body = serde_json::to_string(&instance)?;
            say(&mut connection, &path, &body).await?;
            registered.send(()).await?;
            let mut tick = interval(Duration::from_secs(HEARTBEAT_SECS));
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                say(&mut connection, &path, &body).await?;
            }
        });
    }
    match beating.join_next().await {
        Some(ended) => ended?,
        None => Ok(()),
    }
}

/// Says that an instance lives; again where the answer asks for that, as supervisors do.
async fn say(connection: &mut Http2, path: &str, body: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let said = connection.call(Method::PUT, path, body.to_owned().into()).await;
        let Err(error) = said else { return Ok(()) };
        let again = error
            .downcast_ref::<flynn_api::Error>()
            .is_some_and(|said| said.retry);
        if !again || begun.elapsed() > PATIENCE {
            return Err(error);
        }
        eprintln!("    once more: {error:#}");
        sleep(Duration::from_millis(200)).await;
    }
}

/// An instance with the labels that the platform gives to each.
fn instance(host: usize, number: usize) -> Instance {
    let id = || Uuid::new_v4().to_string();
    let meta = Meta::from([
        ("FLYNN_APP_ID".to_owned(), id()),
        ("FLYNN_APP_NAME".to_owned(), format!("app-{number}")),
        ("FLYNN_RELEASE_ID".to_owned(), id()),
        ("FLYNN_PROCESS_TYPE".to_owned(), "web".to_owned()),
        ("FLYNN_JOB_ID".to_owned(), format!("host{host}-{}", id())),
        ("FLYNN_HOST_ID".to_owned(), format!("host{host}")),
    ]);
    Instance::new("http", format!("100.100.{}.{}:8080", host + 1, number + 2), meta)
}

/// What a process has had and has.
struct Process {
    /// Seconds.
    cpu: f64,
    /// PSS, in MB.
    memory: f64,
}

fn process(pid: u32) -> Result<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .context("not a stat")?
        .1
        .split_whitespace()
        .collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("no such field")?.parse()?) };
    #[expect(clippy::cast_precision_loss, reason = "it is 100")]
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let pss = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .and_then(|line| line.split_whitespace().next())
        .context("no PSS")?;
    Ok(Process {
        cpu: (ticks(11)? + ticks(12)?) / per_second,
        memory: pss.parse::<f64>()? * 1024.0 / 1e6,
    })
}
