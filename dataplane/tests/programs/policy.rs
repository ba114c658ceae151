//! Who may send to whom, and how fast.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU64,
    thread,
    time::{Duration, Instant},
};

use etherparse::{IpNumber, PacketBuilder};
use flynn_dataplane::{AppPolicy, Attachment, DropReason, Limits, Outcome, Policy, Port, Program, Protocol};

use crate::{
    bench::{
        A, B, Bench, FAR_GATEWAY, FAR4, FAR6, GATEWAY, GATEWAY4, GATEWAY6, IFINDEX, OUTSIDE4, frame4, six,
        with,
    },
    support::alone,
    tunnel::tunnelled,
};

const ONE: u32 = 0x11_11_11;
const TWO: u32 = 0x22_22_22;
const ISOLATED: AppPolicy = AppPolicy {
    isolated: true,
    system: false,
};
const SYSTEM: AppPolicy = AppPolicy {
    isolated: false,
    system: true,
};

#[derive(Clone, Copy)]
enum Kind {
    Syn,
    SynAck,
    Udp,
    Icmp,
    Other,
}

fn is(identity: u32, system: bool, ports: &[Port]) -> Attachment {
    Attachment {
        identity,
        system,
        open_ports: ports.iter().copied().collect(),
        limits: Limits::default(),
    }
}

fn port(protocol: Protocol, number: u16) -> Port {
    Port { protocol, number }
}

fn packet(kind: Kind, from: IpAddr, to: IpAddr, port: u16) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(A.mac, GATEWAY);
    let ip = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => panic!("one family"),
    };
    let mut bytes = Vec::new();
    match kind {
        Kind::Syn => ip.tcp(1000, port, 1, 1).syn().write(&mut bytes, &[]),
        Kind::SynAck => ip.tcp(1000, port, 1, 1).syn().ack(1).write(&mut bytes, &[]),
        Kind::Udp => ip.udp(1000, port).write(&mut bytes, &[]),
        Kind::Icmp if from.is_ipv4() => ip.icmpv4_echo_request(1, 1).write(&mut bytes, &[]),
        Kind::Icmp => ip.icmpv6_echo_request(1, 1).write(&mut bytes, &[]),
        Kind::Other => ip.write(&mut bytes, IpNumber::SCTP, &[0; 20]),
    }
    .unwrap();
    bytes
}

/// Between the two containers of this host, in both families.
fn between(kind: Kind, port: u16) -> [Vec<u8>; 2] {
    pairs(kind, port, B.ipv4, six(B))
}

fn pairs(kind: Kind, port: u16, to: Ipv4Addr, to6: Ipv6Addr) -> [Vec<u8>; 2] {
    [
        packet(kind, A.ipv4.into(), to.into(), port),
        packet(kind, six(A).into(), to6.into(), port),
    ]
}

/// From the container of the other host to one of this, through the tunnel.
fn from_far(identity: u32, kind: Kind, port: u16) -> [Vec<u8>; 2] {
    [
        tunnelled(identity, &packet(kind, FAR4.into(), B.ipv4.into(), port)),
        tunnelled(identity, &packet(kind, FAR6.into(), six(B).into(), port)),
    ]
}

impl Bench {
    fn all_pass(&self, program: Program, frames: &[Vec<u8>]) {
        for frame in frames {
            self.not_dropped(program, frame);
        }
    }

    fn all_dropped(&self, reason: DropReason, program: Program, frames: &[Vec<u8>]) {
        for frame in frames {
            self.drops(reason, program, frame);
        }
    }
}

