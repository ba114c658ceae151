//! The suite `discovery`: discoverd's registry beside etcd, three members each, on one disk, which both sync; then ours
//! alone: watchers ([`watchers`]), members and hosts that are killed ([`kills`]), many hosts with many instances ([`hosts`]).
//!
//! Members are processes on the loopback device of a namespace made here, with mutual TLS everywhere, and share the
//! machine's CPUs with the load: what is compared is what one operation costs in all. Clients are spread over the
//! members; the first is at the leader. A write of ours is a compare-and-swap, etcd's is a put.

mod client;
mod cluster;
mod hosts;
mod kills;
mod load;
mod watchers;
mod wire;

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::thread::UnshareFlags;

use self::cluster::{Cluster, Kind};
use self::load::{Deed, Load, Sample};
use crate::row::{Goal, Row, Subject};
use crate::suites::{Only, Thoroughness};

const fn beside_etcd(name: &'static str, unit: &'static str, goal: Goal) -> Subject {
    Subject {
        suite: "discovery",
        name,
        unit,
        peer: Some("etcd"),
        goal,
    }
}

/// What is wanted of ours alone.
const fn alone(name: &'static str, unit: &'static str, most: f64) -> Subject {
    Subject {
        suite: "discovery",
        name,
        unit,
        peer: None,
        goal: Goal::AtMost(most),
    }
}

/// Clients, and the rows of what they do.
const LOADS: [(usize, [Subject; 2], Subject); 3] = [
    (
        1,
        [
            beside_etcd("writes, 1 client", "1/s", Goal::RatioAtLeast(1.1)),
            beside_etcd("  99 of 100 within", "ms", Goal::RatioAtMost(1.0)),
        ],
        beside_etcd("linearizable reads, 1 client", "1/s", Goal::RatioAtLeast(2.0)),
    ),
    (
        64,
        [
            beside_etcd("writes, 64 clients", "1/s", Goal::RatioAtLeast(2.0)),
            beside_etcd("  99 of 100 within", "ms", Goal::RatioAtMost(1.0)),
        ],
        beside_etcd("linearizable reads, 64 clients", "1/s", Goal::RatioAtLeast(2.0)),
    ),
    (
        512,
        [
            beside_etcd("writes, 512 clients", "1/s", Goal::RatioAtLeast(2.0)),
            beside_etcd("  99 of 100 within", "ms", Goal::RatioAtMost(1.0)),
        ],
        beside_etcd("linearizable reads, 512 clients", "1/s", Goal::RatioAtLeast(2.0)),
    ),
];

/// Takes all rows.
pub(crate) fn run(thoroughness: Thoroughness, only: Only<'_>) -> Result<Vec<Row>> {
    let only = only.0.map(str::to_owned);
    thread::spawn(move || {
        flynn_lab::unshare(UnshareFlags::NEWNET).context("cannot make a namespace; this needs root")?;
        let up = std::process::Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()?;
        ensure!(up.success(), "cannot bring the loopback device up");
        flynn_api::tls::install_provider();
        // Its threads are of this namespace as well.
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?
            .block_on(measured(thoroughness, Only(only.as_deref())))
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the benchmark's thread has panicked"))?
}

/// A directory on a real disk: in memory, syncing costs nothing.
pub(crate) fn disk() -> Result<tempfile::TempDir> {
    const TMPFS: i64 = 0x0102_1994;
    let dir = match std::env::var_os("FLYNN_TARGET") {
        Some(target) => tempfile::tempdir_in(target)?,
        None => tempfile::tempdir()?,
    };
    let kind = rustix::fs::statfs(dir.path())?.f_type;
    ensure!(kind != TMPFS, "{} is in memory", dir.path().display());
    Ok(dir)
}

async fn measured(thoroughness: Thoroughness, only: Only<'_>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    if only.takes("etcd") {
        rows.extend(beside_peer(thoroughness).await?);
    }
    if only.takes("watchers") {
        rows.push(watchers::measured(thoroughness).await);
    }
    if only.takes("kills") {
        rows.extend(kills::measured(thoroughness).await);
    }
    if only.takes("hosts") {
        rows.extend(hosts::measured(thoroughness).await);
    }
    Ok(rows)
}

async fn beside_peer(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let dir = disk()?;
    let mut rows = Vec::new();
    let mut clusters = Vec::new();
    for kind in [Kind::Ours, Kind::Etcd] {
        clusters.push(Cluster::start(kind, dir.path()).await?);
    }
    let time = Duration::from_millis(thoroughness.pick(1_500, 5_000));
    let rounds = thoroughness.pick(3, 9);
    for (clients, [write_rate, write_p99], read_rate) in LOADS {
        let mut loads = Vec::new();
        for cluster in &clusters {
            loads.push(Load::of(cluster, clients).await?);
        }
        for deed in [Deed::Write, Deed::Read] {
            let mut samples: [Vec<Sample>; 2] = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                for ((load, samples), cluster) in loads.iter_mut().zip(&mut samples).zip(&clusters) {
                    let sample = load.run(deed, time).await?;
                    eprintln!(
                        "    {:?} {clients:>3} clients {} {:>8.0}/s, 99 of 100 within {:.2} ms",
                        cluster.kind,
                        if deed == Deed::Write { "write" } else { "read " },
                        sample.rate,
                        sample.p99
                    );
                    samples.push(sample);
                }
            }
            let of = |what: fn(&Sample) -> f64| samples.each_ref().map(|all| all.iter().map(what).collect());
            let [our_rate, their_rate]: [Vec<f64>; 2] = of(|sample| sample.rate);
            let [our_p99, their_p99]: [Vec<f64>; 2] = of(|sample| sample.p99);
            match deed {
                Deed::Write => {
                    rows.push(write_rate.row(&our_rate, &their_rate));
                    rows.push(write_p99.row(&our_p99, &their_p99));
                }
                Deed::Read => rows.push(read_rate.row(&our_rate, &their_rate)),
            }
        }
    }
    Ok(rows)
}
