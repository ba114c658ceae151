//! Floating addresses, and hosts that are lost, under connections through a TCP route.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_api::host::HostStatus;
use flynn_cluster_tests::connections::Seen;
use flynn_cluster_tests::{Platform, until};
use serde::Deserialize;

use crate::containers::{Container, ask, spread};
use crate::fixture::{Cluster, MEMBERS, STRANGER};
use crate::join::flynn_host;
use crate::routes::{APP, Held, addresses, doors, reach, scaled};

const LIMIT: Duration = Duration::from_mins(2);

/// The last part of the first floating address that is tried; the others follow.
const FIRST: u8 = 100;

/// How many of each family are tried at a time: it follows from address and host who holds one.
const TRIED: u8 = 5;

/// How often: the host that is told of the first has taken them before the others know that there are any.
const TIMES: u8 = 4;

#[derive(Deserialize)]
struct Line {
    address: String,
    hosts: Vec<String>,
}

/// Has two addresses float, one of each family, both held by the same host, which is not the first: who that is, and the
/// addresses with the lengths of their networks.
fn float(platform: &Platform) -> Result<(u8, [String; 2])> {
    let mut numbers = BTreeMap::new();
    for host in MEMBERS {
        numbers.insert(ask::<HostStatus>(platform, host, "/host/status")?.id, host);
    }
    let mut families: [Vec<String>; 2] = Default::default();
    let (host, kept) = loop {
        let next = FIRST + u8::try_from(families[0].len())?;
        for last in next..next + TRIED {
            families[0].push(format!("192.0.2.{last}/24"));
            families[1].push(format!("2001:db8::{last}/64"));
        }
        for family in &families {
            for address in &family[family.len() - usize::from(TRIED)..] {
                flynn_host(platform, 1, &["floating", "add", address])?;
            }
        }
        let holders = until(LIMIT, "each address is held by one host", || {
            listed(platform, &numbers)
        })?;
        let chosen = MEMBERS[1..].iter().rev().find_map(|host| {
            let of_host = |family: &Vec<String>| {
                let found = family.iter().find(|address| holders.get(*address) == Some(host));
                found.cloned()
            };
            Some((*host, [of_host(&families[0])?, of_host(&families[1])?]))
        });
        if let Some(chosen) = chosen {
            break chosen;
        }
        let tried = families[0].len() / usize::from(TRIED);
        ensure!(
            tried < usize::from(TIMES),
            "the first host holds all: {holders:?}"
        );
    };
    for address in families
        .iter()
        .flatten()
        .filter(|address| !kept.contains(address))
    {
        flynn_host(platform, 1, &["floating", "remove", address])?;
    }
    eprintln!("    host {host} holds {kept:?}");
    Ok((host, kept))
}

/// Who holds each address, if each has one holder.
fn listed(platform: &Platform, numbers: &BTreeMap<String, u8>) -> Result<Option<BTreeMap<String, u8>>> {
    let lines = flynn_host(platform, 1, &["floating", "list", "--json"])?;
    let lines: Vec<Line> = serde_json::from_str(&lines)?;
    let mut holders = BTreeMap::new();
    for line in lines {
        let [host] = &line.hosts[..] else { return Ok(None) };
        let host = numbers.get(host).with_context(|| format!("who is {host}?"))?;
        holders.insert(line.address, *host);
    }
    Ok(Some(holders))
}

fn sink(platform: &Platform, floating: &[String]) -> Result<()> {
    for address in floating {
        flynn_host(platform, 1, &["floating", "remove", address])?;
    }
    Ok(())
}

fn bare(address: &str) -> Result<IpAddr> {
    Ok(address.split('/').next().unwrap_or_default().parse()?)
}

fn floating_doors(floating: &[String], port: u16) -> Result<Vec<SocketAddr>> {
    let door = |address: &String| Ok(SocketAddr::new(bare(address)?, port));
    floating.iter().map(door).collect()
}