pub(crate) fn the_isolated_talk_only_to_those_they_are_paired_with() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        let from = Program::FromContainer;
        bench.0.add(&A, &is(ONE, false, &[])).unwrap();
        bench.0.add(&B, &is(TWO, false, &[])).unwrap();
        bench.0.set_remote(&[(FAR4, Some(FAR6), TWO)]).unwrap();
        bench.all_pass(from, &between(Kind::Syn, 80));
        let to_far = |kind| pairs(kind, 80, FAR4, FAR6);
        for isolated in [ONE, TWO] {
            let mut policy = Policy {
                apps: [(isolated, ISOLATED)].into(),
                ..Policy::default()
            };
            bench.0.set_policy(&policy).unwrap();
            for kind in [Kind::Syn, Kind::SynAck, Kind::Udp, Kind::Icmp, Kind::Other] {
                bench.all_dropped(DropReason::Isolated, from, &between(kind, 80));
                bench.all_dropped(DropReason::Isolated, from, &to_far(kind));
            }
            // To the host and out of the cluster, there is a way.
            bench.all_pass(from, &pairs(Kind::Syn, 80, GATEWAY4, GATEWAY6));
            bench.all_pass(from, &[packet(Kind::Syn, A.ipv4.into(), OUTSIDE4.into(), 80)]);
            // Nothing is in the way of the host.
            bench.all_pass(
                Program::ToOverlay,
                &[frame4(GATEWAY4, A.ipv4), frame4(GATEWAY4, B.ipv4)],
            );

            policy.allowed = BTreeSet::from([(ONE, TWO)]);
            bench.0.set_policy(&policy).unwrap();
            for kind in [Kind::Syn, Kind::SynAck, Kind::Udp, Kind::Icmp] {
                bench.all_pass(from, &between(kind, 80));
                bench.all_pass(from, &to_far(kind));
            }
            policy.allowed = BTreeSet::from([(TWO, ONE)]);
            bench.0.set_policy(&policy).unwrap();
            for kind in [Kind::SynAck, Kind::Udp, Kind::Icmp] {
                bench.all_pass(from, &between(kind, 80));
                bench.all_pass(from, &to_far(kind));
            }
            bench.all_dropped(DropReason::MayOnlyAnswer, from, &between(Kind::Syn, 80));
            bench.all_dropped(DropReason::MayOnlyAnswer, from, &to_far(Kind::Syn));
            bench.all_dropped(DropReason::UnknownTransport, from, &between(Kind::Other, 80));
        }
        // The members of one app are no strangers to one another.
        bench.0.add(&B, &is(ONE, false, &[])).unwrap();
        let policy = Policy {
            apps: [(ONE, ISOLATED)].into(),
            ..Policy::default()
        };
        bench.0.set_policy(&policy).unwrap();
        bench.all_pass(from, &between(Kind::Syn, 80));
        bench.0.set_policy(&Policy::default()).unwrap();
        bench.0.add(&B, &is(TWO, false, &[])).unwrap();
        bench.all_pass(from, &between(Kind::Syn, 80));
    });
}

pub(crate) fn the_receiver_holds_policy_as_well() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        bench.0.add(&B, &is(TWO, false, &[])).unwrap();
        let mut policy = Policy {
            apps: [(TWO, ISOLATED)].into(),
            ..Policy::default()
        };
        bench.0.set_policy(&policy).unwrap();
        bench.all_dropped(
            DropReason::Isolated,
            Program::FromUplink,
            &from_far(ONE, Kind::Udp, 80),
        );
        bench.all_dropped(
            DropReason::Isolated,
            Program::FromUplink,
            &from_far(0, Kind::Udp, 80),
        );
        bench.all_pass(Program::FromUplink, &from_far(TWO, Kind::Syn, 80));
        bench.all_pass(
            Program::FromUplink,
            &from_far(flynn_dataplane::HOST, Kind::Syn, 80),
        );
        policy.allowed = BTreeSet::from([(TWO, ONE)]);
        bench.0.set_policy(&policy).unwrap();
        bench.all_pass(Program::FromUplink, &from_far(ONE, Kind::SynAck, 80));
        bench.all_dropped(
            DropReason::MayOnlyAnswer,
            Program::FromUplink,
            &from_far(ONE, Kind::Syn, 80),
        );
    });
}

