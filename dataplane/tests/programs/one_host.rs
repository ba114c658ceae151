//! What the programs do on a host that is alone.

use flynn_dataplane::{Dataplane, DropReason, Outcome, Program, Traffic};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};

use crate::{
    bench::{
        A, B, Bench, GATEWAY4, GATEWAY6, IFINDEX, NOBODY4, NOBODY6, OUTSIDE4, OUTSIDE6, frame4, frame6, six,
        with,
    },
    support::{self, alone, pins},
};

pub(crate) fn nothing_passes_before_the_network_is_known() {
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

pub(crate) fn a_container_reaches_its_neighbour() {
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

pub(crate) fn a_container_reaches_the_host_and_beyond() {
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

pub(crate) fn a_container_cannot_lie() {
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

pub(crate) fn nobody_is_behind_unused_addresses() {
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

pub(crate) fn what_the_overlay_does_not_carry_is_dropped() {
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

pub(crate) fn the_host_reaches_containers() {
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

pub(crate) fn strangers_at_the_tunnel_are_dropped() {
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

pub(crate) fn no_change_to_a_frame_makes_it_another_container_s() {
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