/// Which of these hosts have each of the addresses at their interface.
fn holders(platform: &Platform, hosts: &[u8], floating: &[String]) -> Result<Vec<Vec<u8>>> {
    let mut holders = vec![Vec::new(); floating.len()];
    for &host in hosts {
        let shown = platform
            .lab()
            .host(host)
            .run("ip", ["-o", "address", "show", "dev", "eth0"])?;
        for (address, holders) in floating.iter().zip(&mut holders) {
            if shown.contains(&format!(" {address} ")) {
                holders.push(host);
            }
        }
    }
    Ok(holders)
}

/// Waits until one of these hosts alone holds each of the addresses: which.
fn held_by_one(platform: &Platform, hosts: &[u8], floating: &[String]) -> Result<Vec<u8>> {
    until(
        LIMIT,
        &format!("one of the hosts {hosts:?} holds each address"),
        || {
            let holders = holders(platform, hosts, floating)?;
            ensure!(holders.iter().all(|hosts| hosts.len() == 1), "{holders:?} do");
            Ok(Some(holders.concat()))
        },
    )
}

/// For TCP and UDP: their ids.
fn add_routes(platform: &Platform, port: u16) -> Result<[String; 2]> {
    let add = |kind| platform.run(["-a", APP, "route", "add", kind, "--port", &port.to_string()]);
    Ok([add("tcp")?, add("udp")?].map(|id| id.trim().to_owned()))
}

fn remove_routes(platform: &Platform, routes: &[String]) -> Result<()> {
    for id in routes {
        platform.run(["-a", APP, "route", "remove", id])?;
    }
    Ok(())
}

/// The addresses of the containers on a host.
fn of_host(containers: &[Container], host: u8) -> BTreeSet<Ipv4Addr> {
    let there = containers.iter().filter(|container| container.host == host);
    there.map(|container| container.address).collect()
}

fn longest<'s>(seen: impl Iterator<Item = &'s Seen>) -> u64 {
    seen.map(|seen| seen.longest_ms).max().unwrap_or(0)
}

/// What happens to the holder.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Killed,
    Paused,
    CutOff,
}

impl Fault {
    fn happens(self, platform: &Platform, host: u8) -> Result<()> {
        let lab = platform.lab();
        match self {
            Self::Killed => lab.host(host).kill(platform.daemon()),
            Self::Paused => lab.host(host).pause(platform.daemon()),
            Self::CutOff => others(host).try_for_each(|other| lab.cut(host, other)),
        }
    }

    fn passes(self, platform: &Platform, host: u8) -> Result<()> {
        let lab = platform.lab();
        match self {
            Self::Killed => lab.host(host).start(platform.daemon()),
            Self::Paused => lab.host(host).resume(platform.daemon()),
            Self::CutOff => others(host).try_for_each(|other| lab.mend(host, other)),
        }
    }
}

/// Everybody else, the client as well.
fn others(host: u8) -> impl Iterator<Item = u8> {
    let all = MEMBERS.into_iter().chain([STRANGER]);
    all.filter(move |other| *other != host)
}

pub(crate) fn moves(cluster: &mut Cluster) -> Result<()> {
    const PORT: u16 = 3200;
    let (platform, containers) = scaled(cluster, 6)?;
    let routes = add_routes(platform, PORT)?;
    let (mut holder, floating) = float(platform)?;
    let to = floating_doors(&floating, PORT)?;
    reach(platform, &to, &addresses(&containers))?;
    for fault in [Fault::Killed, Fault::Paused, Fault::CutOff] {
        let rest: Vec<u8> = MEMBERS.into_iter().filter(|host| *host != holder).collect();
        let mut held = Held::open(platform, 20, 12, &to)?;
        held.whole()?;
        fault.happens(platform, holder)?;
        let next = held_by_one(platform, &rest, &floating)?;
        // Those whose containers can be reached.
        let lost = match fault {
            Fault::CutOff => of_host(&containers, holder),
            Fault::Killed | Fault::Paused => BTreeSet::new(),
        };
        if lost.is_empty() {
            let seen = held.whole()?;
            eprintln!(
                "    {fault:?}: at most {} ms without an answer",
                longest(seen.iter())
            );
        }
        fault.passes(platform, holder)?;
        let now = held_by_one(platform, &MEMBERS, &floating)?;
        // Each fault follows the last at once, while a host that was paused takes nothing yet: it is there for the others
        // to be a majority. That is all they need for what they have taken to stay with them, however short the cut was,
        // and whatever the one that was cut off took for its own meanwhile.
        ensure!(
            now == next,
            "{fault:?} of host {holder}: they went to {next:?}, and to {now:?} when it came back"
        );
        let seen = held.whole()?;
        let others = seen.iter().filter(|seen| !lost.contains(&seen.backend));
        eprintln!(
            "    {fault:?}: from host {holder} to {now:?}; at most {} ms without an answer",
            longest(others)
        );
        holder = now[0];
    }
    sink(platform, &floating)?;
    remove_routes(platform, &routes)?;
    until(LIMIT, "nobody holds them any more", || {
        let holders = holders(platform, &MEMBERS, &floating)?;
        Ok(holders.concat().is_empty().then_some(()))
    })
}

