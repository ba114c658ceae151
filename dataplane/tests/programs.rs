//! The programs, one packet at a time: every way out of each of them, what it does to the packet, and what it counts.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};

use etherparse::PacketBuilder;
use flynn_dataplane::{
    Attachment, Container, Dataplane, DropReason, Network, Outcome, Prefix, Program, Traffic,
};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};
use support::{alone, pins};

/// The loopback device's: packets under test come by it unless they say otherwise.
const IFINDEX: u32 = 1;
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];

const A: Container = Container {
    ipv4: Ipv4Addr::new(100, 100, 1, 2),
    ipv6: Some(Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 2)),
    mac: [2, 0, 0, 0, 0, 2],
    ifindex: IFINDEX,
};
const B: Container = Container {
    ipv4: Ipv4Addr::new(100, 100, 1, 3),
    ipv6: Some(Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 3)),
    mac: [2, 0, 0, 0, 0, 3],
    ifindex: 77,
};
const GATEWAY4: Ipv4Addr = Ipv4Addr::new(100, 100, 1, 1);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 1);
const NOBODY4: Ipv4Addr = Ipv4Addr::new(100, 100, 9, 9);
const NOBODY6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 9, 9);
const OUTSIDE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            (
                "nothing_passes_before_the_network_is_known",
                nothing_passes_before_the_network_is_known,
            ),
            (
                "a_container_reaches_its_neighbour",
                a_container_reaches_its_neighbour,
            ),
            (
                "a_container_reaches_the_host_and_beyond",
                a_container_reaches_the_host_and_beyond,
            ),
            ("a_container_cannot_lie", a_container_cannot_lie),
            (
                "nobody_is_behind_unused_addresses",
                nobody_is_behind_unused_addresses,
            ),
            (
                "what_the_overlay_does_not_carry_is_dropped",
                what_the_overlay_does_not_carry_is_dropped,
            ),
            ("the_host_reaches_containers", the_host_reaches_containers),
            (
                "strangers_at_the_tunnel_are_dropped",
                strangers_at_the_tunnel_are_dropped,
            ),
            (
                "no_change_to_a_frame_makes_it_another_container_s",
                no_change_to_a_frame_makes_it_another_container_s,
            ),
        ],
    )
}

/// A data plane with both containers, and what its counters were.
struct Bench(Dataplane);

impl Bench {
    fn new(bpffs: &Path) -> Self {
        let mut dataplane = Dataplane::open(&pins(bpffs)).unwrap();
        dataplane.configure(&network()).unwrap();
        for container in [A, B] {
            dataplane.add(&container, &Attachment::default()).unwrap();
        }
        Self(dataplane)
    }

    fn passes(&self, program: Program, frame: &[u8]) {
        let outcome = self.uncounted_drop(program, frame);
        assert_eq!(
            outcome,
            Outcome {
                action: Outcome::PASS,
                frame: frame.to_vec()
            }
        );
    }

    /// The frame leaves for a container, with nothing but its Ethernet addresses changed.
    fn goes_to(&self, container: &Container, program: Program, frame: &[u8]) {
        let expected = [&container.mac, &GATEWAY, &frame[12..]].concat();
        let outcome = self.uncounted_drop(program, frame);
        assert_eq!(
            outcome,
            Outcome {
                action: Outcome::REDIRECT,
                frame: expected
            }
        );
    }

    fn drops(&self, reason: DropReason, program: Program, frame: &[u8]) {
        self.drops_from(IFINDEX, reason, program, frame);
    }

    fn drops_from(&self, ifindex: u32, reason: DropReason, program: Program, frame: &[u8]) {
        let mut expected = self.0.drops().unwrap();
        for (found, count) in &mut expected {
            *count += u64::from(*found == reason);
        }
        let traffic = self.traffic();
        let outcome = self.0.dry_run(program, ifindex, frame).unwrap();
        assert_eq!(
            outcome,
            Outcome {
                action: Outcome::DROP,
                frame: frame.to_vec()
            },
            "{}",
            reason.name()
        );
        assert_eq!(self.0.drops().unwrap(), expected);
        assert_eq!(self.traffic(), traffic, "what is dropped is no traffic");
    }

    fn uncounted_drop(&self, program: Program, frame: &[u8]) -> Outcome {
        let drops = self.0.drops().unwrap();
        let outcome = self.0.dry_run(program, IFINDEX, frame).unwrap();
        assert_eq!(self.0.drops().unwrap(), drops);
        outcome
    }

