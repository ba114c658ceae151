//! What goes on at each host while it has power: clients, an instance that says that it lives, and somebody who asks
//! all the time and must always be answered.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use flynn_api::Meta;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Consistency, Instance, PORT};
use flynn_lab::{host_address, host_name};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::net::UdpSocket;
use tokio::sync::watch;

use crate::bed::{self, Condition, gateway, hosts};
use crate::world::{Phase, Tally, World};
use crate::{load, watches};

/// A service that is there from the beginning to the end.
pub(crate) const STEADY: &str = "steady";
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(50);
/// An answer that takes so long is worth a note.
const LONG: Duration = Duration::from_secs(1);
/// How many such pauses an answer may take: counted, so that whoever asks does not blame others when it gets no CPU
/// itself.
const PATIENCE: u32 = 200;
/// Whoever was started or woken answers by then.
const START: Duration = Duration::from_secs(20);
/// Between two signs of life of an instance.
const BEAT: Duration = Duration::from_millis(500);

/// What must be answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steady {
    /// The service's virtual address.
    pub(crate) address: Ipv4Addr,
    /// What its metadata are.
    pub(crate) data: u64,
}

/// Lives at a host as often as it has power, until the run is over.
pub(crate) fn live(world: &World, host: u8, mut condition: watch::Receiver<Condition>, steady: Steady) {
    let mut run = || -> Result<()> {
        let waiting = runtime()?;
        loop {
            let mut phase = world.phase.subscribe();
            let init = waiting.block_on(async {
                tokio::select! {
                    on = condition.wait_for(|now| now.init.is_some()) => on.ok().and_then(|now| now.init),
                    _ = phase.wait_for(|phase| *phase == Phase::Over) => None,
                }
            });
            let Some(init) = init else { return Ok(()) };
            let condition = condition.clone();
            // Its network may be gone again.
            let _ = bed::within(init, || {
                runtime()?.block_on(async {
                    let mut power = condition.clone();
                    tokio::select! {
                        lived = all(world, host, condition, steady) => lived,
                        _ = power.wait_for(|now| now.init != Some(init)) => Ok(()),
                        _ = phase.wait_for(|phase| *phase == Phase::Over) => Ok(()),
                    }
                })
            })
            .inspect_err(|why| world.note(&format!("{}: {why:#}", host_name(host))));
        }
    };
    if let Err(why) = run() {
        world.wrong(&format!("nobody is at {}: {why:#}", host_name(host)));
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

async fn all(world: &World, host: u8, condition: watch::Receiver<Condition>, steady: Steady) -> Result<()> {
    let own = bed::client(&world.identity, host)?;
    let mut members = vec![own.clone()];
    for other in hosts().filter(|other| *other != host) {
        members.push(bed::client(&world.identity, other)?);
    }
    let id = |number: u32| u32::from(host) * 10 + number;
    let own = std::slice::from_ref(&own);
    tokio::join!(
        load::client(world, id(0), own),
        load::client(world, id(1), own),
        load::client(world, id(2), &members),
        watches::watch(world, &world.watchers[usize::from(host - 1)], &members),
        instance(host),
        names(world, host, condition.clone(), steady),
        reads(world, host, condition, steady),
    );
    Ok(())
}

/// A client of the plain API at the gateway.
fn at_gateway(host: u8) -> Result<DiscoveryClient> {
    let http = Http::new(&format!("http://{}:{PORT}", gateway(host)))?;
    // Whoever calls counts by itself.
    Ok(DiscoveryClient::new(http.timeout(Duration::from_hours(1))))
}

/// An instance of the steady service, which says every now and then that it lives.
async fn instance(host: u8) {
    let Ok(client) = at_gateway(host) else { return };
    let instance = Instance::new("http", format!("{}:80", host_address(host)), Meta::new());
    loop {
        // It fails without a majority, and the next one does not.
        let _ = tokio::time::timeout(START, client.register(STEADY, &instance)).await;
        tokio::time::sleep(BEAT).await;
    }
}

/// Asks DNS at the gateway address, over UDP.
async fn names(world: &World, host: u8, condition: watch::Receiver<Condition>, steady: Steady) {
    let mut id = 0;
    always(world, host, "DNS", &world.dns, condition, async || {
        id += 2;
        let address = ask(host, id, &format!("vip.{STEADY}.discoverd.")).await?;
        ensure!(
            address == HashSet::from([IpAddr::V4(steady.address)]),
            "the virtual address is {address:?}, which was {}",
            steady.address
        );
        let known: HashSet<IpAddr> = hosts().map(|host| IpAddr::V4(host_address(host))).collect();
        let instances = ask(host, id + 1, &format!("{STEADY}.discoverd.")).await?;
        ensure!(instances.is_subset(&known), "instances are at {instances:?}");
        Ok(())
    })
    .await;
}

/// One question in one datagram: it is not asked again.
async fn ask(host: u8, id: u16, name: &str) -> Result<HashSet<IpAddr>> {
    let server = SocketAddr::from((gateway(host), 53));
    let socket = UdpSocket::bind((gateway(host), 0)).await?;
    socket.connect(server).await?;
    let mut query = Message::query();
    query.metadata.id = id;
    query.add_query(Query::query(Name::from_str(name)?, RecordType::A));
    socket.send(&query.to_vec()?).await?;
    let mut buffer = [0; 1500];
    let answer = loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = Message::from_vec(&buffer[..length])?;
        if answer.metadata.id == id {
            break answer;
        }
    };
    let code = answer.metadata.response_code;
    ensure!(code == ResponseCode::NoError, "{name} is answered by {code}");
    let addresses = answer.answers.iter().filter_map(|record| match &record.data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        _ => None,
    });
    Ok(addresses.collect())
}