pub(crate) fn host_lost(cluster: &mut Cluster) -> Result<()> {
    const PORT: u16 = 3300;
    let long = std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1");
    let wanted = if long { 500 } else { 100 };
    let (platform, containers) = scaled(cluster, 6)?;
    let routes = add_routes(platform, PORT)?;
    let (lost, floating) = float(platform)?;
    let rest: Vec<u8> = MEMBERS.into_iter().filter(|host| *host != lost).collect();
    let mut to = doors(platform, &rest, PORT);
    let moving = floating_doors(&floating, PORT)?;
    to.extend(&moving);
    reach(platform, &to, &addresses(&containers))?;

    // One half speaks all the time, the other not before it is all over.
    let each = (wanted / 2_usize).div_ceil(to.len());
    let mut busy = Held::open(platform, 200, each, &to)?;
    let mut idle = Held::open(platform, 0, each, &to)?;
    let before = [busy.whole()?, idle.whole()?].concat();
    let there = of_host(&containers, lost);
    let doomed = |seen: &Seen| there.contains(&seen.backend);
    let carried = before
        .iter()
        .filter(|seen| !doomed(seen) && moving.contains(&seen.to));
    let carried = carried.count();
    let breaking = before.iter().filter(|seen| doomed(seen)).count();
    ensure!(carried > 0 && breaking > 0, "nothing would be seen: {before:?}");

    platform.lab().host(lost).power_cut()?;
    ensure!(
        platform.lab().host(lost).status()?.init.is_none(),
        "the host is still there"
    );
    let left = spread(platform, APP, containers.len(), &rest)?;
    reach(platform, &to, &addresses(&left))?;
    let after = [busy.ask()?, idle.ask()?].concat();
    ensure!(
        after.len() == before.len(),
        "{} connections are left",
        after.len()
    );
    let mut wrong = Vec::new();
    for (before, after) in before.iter().zip(&after) {
        let goes_on = after.broken.is_none() && after.echoed > before.echoed;
        if goes_on == doomed(before) {
            wrong.push(after);
        }
    }
    let survivors = after.iter().filter(|seen| seen.broken.is_none());
    eprintln!(
        "    {} connections: {breaking} to containers of the lost host {lost}, {carried} of the others came by it; {} \
         fared as they should not; at most {} ms without an answer",
        after.len(),
        wrong.len(),
        longest(survivors)
    );
    ensure!(wrong.is_empty(), "{wrong:#?}");

    // It comes back, and nobody who is left notices.
    platform.lab().host(lost).boot()?;
    until(LIMIT, "the host is back in the network", || {
        Ok(ask::<HostStatus>(platform, lost, "/host/status")?.subnet)
    })?;
    let now = held_by_one(platform, &MEMBERS, &floating)?;
    ensure!(
        !now.contains(&lost),
        "the host that came back has taken an address"
    );
    // Its balancer is there as well, and takes part.
    reach(platform, &doors(platform, &[lost], PORT), &addresses(&left))?;
    let last = [busy.ask()?, idle.ask()?].concat();
    let broken = |seen: &[Seen]| seen.iter().filter(|seen| seen.broken.is_some()).count();
    ensure!(
        broken(&last) == broken(&after),
        "{} connections broke when the host came back: {:?}",
        broken(&last) - broken(&after),
        last.iter()
            .zip(&after)
            .find(|(last, after)| last.broken != after.broken)
    );
    sink(platform, &floating)?;
    remove_routes(platform, &routes)
}
