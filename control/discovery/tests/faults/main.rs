//! Five hosts with discoverd under load, each a host of the lab with its own network and disk, survive random faults:
//! kills, pauses, power cuts that lose what was not synced, full disks, cut, bad and slow links, votes taken away, alone and
//! together.
//!
//! During it discovery answers from every host that has power, whether or not there is a majority: DNS at the gateway
//! address and reads of what the host has. After it all members have come to the same state, and what clients saw is
//! linearizable: no acknowledged write is lost. Watchers were told of each change once. A run in which a kind of fault did
//! not happen fails.
//!
//! 21 faults, one of each kind, or 200 with `FLYNN_TEST_LONG=1`. The seed is printed, and `SEED=n` draws the same faults;
//! what meets them in the processes is up to the machine.
//!
//! The test binary is also discoverd. There are no jumps of the wall clock: hosts of one machine share it. discoverd
//! measures by the monotonic clock, and knows the other for tokens alone.

mod bed;
mod history;
mod load;
mod nemesis;
mod plan;
mod probe;
mod watches;
mod world;

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Consistency, HOST_SERVICE, Instance, OwnStatus, ServiceConfig, ServiceMeta};
use flynn_api::tls;
use flynn_discovery::Options;
use flynn_lab::{host_address, host_name};
use libtest_mimic::{Arguments, Failed, Trial};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::json;

use crate::bed::{Bed, HOSTS, gateway, hosts};
use crate::nemesis::Nemesis;
use crate::plan::{Fault, rounds};
use crate::probe::{STEADY, Steady};
use crate::world::{Phase, World, register};

/// How long the cluster may take until it is whole.
const PATIENCE: Duration = Duration::from_mins(1);
/// Lines of each discoverd that are shown when the run fails.
const LINES: usize = 12;
/// Who reads and writes at the end.
const LAST: u32 = 99;

fn main() -> ExitCode {
    flynn_lab::reexec();
    tls::install_provider();
    if std::env::var_os(bed::UNDER_TEST).is_some() {
        return discoverd();
    }
    let arguments = Arguments::from_args();
    let skip = obstacle();
    if let Some(why) = &skip {
        eprintln!("skipped: faults of five hosts ({why})");
    }
    let survive = Trial::test("five hosts survive random faults", || {
        survive().map_err(|why| Failed::from(format!("{why:#}")))
    });
    libtest_mimic::run(&arguments, vec![survive.with_ignored_flag(skip.is_some())]).exit_code()
}

fn obstacle() -> Option<String> {
    if let Some(why) = flynn_lab::obstacle() {
        return Some(why.to_owned());
    }
    let slow = nemesis::can_be_slow();
    slow.err()
        .map(|why| format!("the kernel cannot make a link slow: {why:#}"))
}

