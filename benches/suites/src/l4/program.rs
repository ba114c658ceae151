//! The XDP program over 64-byte frames: one side of a veth pair makes frames and counts those which come back, the other
//! runs the program under test. One CPU does all of it.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flynn_dataplane::Protocol;
use flynn_dataplane::bench::{Generator, Mac, Plan};
use flynn_dataplane::lb::{Backend, Balancer, FLOOD, Limits, Mode, Service, Vip};
use flynn_lab::netns;

use super::{CPU, Node, SUITE, address, container, number, stay, tell};
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

const PORT: u16 = 3000;
const FRAME: u32 = 64;
/// What the tunnel adds.
const TUNNEL: u32 = 50;
const BACKENDS: u8 = 10;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// For which the slowest row fills its table: so many new flows a second are remembered.
const WARM: Duration = Duration::from_secs(6);
/// Names of the pairs' ends.
const PAIRS: [(&str, &str); 2] = [("plain0", "plain1"), ("made", "uplink")];

const fn subject(name: &'static str, peer: &'static str, most: f64) -> Subject {
    Subject {
        suite: SUITE,
        name,
        unit: "ns",
        peer: Some(peer),
        goal: Goal::RatioAtMost(most),
    }
}

const BOUNCE: &str = "plain XDP_TX bounce";
const ROWS: [Subject; 4] = [
    subject("XDP, TCP, 10,000 flows: packet above a bounce", BOUNCE, 0.74),
    subject("XDP, TCP, 500,000 flows: packet above a bounce", BOUNCE, 1.42),
    subject("XDP, UDP, 10,000 flows: packet above a bounce", BOUNCE, 1.0),
    subject("XDP, SYN flood: packet above a bounce", "TCP, 10,000 flows", 1.0),
];
const LOADS: [(u32, u8, &str); 4] = [
    (10_000, ACK, "TCP, 10,000 flows"),
    (500_000, ACK, "TCP, 500,000 flows"),
    (10_000, 0, "UDP, 10,000 flows"),
    (0, SYN, "SYN flood"),
];

pub(super) fn rows(pins: &Path, thoroughness: Thoroughness) -> Vec<Row> {
    let measured =
        netns::make().and_then(|place| netns::inside(place.as_fd(), || measure(pins, thoroughness)));
    match measured {
        Ok((bounce, [tcp, many, udp, flood])) => vec![
            ROWS[0].row(&tcp, &bounce),
            ROWS[1].row(&many, &bounce),
            ROWS[2].row(&udp, &bounce),
            ROWS[3].row(&flood, &tcp),
        ],
        Err(error) => ROWS.map(|row| row.missing(format!("{error:#}"))).into(),
    }
}

/// Nanoseconds for each packet: of the bounce, and above it of each load.
fn measure(pins: &Path, thoroughness: Thoroughness) -> Result<(Vec<f64>, [Vec<f64>; 4])> {
    stay()?;
    for (made, uplink) in PAIRS {
        netns::ip(&format!(
            "link add {made} type veth peer name {uplink}\nlink set {made} up\nlink set {uplink} up\n"
        ))?;
    }
    netns::ip(&format!(
        "address add {}/24 dev uplink\nneighbour add {} lladdr 02:00:00:00:00:02 dev uplink nud permanent\n",
        address(1),
        address(2)
    ))?;
    let node = Node::up(pins, 1, 2, "uplink", false)?;
    let index = |name: &str| -> Result<u32> {
        let line = netns::output(&["-o", "link", "show", "dev", name])?;
        line.split(':')
            .next()
            .unwrap_or_default()
            .trim()
            .parse()
            .context("an interface's index")
    };
    let mut plain = Generator::open(pins, PAIRS[0].0, index(PAIRS[0].0)?)?;
    let _bounce = plain.bounce(PAIRS[0].1)?;
    let mut through = Generator::open(pins, PAIRS[1].0, index(PAIRS[1].0)?)?;

    let limits = Limits {
        flows: 1 << 21,
        flood: FLOOD,
    };
    let mac = node.uplink.mac;
    let mut balancer = Balancer::open(&node.pins, node.uplink.clone(), Mode::Native, &limits)?;
    let vip = |protocol| Vip {
        address: address(1).into(),
        port: PORT,
        protocol,
    };
    balancer.set(&[Service {
        vips: vec![vip(Protocol::Tcp), vip(Protocol::Udp)],
        backends: (0..BACKENDS)
            .map(|n| Backend::new(container(2, n + 2), 8080))
            .collect(),
        ..Service::default()
    }])?;
    ensure!(
        balancer.mode() == Mode::Native,
        "the program cannot be attached natively"
    );
    node.dataplane.drops().context("the data plane")?;

    let plan = |flows, flags, length| Plan {
        flows,
        address: address(1).into(),
        port: PORT.to_be_bytes(),
        to: Mac::new(mac),
        flags,
        length,
        ..Plan::default()
    };
    let packets = thoroughness.pick(1_000_000, 3_000_000);
    let sample = |generator: &mut Generator, plan: Plan, packets: u32| -> Result<f64> {
        let run = generator.run(plan, packets)?;
        let seen = run.seen;
        ensure!(
            number(seen.right) >= 0.999 * number(seen.made) && seen.made >= u64::from(packets),
            "of {} frames {} came back right and {} wrong",
            seen.made,
            seen.right,
            seen.wrong
        );
        Ok(run.took.as_secs_f64() * 1e9 / number(seen.made))
    };
    let (mut bounce, mut above) = (Vec::new(), [const { Vec::new() }; 4]);
    eprintln!("XDP on CPU {CPU}:");
    for _ in 0..thoroughness.pick(3, 5) {
        for ((flows, flags, _), above) in LOADS.into_iter().zip(&mut above) {
            let plain_ns = sample(&mut plain, plan(1, ACK, FRAME), packets)?;
            bounce.push(plain_ns);
            // What is not remembered yet costs more, once; and a flood before may have used this second up.
            let began = Instant::now();
            while flows > 0
                && (began.elapsed() < Duration::from_millis(1500)
                    || flows > 100_000 && began.elapsed() < WARM)
            {
                through.run(plan(flows, flags, FRAME + TUNNEL), 100_000)?;
            }
            // A flood goes on: so many of its flows a second are remembered, however many there are.
            let packets = if flows == 0 { 6_000_000 } else { packets };
            let ns = sample(&mut through, plan(flows, flags, FRAME + TUNNEL), packets)?;
            above.push(ns - plain_ns);
        }
    }
    tell(BOUNCE, &bounce, "ns");
    for ((_, _, name), above) in LOADS.iter().zip(&above) {
        tell(&format!("{name}, above the bounce"), above, "ns");
    }
    for (event, count) in balancer.events()? {
        eprintln!("  {}: {count}", event.name());
    }
    Ok((bounce, above))
}
