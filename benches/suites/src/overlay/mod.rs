//! The suite `overlay`: what it costs containers to talk through our network, beside the kernel's own means.
//!
//! Everything is in namespaces that are made here: hosts joined by veth pairs, containers, and the same for the peers. The
//! mounts of the machine stay as they are.

mod load;
mod ours;
mod peers;

use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::{Context, Result};
use flynn_overlay::Limits;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use self::load::{Measure, Pair, Sample};
use self::ours::Particulars;
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
    with_route: &'static str,
}

/// One CPU for both ends, or one each.
const ALONE: (usize, usize) = (1, 1);
const APART: (usize, usize) = (1, 0);

const fn plan(
    pattern: Pattern,
    (client_cpu, server_cpu): (usize, usize),
    unit: &'static str,
    scale: f64,
    [on_one_host, across_hosts, with_route]: [&'static str; 3],
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
        with_route,
    }
}

/// A measure's names: on one host, across two, and with a route attached.
macro_rules! names {
    ($what:literal) => {
        [
            concat!("one host: ", $what),
            concat!("two hosts: ", $what),
            concat!("two hosts, an L4 route in tc: ", $what),
        ]
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
    rows.extend(limited(thoroughness));
    rows.extend(on_one_host(thoroughness));
    Ok(rows)
}

/// Containers of two hosts, beside the kernel's VXLAN and the hosts themselves.
fn across_hosts(thoroughness: Thoroughness) -> Vec<Row> {
    let subjects = |plan: &Plan| {
        let subject = |name, peer, goal| Subject {
            suite: SUITE,
            name,
            unit: plan.unit,
            peer: Some(peer),
            goal: Goal::RatioAtLeast(goal),
        };
        // What host to host is to a stream is printed, and nobody's goal.
        let (least, of_hosts) = match plan.measure.pattern {
            Pattern::Stream => (1.15, None),
            Pattern::Requests | Pattern::Connections => (1.35, Some(0.9)),
        };
        (
            subject(plan.across_hosts, "kernel VXLAN", least),
            of_hosts.map(|aim| subject(plan.across_hosts, "host to host", aim)),
            subject(plan.with_route, "ours without one", 0.9),
        )
    };
    let all = |(vxlan, hosts, route)| [Some(vxlan), hosts, Some(route)].into_iter().flatten();
    let routed = Particulars {
        routed: true,
        ..Particulars::default()
    };
    let places = || -> Result<_> {
        let ours = ours::two_hosts("ours", Particulars::default())?;
        Ok((
            ours,
            ours::two_hosts("ours with an L4 route", routed)?,
            peers::vxlan()?,
        ))
    };
    let ((ours, _hosts), (routed, _routed_hosts), [vxlan, hosts]) = match places() {
        Ok(places) => places,
        Err(error) => return missing(PLANS.iter().flat_map(|plan| all(subjects(plan))), &error),
    };
    let mut pairs = [ours, routed, vxlan, hosts];
    let mut rows = Vec::new();
    for plan in &PLANS {
        let (to_vxlan, to_hosts, with_route) = subjects(plan);
        match measured(&mut pairs, plan, plan.across_hosts, thoroughness) {
            Ok([ours, routed, vxlan, hosts]) => {
                rows.push(to_vxlan.row(&ours, &vxlan));
                rows.extend(to_hosts.map(|it| it.row(&ours, &hosts)));
                rows.push(with_route.row(&routed, &ours));
            }
            Err(error) => rows.extend(missing(all((to_vxlan, to_hosts, with_route)), &error)),
        }
    }
    rows
}

/// A stream that is slowed down, where it is sent and where it is received, beside the limit itself.
fn limited(thoroughness: Thoroughness) -> Vec<Row> {
    const BITS: f64 = 1e9;
    let bytes = NonZeroU64::new(125_000_000);
    let sent = Particulars {
        client: Limits {
            sent: bytes,
            received: None,
        },
        ..Particulars::default()
    };
    let received = Particulars {
        server: Limits {
            sent: None,
            received: bytes,
        },
        ..Particulars::default()
    };
    let (rounds, millis) = thoroughness.pick((3, 1000), (5, 3000));
    let measure = PLANS[2].measure;
    let samples = |particulars| -> Result<_> {
        let (pair, _hosts) = ours::two_hosts("limited", particulars)?;
        let samples = in_turns(&mut [pair], rounds, |pair| {
            let sample = pair.sample(measure, Duration::from_millis(millis))?;
            Ok(sample.rate / BITS)
        })?;
        Ok((samples.concat(), vec![1.0]))
    };
    let subject = |name| Subject {
        suite: SUITE,
        name,
        unit: "Gbit/s",
        peer: Some("its limit"),
        goal: Goal::RatioWithin(0.1),
    };
    vec![
        subject("two hosts: stream, sender limited").taken(samples(sent)),
        subject("two hosts: stream, receiver limited").taken(samples(received)),
    ]
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