/// discoverd as the platform runs it, but that snapshots are made often enough to matter here.
fn discoverd() -> ExitCode {
    flynn_api::server::init_logging("discoverd");
    let run = || -> Result<()> {
        let mut options = Options::from_env()?;
        options.init = options.host_id == host_name(1);
        options.timing.snapshot_after = 500;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        runtime.block_on(async { flynn_discovery::run(options, flynn_api::server::shutdown()).await })
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("discoverd cannot go on: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn survive() -> Result<()> {
    let seed = match std::env::var("SEED") {
        Ok(seed) => seed.parse().context("SEED is a number")?,
        Err(_) => rand::random_range(0..1_000_000),
    };
    let long = std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1");
    let count = if long { 200 } else { Fault::ALL.len() };
    eprintln!("SEED={seed}, {count} faults");
    let bed = Bed::start()?;
    let world = World::new(bed.identity.clone());
    let outcome = run(&bed, &world, seed, count);
    outcome.map_err(|why| anyhow::anyhow!("SEED={seed}: {why:#}\n{}\n{}", world.notes(), bed.said(LINES)))
}

fn run(bed: &Bed, world: &World, seed: u64, count: usize) -> Result<()> {
    let steady = bed.at(1, || block_on(found(bed, world)))?;
    // Until there were leases it could not answer at a gateway address.
    hosts().for_each(|host| bed.serves(host, true));
    let mut random = StdRng::seed_from_u64(seed);
    let rounds = rounds(&mut random, count);
    let mut nemesis = Nemesis::new(bed, world, random);
    std::thread::scope(|scope| {
        for host in hosts() {
            let condition = bed.condition(host);
            scope.spawn(move || probe::live(world, host, condition, steady));
        }
        let mut run = || {
            for round in &rounds {
                nemesis.carry_out(round)?;
                if let Some(wrong) = world.all_wrong().first() {
                    bail!("{wrong}");
                }
            }
            world.note("all is mended");
            world.phase.send_replace(Phase::Settle);
            bed.at(1, || block_on(settled(bed, world)))
        };
        let outcome = run().map_err(|why| match world.history.judge() {
            // What is wrong with the history says more than what came of it.
            Err(wrong) => why.context(wrong),
            Ok(()) => why,
        });
        world.phase.send_replace(Phase::Over);
        outcome
    })?;
    bed.all_run_that_should()?;
    if let Some(wrong) = world.all_wrong().first() {
        bail!("{wrong}");
    }
    world.history.judge()?;
    let (resumed, told) = watches::judge(&world.watchers, world.history.values(watches::WATCHED))?;
    let (reads, writes) = world.history.answered();
    eprintln!(
        "{:.0} s; {reads} reads and {writes} writes answered, {} writes unknown",
        world.history.now().as_secs_f64(),
        world.history.unknown()
    );
    for (what, tally) in [
        ("DNS at the gateway", &world.dns),
        ("local reads", &world.reads),
        ("first answers after a start or a pause", &world.starts),
    ] {
        eprintln!(
            "{}: {}, the slowest in {:?}",
            what,
            tally.answered(),
            tally.longest()
        );
    }
    eprintln!("{told} changes told to watchers, who resumed {resumed} times");
    eprintln!("{:?}", nemesis.happened());
    for fault in Fault::ALL {
        ensure!(
            nemesis.happened().contains_key(&fault),
            "{fault:?} did not happen"
        );
    }
    let busy = |count: u64| count > 2 * rounds.len() as u64;
    ensure!(
        resumed > 0
            && busy(told as u64)
            && busy(writes as u64)
            && busy(reads as u64)
            && busy(world.dns.answered())
            && busy(world.reads.answered()),
        "too little was done to say anything"
    );
    Ok(())
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

/// Asks again until there is an answer.
async fn eventually<T>(what: &str, ask: impl AsyncFn() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(why) if began.elapsed() > PATIENCE => {
                return Err(why).with_context(|| format!("waited {} s for {what}", PATIENCE.as_secs()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Waits for five voters, and makes what there is from the beginning.
async fn found(bed: &Bed, world: &World) -> Result<Steady> {
    let client = bed.client(1)?;
    eventually("five voters", async || {
        let peers = client.peers().await?;
        let voters = peers.iter().filter(|peer| peer.voter).count();
        ensure!(voters == usize::from(HOSTS), "{voters} vote");
        Ok(())
    })
    .await?;
    for service in [HOST_SERVICE.to_owned(), STEADY.to_owned()]
        .into_iter()
        .chain((0..world.history.registers()).map(register))
    {
        client.ensure_service(&service, &ServiceConfig::default()).await?;
    }
    let leases: serde_json::Map<String, serde_json::Value> = hosts()
        .map(|host| {
            let subnet = format!("100.100.{host}.0/24");
            (
                host_name(host),
                json!({ "subnet": subnet, "address": host_address(host) }),
            )
        })
        .collect();
    let data = json!({ "network": "100.100.0.0/16", "leases": leases });
    set(&client, HOST_SERVICE, data).await?;
    let data = rand::random_range(0..1_000_000);
    set(&client, STEADY, json!(data)).await?;
    for host in hosts() {
        let addr = format!("{}:80", host_address(host));
        client
            .register(STEADY, &Instance::new("http", addr, flynn_api::Meta::new()))
            .await?;
    }
    let address = eventually("a virtual address", async || {
        let addresses = client.service(STEADY).await?.addresses;
        Ok(addresses.context("it has none yet")?.ipv4)
    })
    .await?;
    for host in hosts() {
        let client = bed.client(host)?.consistency(Consistency::Local);
        eventually("the beginning at every host", async || {
            let there = client.service(STEADY).await?.addresses.context("no address")?;
            ensure!(
                IpAddr::V4(there.ipv4) == IpAddr::V4(address)
                    && client.meta(STEADY).await?.data == json!(data)
            );
            Ok(())
        })
        .await?;
    }
    world.note(&format!("five vote; the first gateway is {}", gateway(1)));
    Ok(Steady { address, data })
}

async fn set(client: &DiscoveryClient, service: &str, data: serde_json::Value) -> Result<()> {
    let meta = ServiceMeta {
        data,
        index: 0,
        leader_id: None,
    };
    client.set_meta(service, &meta).await?;
    Ok(())
}

/// When all is mended: every host writes and reads again, and all come to the same state.
async fn settled(bed: &Bed, world: &World) -> Result<()> {
    let clients: Vec<DiscoveryClient> = hosts().map(|host| bed.client(host)).collect::<Result<_>>()?;
    for number in 0..world.history.registers() {
        for client in &clients {
            eventually("every host to read and write", async || {
                let failed = |_| anyhow::anyhow!("it cannot");
                let seen = load::read(world, LAST, client, number).await.map_err(failed)?;
                let there = load::swap(world, LAST, client, number, seen)
                    .await
                    .map_err(failed)?;
                there
                    .map(drop)
                    .with_context(|| format!("key-{number} was at {seen:?}, and is no more"))
            })
            .await?;
        }
        load::read(world, LAST, &clients[0], number)
            .await
            .map_err(|_| anyhow::anyhow!("key-{number} cannot be read at the end"))?;
    }
    eventually("one state at all hosts", async || {
        let mut states = Vec::new();
        for client in &clients {
            states.push(state(client).await?);
        }
        let (status, first) = &states[0];
        for (other, what) in &states {
            ensure!(
                other.applied == status.applied && other.last_log == status.applied,
                "one is at {}, another at {} of {}",
                status.applied,
                other.applied,
                other.last_log
            );
            ensure!(what == first, "{what}\nis not\n{first}");
        }
        let leaders = states
            .iter()
            .filter(|(status, _)| status.state == "leader")
            .count();
        ensure!(leaders == 1, "{leaders} lead");
        let voters = clients[0].peers().await?.iter().filter(|peer| peer.voter).count();
        ensure!(voters == usize::from(HOSTS), "{voters} vote");
        Ok(())
    })
    .await
}

/// All that a host says of the registry, by its own copy.
async fn state(client: &DiscoveryClient) -> Result<(OwnStatus, String)> {
    let local = client.clone().consistency(Consistency::Local);
    let mut text = String::new();
    for service in local.services().await? {
        let (info, meta) = (local.service(&service).await?, local.find_meta(&service).await?);
        let instances = local.instances(&service).await?;
        text.push_str(&format!("{service}: {info:?} {meta:?} {instances:?}\n"));
    }
    Ok((client.own_status().await?, text))
}