    fn traffic(&self) -> [Traffic; 2] {
        let containers = self.0.containers().unwrap();
        assert_eq!(
            containers
                .iter()
                .map(|(container, _)| *container)
                .collect::<Vec<_>>(),
            [A, B]
        );
        [containers[0].1, containers[1].1]
    }
}

fn network() -> Network {
    Network {
        cluster4: Prefix {
            address: Ipv4Addr::new(100, 100, 0, 0),
            length: 16,
        },
        cluster6: Some(Prefix {
            address: Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0),
            length: 64,
        }),
        gateway4: GATEWAY4,
        gateway6: Some(GATEWAY6),
        subnet_length: 24,
        address: None,
        tunnel_mtu: 1450,
        gateway_mac: GATEWAY,
    }
}

fn frame4(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    frame(PacketBuilder::ethernet2(A.mac, GATEWAY).ipv4(from.octets(), to.octets(), 64))
}

fn frame6(from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    frame(PacketBuilder::ethernet2(A.mac, GATEWAY).ipv6(from.octets(), to.octets(), 64))
}

fn frame(headers: etherparse::PacketBuilderStep<etherparse::IpHeaders>) -> Vec<u8> {
    let payload = b"payload";
    let headers = headers.udp(1000, 2000);
    let mut bytes = Vec::with_capacity(headers.size(payload.len()));
    headers.write(&mut bytes, payload).unwrap();
    bytes
}

/// The frame with some of its bytes changed.
fn with(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

fn six(container: Container) -> Ipv6Addr {
    container.ipv6.unwrap()
}

fn nothing_passes_before_the_network_is_known() {
    alone(|bpffs| {
        let dataplane = Dataplane::open(&pins(bpffs)).unwrap();
        for program in [Program::FromContainer, Program::ToOverlay] {
            for frame in [frame4(A.ipv4, OUTSIDE4), frame6(six(A), OUTSIDE6)] {
                let outcome = dataplane.dry_run(program, IFINDEX, &frame).unwrap();
                assert_eq!(
                    outcome,
                    Outcome {
                        action: Outcome::DROP,
                        frame
                    }
                );
            }
        }
        assert!(dataplane.drops().unwrap().contains(&(DropReason::NotReady, 4)));
    });
}

fn a_container_reaches_its_neighbour() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        let (four, six) = (frame4(A.ipv4, B.ipv4), frame6(six(A), six(B)));
        bench.goes_to(&B, Program::FromContainer, &four);
        bench.goes_to(&B, Program::FromContainer, &six);
        let bytes = (four.len() + six.len()) as u64;
        let sent = Traffic {
            sent_packets: 2,
            sent_bytes: bytes,
            ..Traffic::default()
        };
        let received = Traffic {
            received_packets: 2,
            received_bytes: bytes,
            ..Traffic::default()
        };
        assert_eq!(bench.traffic(), [sent, received]);
    });
}

fn a_container_reaches_the_host_and_beyond() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        for frame in [
            frame4(A.ipv4, GATEWAY4),
            frame4(A.ipv4, OUTSIDE4),
            frame6(six(A), GATEWAY6),
            frame6(six(A), OUTSIDE6),
        ] {
            bench.passes(Program::FromContainer, &frame);
        }
        let [sender, other] = bench.traffic();
        assert_eq!((sender.sent_packets, sender.received_packets), (4, 0));
        assert_eq!(other, Traffic::default());
    });
}

fn a_container_cannot_lie() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        // Another container's address, the gateway's, nobody's and one from outside.
        for address in [B.ipv4, GATEWAY4, NOBODY4, OUTSIDE4] {
            let frame = frame4(address, OUTSIDE4);
            bench.drops(DropReason::SpoofedAddress, Program::FromContainer, &frame);
        }
        for address in [six(B), GATEWAY6, NOBODY6, OUTSIDE6] {
            let frame = frame6(address, OUTSIDE6);
            bench.drops(DropReason::SpoofedAddress, Program::FromContainer, &frame);
        }
        for frame in [frame4(A.ipv4, B.ipv4), frame6(six(A), six(B))] {
            bench.drops(
                DropReason::SpoofedMac,
                Program::FromContainer,
                &with(&frame, 6, &B.mac),
            );
        }
    });
    // Its own addresses, but by another container's interface.
    alone(|bpffs| {
        support::ip(&["link", "add", "name", "other", "type", "veth"]);
        let index = support::ip(&["-o", "link", "show", "other"]);
        let index = index.split(':').next().unwrap().parse().unwrap();
        let bench = Bench::new(bpffs);
        for frame in [frame4(A.ipv4, B.ipv4), frame6(six(A), six(B))] {
            bench.drops_from(index, DropReason::SpoofedAddress, Program::FromContainer, &frame);
        }
    });
}