pub(crate) fn parts_of_the_platform_are_reached_at_open_ports() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        let open = [port(Protocol::Tcp, 80), port(Protocol::Udp, 53)];
        bench.0.add(&A, &is(ONE, false, &[])).unwrap();
        bench.0.add(&B, &is(TWO, true, &open)).unwrap();
        let policy = Policy {
            apps: [(0x77, SYSTEM)].into(),
            ..Policy::default()
        };
        bench.0.set_policy(&policy).unwrap();
        for (program, frames) in [
            (
                Program::FromContainer,
                &between as &dyn Fn(Kind, u16) -> [Vec<u8>; 2],
            ),
            (Program::FromUplink, &|kind, port| from_far(ONE, kind, port)),
        ] {
            bench.all_pass(program, &frames(Kind::Syn, 80));
            bench.all_pass(program, &frames(Kind::Udp, 53));
            bench.all_dropped(DropReason::PortClosed, program, &frames(Kind::Syn, 53));
            bench.all_dropped(DropReason::PortClosed, program, &frames(Kind::Syn, 40_000));
            bench.all_dropped(DropReason::PortClosed, program, &frames(Kind::Udp, 80));
            // Answers, to what the platform has asked.
            bench.all_pass(program, &frames(Kind::SynAck, 40_000));
            bench.all_pass(program, &frames(Kind::Udp, 40_000));
            bench.all_pass(program, &frames(Kind::Icmp, 0));
            bench.all_dropped(DropReason::UnknownTransport, program, &frames(Kind::Other, 0));
        }
        // Its other parts are not kept out, wherever they are.
        bench.all_pass(Program::FromUplink, &from_far(0x77, Kind::Syn, 5432));
        bench.0.add(&A, &is(ONE, true, &[])).unwrap();
        bench.all_pass(Program::FromContainer, &between(Kind::Syn, 5432));
        // A slot's ports go with its container.
        bench.0.add(&A, &is(ONE, false, &[])).unwrap();
        bench.0.remove(B.ipv4, B.ipv6).unwrap();
        bench.0.add(&B, &is(TWO, true, &[])).unwrap();
        bench.all_dropped(
            DropReason::PortClosed,
            Program::FromContainer,
            &between(Kind::Syn, 80),
        );
    });
}

pub(crate) fn hosts_are_reached_at_open_ports() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        let from = Program::FromContainer;
        bench.0.add(&A, &is(ONE, false, &[])).unwrap();
        let own = OUTSIDE4.to_ipv6_mapped();
        bench.0.set_host_addresses(&BTreeSet::from([own]), None).unwrap();
        let to = |kind, port| {
            let four =
                [GATEWAY4, FAR_GATEWAY, OUTSIDE4].map(|to| packet(kind, A.ipv4.into(), to.into(), port));
            let six = packet(kind, six(A).into(), GATEWAY6.into(), port);
            [four.to_vec(), vec![six]].concat()
        };
        bench.all_pass(from, &to(Kind::Syn, 1113));
        let policy = Policy {
            host_ports: Some(BTreeSet::from([port(Protocol::Udp, 53), port(Protocol::Tcp, 80)])),
            ..Policy::default()
        };
        bench.0.set_policy(&policy).unwrap();
        bench.all_pass(from, &to(Kind::Udp, 53));
        bench.all_pass(from, &to(Kind::Syn, 80));
        bench.all_pass(from, &to(Kind::SynAck, 1113));
        bench.all_pass(from, &to(Kind::Icmp, 0));
        bench.all_dropped(DropReason::HostPortClosed, from, &to(Kind::Syn, 1113));
        bench.all_dropped(DropReason::HostPortClosed, from, &to(Kind::Udp, 1113));
        bench.all_dropped(DropReason::UnknownTransport, from, &to(Kind::Other, 0));
        // Others outside are not hosts.
        let other = Ipv4Addr::new(192, 0, 2, 200);
        bench.all_pass(from, &[packet(Kind::Syn, A.ipv4.into(), other.into(), 1113)]);
        // The platform's own containers reach all.
        bench.0.add(&A, &is(ONE, true, &[])).unwrap();
        bench.all_pass(from, &to(Kind::Syn, 1113));
    });
}

