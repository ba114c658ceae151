//! The suite `overlay`: what it costs containers to talk through our network, beside the kernel's own means.
//!
//! Everything is in namespaces that are made here: hosts joined by veth pairs, containers, and the same for the peers. The
//! mounts of the machine stay as they are.

mod load;
mod ours;
mod peers;

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use self::load::{Measure, Pair, Sample};
use crate::inside::traffic::Pattern;
use crate::row::{Goal, Row, Subject, median};
use crate::samples::in_turns;
use crate::suites::Thoroughness;

const SUITE: &str = "overlay";

/// One measure, and what it is called in each of the places.
struct Plan {
    measure: Measure,
    unit: &'static str,
    /// Of a sample's rate.
    scale: f64,
    on_one_host: &'static str,
    across_hosts: &'static str,
}

/// One CPU for both ends, or one each.
const ALONE: (usize, usize) = (1, 1);
const APART: (usize, usize) = (1, 0);

const fn plan(
    pattern: Pattern,
    (client_cpu, server_cpu): (usize, usize),
    unit: &'static str,
    scale: f64,
    [on_one_host, across_hosts]: [&'static str; 2],
) -> Plan {
    let measure = Measure {
        pattern,
        client_cpu,
        server_cpu,
    };
    Plan {
        measure,
        unit,
        scale,
        on_one_host,
        across_hosts,
    }
}

/// A measure's names: on one host, and across two.
macro_rules! names {
    ($what:literal) => {
        [concat!("one host: ", $what), concat!("two hosts: ", $what)]
    };
}

const PLANS: [Plan; 4] = [
    plan(Pattern::Requests, ALONE, "1/s", 1.0, names!("requests, one CPU")),
    plan(
        Pattern::Connections,
        ALONE,
        "1/s",
        1.0,
        names!("connections, one CPU"),
    ),
    plan(Pattern::Stream, ALONE, "Gbit/s", 1e-9, names!("stream, one CPU")),
    plan(Pattern::Stream, APART, "Gbit/s", 1e-9, names!("stream, two CPUs")),
];

/// Takes all rows.
pub(crate) fn run(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    flynn_lab::unshare(UnshareFlags::NEWNS).context("cannot make a mount namespace; this needs root")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let mut rows = across_hosts(thoroughness);
    rows.extend(on_one_host(thoroughness));
    Ok(rows)
}

/// Containers of two hosts, beside the kernel's VXLAN and the hosts themselves.
fn across_hosts(thoroughness: Thoroughness) -> Vec<Row> {
    let subjects = |plan: &Plan| {
        let subject = |peer, goal| Subject {
            suite: SUITE,
            name: plan.across_hosts,
            unit: plan.unit,
            peer: Some(peer),
            goal: Goal::RatioAtLeast(goal),
        };
        let least = match plan.measure.pattern {
            Pattern::Stream => 1.15,
            Pattern::Requests | Pattern::Connections => 1.35,
        };
        [subject("kernel VXLAN", least), subject("host to host", 0.9)]
    };
    let places = || -> Result<_> { Ok((ours::two_hosts()?, peers::vxlan()?)) };
    let ((ours, _hosts), [vxlan, hosts]) = match places() {
        Ok(places) => places,
        Err(error) => return missing(PLANS.iter().flat_map(subjects), &error),
    };
    let mut pairs = [ours, vxlan, hosts];
    let mut rows = Vec::new();
    for plan in &PLANS {
        let [to_vxlan, to_hosts] = subjects(plan);
        match measured(&mut pairs, plan, plan.across_hosts, thoroughness) {
            Ok([ours, vxlan, hosts]) => {
                rows.push(to_vxlan.row(&ours, &vxlan));
                rows.push(to_hosts.row(&ours, &hosts));
            }
            Err(error) => rows.extend(missing([to_vxlan, to_hosts], &error)),
        }
    }
    rows
}

/// Containers of one host, beside a veth pair and a bridge.
fn on_one_host(thoroughness: Thoroughness) -> Vec<Row> {
    let subjects = |plan: &Plan| {
        let subject = |peer, goal| Subject {
            suite: SUITE,
            name: plan.on_one_host,
            unit: plan.unit,
            peer: Some(peer),
            goal: Goal::RatioAtLeast(goal),
        };
        [subject("one veth pair", 0.95), subject("bridge", 1.2)]
    };
    let places = || -> Result<_> { Ok((ours::one_host()?, peers::veth()?, peers::bridge()?)) };
    let ((ours, _host), veth, (bridge, _bridge_host)) = match places() {
        Ok(places) => places,
        Err(error) => return missing(PLANS.iter().flat_map(subjects), &error),
    };
    let mut pairs = [ours, veth, bridge];
    let mut rows = Vec::new();
    for plan in &PLANS {
        let [to_veth, to_bridge] = subjects(plan);
        match measured(&mut pairs, plan, plan.on_one_host, thoroughness) {
            Ok([ours, veth, bridge]) => {
                rows.push(to_veth.row(&ours, &veth));
                rows.push(to_bridge.row(&ours, &bridge));
            }
            Err(error) => rows.extend(missing([to_veth, to_bridge], &error)),
        }
    }
    rows
}

fn missing(subjects: impl IntoIterator<Item = Subject>, error: &anyhow::Error) -> Vec<Row> {
    let why = format!("{error:#}");
    subjects
        .into_iter()
        .map(|subject| subject.missing(&why))
        .collect()
}

/// The rates of each pair, in turns, in the plan's unit.
fn measured<const N: usize>(
    pairs: &mut [Pair; N],
    plan: &Plan,
    name: &str,
    thoroughness: Thoroughness,
) -> Result<[Vec<f64>; N]> {
    let (rounds, millis) = thoroughness.pick((7, 400), (21, 1000));
    for pair in &*pairs {
        // Neighbours are found and memory is touched before it counts.
        pair.sample(plan.measure, Duration::from_millis(100))?;
    }
    let samples = in_turns(pairs, rounds, |pair| {
        pair.sample(plan.measure, Duration::from_millis(millis))
    })?;
    eprintln!("    {name}");
    for (pair, samples) in pairs.iter().zip(&samples) {
        tell(pair.name, plan, samples);
    }
    let mut samples = samples.into_iter();
    Ok(std::array::from_fn(|_| {
        let samples = samples.next().unwrap_or_default();
        samples.iter().map(|sample| sample.rate * plan.scale).collect()
    }))
}

/// The middle, the middle half, and the CPU that it took.
fn tell(name: &str, plan: &Plan, samples: &[Sample]) {
    let mut rates: Vec<f64> = samples.iter().map(|sample| sample.rate * plan.scale).collect();
    rates.sort_by(f64::total_cmp);
    let cpus: Vec<f64> = samples.iter().map(|sample| sample.cpu).collect();
    let (Some(rate), Some(cpu)) = (median(&rates), median(&cpus)) else {
        return;
    };
    let (low, high) = (rates[rates.len() / 4], rates[rates.len() * 3 / 4]);
    let (cpu, per) = match plan.measure.pattern {
        Pattern::Stream => (cpu * 8e9, "ns of CPU a byte"),
        Pattern::Requests | Pattern::Connections => (cpu * 1e6, "us of CPU each"),
    };
    eprintln!(
        "      {name:<24} {rate:>10.2} {} (middle half {low:.2} to {high:.2}), {cpu:.3} {per}",
        plan.unit
    );
}