fn nobody_is_behind_unused_addresses() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        for program in [Program::FromContainer, Program::ToOverlay] {
            bench.drops(DropReason::NoEndpoint, program, &frame4(A.ipv4, NOBODY4));
            bench.drops(DropReason::NoEndpoint, program, &frame6(six(A), NOBODY6));
        }
        assert!(bench.0.remove(B.ipv4, B.ipv6).unwrap());
        for frame in [frame4(A.ipv4, B.ipv4), frame6(six(A), six(B))] {
            let outcome = bench.0.dry_run(Program::FromContainer, IFINDEX, &frame).unwrap();
            assert_eq!(outcome.action, Outcome::DROP);
        }
    });
}

fn what_the_overlay_does_not_carry_is_dropped() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        let (four, six) = (frame4(A.ipv4, B.ipv4), frame6(six(A), six(B)));
        for program in [Program::FromContainer, Program::ToOverlay] {
            // ARP, LLDP, and lengths instead of protocols.
            for protocol in [[0x08, 0x06], [0x88, 0xcc], [0x00, 0x40]] {
                bench.drops(DropReason::NotIp, program, &with(&four, 12, &protocol));
            }
            bench.drops(DropReason::Multicast, program, &with(&four, 0, &[0xff; 6]));
            bench.drops(
                DropReason::Multicast,
                program,
                &with(&six, 0, &[0x33, 0x33, 0, 0, 0, 2]),
            );
            // The wrong version, and a header shorter than any.
            bench.drops(DropReason::Malformed, program, &with(&four, 14, &[0x65]));
            bench.drops(DropReason::Malformed, program, &with(&four, 14, &[0x44]));
            bench.drops(DropReason::Malformed, program, &with(&six, 14, &[0x40]));
        }
    });
}

fn the_host_reaches_containers() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        bench.goes_to(&A, Program::ToOverlay, &frame4(GATEWAY4, A.ipv4));
        bench.goes_to(&B, Program::ToOverlay, &frame6(GATEWAY6, six(B)));
        // An answer from outside.
        bench.goes_to(&A, Program::ToOverlay, &frame4(OUTSIDE4, A.ipv4));
        let [a, b] = bench.traffic();
        assert_eq!((a.received_packets, a.sent_packets), (2, 0));
        assert_eq!((b.received_packets, b.sent_packets), (1, 0));
        // What is not the cluster's has no business on its device.
        bench.drops(
            DropReason::NoEndpoint,
            Program::ToOverlay,
            &frame4(GATEWAY4, OUTSIDE4),
        );
        bench.drops(
            DropReason::NoEndpoint,
            Program::ToOverlay,
            &frame6(GATEWAY6, OUTSIDE6),
        );
        bench.drops(
            DropReason::NoEndpoint,
            Program::ToOverlay,
            &frame4(OUTSIDE4, GATEWAY4),
        );
    });
}

fn strangers_at_the_tunnel_are_dropped() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        for frame in [
            frame4(B.ipv4, A.ipv4),
            frame6(six(B), six(A)),
            frame4(OUTSIDE4, GATEWAY4),
        ] {
            bench.drops(DropReason::UnknownHost, Program::FromTunnel, &frame);
        }
    });
}

fn no_change_to_a_frame_makes_it_another_container_s() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        let frames = prop_oneof![Just(frame4(A.ipv4, B.ipv4)), Just(frame6(six(A), six(B)))];
        let changes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..6);
        let property = (frames, changes, any::<Index>());
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 4000,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let result = runner.run(&property, |(mut frame, changes, cut)| {
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            // The kernel runs no shorter frames than these; such are for real devices.
            let shortest = if frame[12..14] == [0x86, 0xdd] { 54 } else { 34 };
            frame.truncate(shortest.max(cut.index(frame.len() * 2)));
            let outcome = bench.0.dry_run(Program::FromContainer, IFINDEX, &frame).unwrap();
            if outcome.action == Outcome::DROP {
                return Ok(());
            }
            prop_assert_eq!(&frame[6..12], &A.mac);
            match frame[12..14] {
                [0x08, 0x00] => prop_assert_eq!(&frame[26..30], &A.ipv4.octets()),
                [0x86, 0xdd] => prop_assert_eq!(&frame[22..38], &six(A).octets()),
                _ => prop_assert!(false, "neither IPv4 nor IPv6 went on: {:02x?}", frame),
            }
            prop_assert_eq!(&outcome.frame[12..], &frame[12..]);
            Ok(())
        });
        result.unwrap();
    });
}