pub(crate) fn transports_that_policy_does_not_know() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        bench.0.add(&A, &is(ONE, false, &[])).unwrap();
        bench
            .0
            .add(&B, &is(TWO, true, &[port(Protocol::Tcp, 80)]))
            .unwrap();
        let [four, six] = between(Kind::Syn, 81);
        let from = Program::FromContainer;
        // Behind options, a port is where it is behind none.
        let padded = [&four[..34], &[1; 4], &four[34..]].concat();
        bench.drops(DropReason::PortClosed, from, &with(&padded, 14, &[0x46]));
        // A fragment that is not the first has no ports; it is nothing without the first.
        bench.not_dropped(from, &with(&four, 20, &[0, 1]));
        bench.drops(DropReason::PortClosed, from, &with(&four, 20, &[0x20, 0]));
        let fragment = |offset: [u8; 2]| {
            let header = [6, 0, offset[0], offset[1], 0, 0, 0, 1];
            with(&[&six[..54], &header, &six[54..]].concat(), 20, &[44])
        };
        bench.drops(DropReason::PortClosed, from, &fragment([0, 1]));
        bench.not_dropped(from, &fragment([0, 9]));
        // What hides behind other extensions is not looked for.
        let hidden = [&six[..54], &[6, 0, 1, 4, 0, 0, 0, 0], &six[54..]].concat();
        bench.drops(DropReason::UnknownTransport, from, &with(&hidden, 20, &[60]));
        // Too short for its ports.
        bench.drops(DropReason::Truncated, from, &four[..36]);
        bench.drops(DropReason::Truncated, from, &six[..60]);
    });
}

pub(crate) fn limits_hold_and_recover() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        let frame = [frame4(A.ipv4, B.ipv4), vec![0; 1400]].concat();
        // So slow that nothing becomes due while this runs, and that a burst is longer than the machine is up.
        let limits = |sent, received| Attachment {
            limits: Limits {
                sent: NonZeroU64::new(sent),
                received: NonZeroU64::new(received),
            },
            ..Attachment::default()
        };
        let burst = |bench: &Bench, program, frame: &[u8]| {
            let run = || bench.0.dry_run(program, IFINDEX, frame).unwrap().action;
            (0..400).filter(|_| run() != Outcome::DROP).count()
        };
        let expected = 256 * 1024 / frame.len();
        for (a, b, reason) in [
            (limits(1, 0), limits(0, 0), DropReason::SentTooFast),
            (limits(0, 0), limits(0, 1), DropReason::ReceivedTooFast),
        ] {
            bench.0.add(&A, &a).unwrap();
            bench.0.add(&B, &b).unwrap();
            let passed = burst(&bench, Program::FromContainer, &frame);
            assert!(
                (expected..expected + 3).contains(&passed),
                "{passed} of {expected}"
            );
            let drops = bench.0.drops().unwrap();
            let count = drops.iter().find(|(found, _)| *found == reason).unwrap().1;
            assert_eq!(count, 400 - passed as u64);
            // To say the same again is no way out.
            bench.0.add(&A, &a).unwrap();
            bench.0.add(&B, &b).unwrap();
            assert_eq!(burst(&bench, Program::FromContainer, &frame), 0);
        }
        let [_, received] = bench.traffic();
        assert!(received.received_packets < 400);
        let tunnelled = tunnelled(7, &[frame4(FAR4, B.ipv4), vec![0; 1400]].concat());
        bench.drops(DropReason::ReceivedTooFast, Program::FromUplink, &tunnelled);
        bench.drops(
            DropReason::ReceivedTooFast,
            Program::ToOverlay,
            &frame4(GATEWAY4, B.ipv4),
        );
        // With a faster one, what is due comes soon.
        bench.0.add(&B, &limits(0, 50_000_000)).unwrap();
        burst(&bench, Program::FromContainer, &frame);
        let deadline = Instant::now() + Duration::from_secs(10);
        while burst(&bench, Program::FromContainer, &frame) == 0 {
            assert!(Instant::now() < deadline, "nothing passes any more");
            thread::yield_now();
        }
    });
}