/// Reads what this host has.
async fn reads(world: &World, host: u8, condition: watch::Receiver<Condition>, steady: Steady) {
    let Ok(client) = at_gateway(host) else { return };
    let client = client.consistency(Consistency::Local);
    always(world, host, "a local read", &world.reads, condition, async || {
        let meta = client.meta(STEADY).await?;
        ensure!(
            meta.data.as_u64() == Some(steady.data),
            "the metadata are {}",
            meta.data
        );
        client.instances(STEADY).await.context("instances")?;
        Ok(())
    })
    .await;
}

/// Asks for as long as the host has power. Once discoverd has answered after its start, it answers until it is made to
/// stop.
async fn always(
    world: &World,
    host: u8,
    what: &str,
    tally: &Tally,
    mut condition: watch::Receiver<Condition>,
    mut ask: impl AsyncFnMut() -> Result<()>,
) {
    let mut answered_in = None;
    loop {
        tokio::time::sleep(PAUSE).await;
        let now = *condition.borrow_and_update();
        if !now.serves {
            continue;
        }
        let began = Instant::now();
        let answer = tokio::select! {
            biased;
            _ = condition.changed() => continue,
            answer = ask() => answer,
            () = patience() => Err(anyhow!("no answer in {:?}", began.elapsed())),
        };
        let Err(why) = answer else {
            if began.elapsed() > LONG {
                world.note(&format!(
                    "{what} took {:?} at {}",
                    began.elapsed(),
                    host_name(host)
                ));
            }
            tally.add(began.elapsed());
            if answered_in.replace(now.since) != Some(now.since) {
                world.starts.add(now.since.elapsed());
            }
            continue;
        };
        if *condition.borrow() != now {
            continue;
        }
        if answered_in == Some(now.since) {
            world.wrong(&format!("{what} has failed at {}: {why:#}", host_name(host)));
        } else if now.since.elapsed() > START {
            let since = now.since.elapsed().as_secs();
            world.wrong(&format!(
                "{what} does not come up at {} in {since} s: {why}",
                host_name(host)
            ));
        }
    }
}

async fn patience() {
    for _ in 0..PATIENCE {
        tokio::time::sleep(PAUSE).await;
    }
}
