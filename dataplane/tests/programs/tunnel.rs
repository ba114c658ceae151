//! What the programs do between two hosts.

use std::net::Ipv4Addr;

use etherparse::PacketBuilder;
use flynn_dataplane::{Attachment, DropReason, Host, Network, Outcome, Program};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};

use crate::{
    bench::{
        A, B, Bench, FAR, FAR_GATEWAY, FAR_HOST, FAR4, FAR6, GATEWAY, GATEWAY4, GATEWAY6, HOST, IFINDEX,
        NOBODY4, OUTSIDE4, frame4, frame6, network, six, with,
    },
    support::alone,
};

/// Where things are in a tunnelled frame.
const OUTER: usize = 14;
const UDP: usize = OUTER + 20;
const VXLAN: usize = UDP + 8;
const INNER: usize = VXLAN + 8;
const INNER_IP: usize = INNER + 14;

/// A frame in the tunnel, as the other host sends it.
pub(crate) fn tunnelled(identity: u32, frame: &[u8]) -> Vec<u8> {
    tunnelled_between(FAR_HOST, HOST, identity, frame)
}

fn tunnelled_between(from: Ipv4Addr, to: Ipv4Addr, identity: u32, frame: &[u8]) -> Vec<u8> {
    let mac = |address: Ipv4Addr| {
        let [a, b, c, d] = address.octets();
        [0x02, 0x67, a, b, c, d]
    };
    let [_, a, b, c] = identity.to_be_bytes();
    let payload = [&[8, 0, 0, 0, a, b, c, 0], &mac(to)[..], &mac(from), &frame[12..]].concat();
    let headers = PacketBuilder::ethernet2([9; 6], [8; 6])
        .ipv4(from.octets(), to.octets(), 64)
        .udp(50_000, 8472);
    let mut bytes = Vec::with_capacity(headers.size(payload.len()));
    headers.write(&mut bytes, &payload).unwrap();
    with(&bytes, UDP + 6, &[0, 0])
}

/// What a container of the other host sends, and what it is when it is given to the container here.
fn from_far() -> [(Vec<u8>, Vec<u8>); 2] {
    [frame4(FAR4, A.ipv4), frame6(FAR6, six(A))].map(|frame| (tunnelled(7, &frame), frame))
}

pub(crate) fn what_is_for_another_host_goes_into_the_tunnel() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        bench
            .0
            .add(
                &A,
                &Attachment {
                    identity: 0x01_02_03,
                    ..Attachment::default()
                },
            )
            .unwrap();
        let frames = [
            (Program::FromContainer, frame4(A.ipv4, FAR4), 0x01_02_03),
            (Program::FromContainer, frame6(six(A), FAR6), 0x01_02_03),
            (Program::FromContainer, frame4(A.ipv4, FAR_GATEWAY), 0x01_02_03),
            (Program::ToOverlay, frame4(GATEWAY4, FAR4), flynn_dataplane::HOST),
            (Program::ToOverlay, frame6(GATEWAY6, FAR6), flynn_dataplane::HOST),
            (Program::ToOverlay, frame4(A.ipv4, FAR4), 0x01_02_03),
        ];
        let congested = with(&frames[0].1, OUTER + 1, &[0b1010_1001]);
        for (program, frame, identity) in &frames {
            let outcome = bench.not_dropped(*program, frame);
            assert_eq!(outcome.action, Outcome::REDIRECT);
            let expected = tunnelled_between(HOST, FAR_HOST, *identity, frame);
            let port = &outcome.frame[UDP..UDP + 2];
            assert!(port >= &[0xc0, 0][..], "{port:?}");
            assert_eq!(outcome.frame[OUTER..], with(&expected, UDP, port)[OUTER..]);
        }
        // The class of service and the congestion bits are for the network between.
        let outcome = bench.not_dropped(Program::FromContainer, &congested);
        assert_eq!(outcome.frame[OUTER + 1], 0b1010_1001);
        let header = etherparse::Ipv4HeaderSlice::from_slice(&outcome.frame[OUTER..]).unwrap();
        assert_eq!(
            header.header_checksum(),
            header.to_header().calc_header_checksum()
        );

        let [a, _] = bench.traffic();
        assert_eq!(a.sent_packets, 4);
        bench.drops(
            DropReason::ForeignSubnet,
            Program::ToOverlay,
            &frame4(OUTSIDE4, FAR4),
        );
        // Larger than the tunnel: for the stack to cut, if it has not had its chance.
        let large = [frame4(A.ipv4, FAR4), vec![0; 1500]].concat();
        bench.passes(Program::FromContainer, &large);
        let large = [frame4(GATEWAY4, FAR4), vec![0; 1500]].concat();
        bench.drops(DropReason::TooBig, Program::ToOverlay, &large);
    });
}

pub(crate) fn what_came_through_the_tunnel_is_taken_out() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        for (tunnelled, frame) in from_far() {
            let outcome = bench.not_dropped(Program::FromUplink, &tunnelled);
            assert_eq!(outcome.action, Outcome::REDIRECT);
            assert_eq!(outcome.frame[..12], tunnelled[..12]);
            assert_eq!(outcome.frame[14..], frame[14..]);
        }
        assert_eq!(bench.traffic()[0].received_packets, 2);
        // What is for the host itself goes to the device, by which way it ever comes there.
        let [(four, _), _] = from_far();
        bench.passes(Program::FromUplink, &tunnelled(7, &frame4(FAR4, GATEWAY4)));
        let network = Network {
            device: Some(IFINDEX),
            ..network()
        };
        bench.0.configure(&network).unwrap();
        for frame in [frame4(FAR4, GATEWAY4), frame6(FAR6, GATEWAY6)] {
            let outcome = bench.not_dropped(Program::FromUplink, &tunnelled(7, &frame));
            let expected = [&GATEWAY[..], &GATEWAY, &frame[12..]].concat();
            assert_eq!(
                outcome,
                Outcome {
                    action: Outcome::REDIRECT,
                    frame: expected
                }
            );
        }
        // What has a checksum, or options, or is a fragment, is the device's.
        bench.passes(Program::FromUplink, &with(&four, UDP + 6, &[1, 2]));
        bench.passes(Program::FromUplink, &with(&four, OUTER, &[0x46]));
        bench.passes(Program::FromUplink, &with(&four, OUTER + 6, &[0x20, 0]));
        bench.passes(Program::FromUplink, &with(&four, OUTER + 6, &[0, 1]));
    });
}

pub(crate) fn a_direct_host_needs_no_tunnel() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        let frame = frame4(FAR4, A.ipv4);
        bench.drops(DropReason::NotTunnelled, Program::FromUplink, &frame);
        bench.0.set_hosts(&[Host { direct: true, ..FAR }]).unwrap();
        bench.goes_to(&A, Program::FromUplink, &frame);
        bench.passes(Program::FromUplink, &frame4(FAR4, GATEWAY4));
        bench.drops(
            DropReason::NoEndpoint,
            Program::FromUplink,
            &frame4(FAR4, NOBODY4),
        );
        bench.drops(
            DropReason::Malformed,
            Program::FromUplink,
            &with(&frame, 14, &[0x44]),
        );
        let outcome = bench.not_dropped(Program::FromContainer, &frame4(A.ipv4, FAR4));
        assert_eq!(
            outcome,
            Outcome {
                action: Outcome::REDIRECT,
                frame: frame4(A.ipv4, FAR4)
            }
        );
        // IPv6 goes through the tunnel all the same.
        let outcome = bench.not_dropped(Program::FromContainer, &frame6(six(A), FAR6));
        assert_eq!(outcome.frame.len(), frame6(six(A), FAR6).len() + 50);
        bench.drops(
            DropReason::NotTunnelled,
            Program::FromUplink,
            &frame6(FAR6, six(A)),
        );
    });
}

pub(crate) fn the_way_to_a_host_may_be_missing() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        bench.0.set_hosts(&[Host { way: None, ..FAR }]).unwrap();
        let outcome = bench
            .0
            .dry_run(Program::FromContainer, IFINDEX, &frame4(A.ipv4, FAR4))
            .unwrap();
        assert_eq!(outcome.action, Outcome::DROP);
        bench.drops(DropReason::NoRoute, Program::ToOverlay, &frame4(GATEWAY4, FAR4));
        bench.0.set_hosts(&[]).unwrap();
        bench.drops(
            DropReason::NoEndpoint,
            Program::FromContainer,
            &frame4(A.ipv4, FAR4),
        );
        for (tunnelled, _) in from_far() {
            bench.drops(DropReason::UnknownHost, Program::FromUplink, &tunnelled);
        }
    });
}

pub(crate) fn what_must_be_encrypted_is() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        let encrypted = Host {
            encrypted: true,
            ..FAR
        };
        bench.0.set_hosts(&[encrypted]).unwrap();
        assert_eq!(bench.0.hosts(), [encrypted]);
        let frame = frame4(A.ipv4, FAR4);
        let outcome = bench.not_dropped(Program::FromContainer, &frame);
        assert_eq!(outcome.action, Outcome::REDIRECT);
        assert_eq!(outcome.frame.len(), frame.len() + 50);
        // The other host may not have noticed yet.
        for (tunnelled, frame) in from_far() {
            for program in [Program::FromUplink, Program::FromEncrypted] {
                let outcome = bench.not_dropped(program, &tunnelled);
                assert_eq!(outcome.action, Outcome::REDIRECT);
                assert_eq!(outcome.frame[14..], frame[14..]);
            }
        }
        let only = Host {
            only_encrypted: true,
            ..encrypted
        };
        bench.0.set_hosts(&[only]).unwrap();
        assert_eq!(bench.0.hosts(), [only]);
        for (tunnelled, _) in from_far() {
            bench.drops(DropReason::NotEncrypted, Program::FromUplink, &tunnelled);
            let with_checksum = with(&tunnelled, UDP + 6, &[1, 2]);
            bench.drops(DropReason::NotEncrypted, Program::FromUplink, &with_checksum);
            bench.not_dropped(Program::FromEncrypted, &tunnelled);
            // Whoever has a key is held to what is his all the same.
            let stranger = with(&tunnelled, OUTER + 12, &OUTSIDE4.octets());
            bench.drops(DropReason::UnknownHost, Program::FromEncrypted, &stranger);
            let elsewhere = with(&tunnelled, OUTER + 16, &OUTSIDE4.octets());
            bench.drops(DropReason::NotTunnelled, Program::FromEncrypted, &elsewhere);
        }
        for bare in [frame4(FAR4, A.ipv4), frame6(FAR6, six(A))] {
            bench.drops(DropReason::NotTunnelled, Program::FromEncrypted, &bare);
        }
        // Where it cannot be encrypted, it stays here.
        bench.0.set_hosts(&[Host { way: None, ..only }]).unwrap();
        bench.drops(
            DropReason::NotEncrypted,
            Program::ToOverlay,
            &frame4(GATEWAY4, FAR4),
        );
    });
}

pub(crate) fn strangers_and_liars_are_dropped() {
    alone(|bpffs| {
        let bench = Bench::of_two(bpffs);
        let drops = |reason, frame: &[u8]| bench.drops(reason, Program::FromUplink, frame);
        for (tunnelled, frame) in from_far() {
            let stranger = tunnelled_between(OUTSIDE4, HOST, 7, &frame);
            drops(DropReason::UnknownHost, &stranger);
            for (at, bytes) in [
                (VXLAN, [0x0c, 0, 0, 0]),
                (VXLAN, [0, 0, 0, 0]),
                (VXLAN, [0x08, 0, 0, 1]),
            ] {
                drops(DropReason::Malformed, &with(&tunnelled, at, &bytes));
            }
            drops(DropReason::Malformed, &with(&tunnelled, VXLAN + 7, &[1]));
            drops(DropReason::Malformed, &with(&tunnelled, INNER_IP, &[0x33]));
            drops(DropReason::NotIp, &with(&tunnelled, INNER + 12, &[0x08, 0x06]));
            drops(DropReason::Truncated, &tunnelled[..INNER_IP + 10]);
        }
        // The other host, but in the name of this one, of a third one and of somebody outside.
        for source in [A.ipv4, NOBODY4, OUTSIDE4] {
            drops(DropReason::ForeignSubnet, &tunnelled(7, &frame4(source, A.ipv4)));
        }
        drops(DropReason::ForeignSubnet, &tunnelled(7, &frame6(six(A), six(A))));
        drops(DropReason::NoEndpoint, &tunnelled(7, &frame4(FAR4, NOBODY4)));
        drops(DropReason::NoEndpoint, &tunnelled(7, &frame4(FAR4, OUTSIDE4)));
        // Bare packets in the name of the cluster.
        drops(DropReason::NotTunnelled, &frame4(FAR4, A.ipv4));
        drops(DropReason::NotTunnelled, &frame4(A.ipv4, OUTSIDE4));
        drops(DropReason::NotTunnelled, &frame6(FAR6, six(A)));
    });
}

pub(crate) fn congestion_is_told_on() {
    alone(|bpffs| {
        let bench = Bench::of_two(bpffs);
        for (frame, service) in [(frame4(FAR4, A.ipv4), 15), (frame6(FAR6, six(A)), 14)] {
            let capable = if service == 15 {
                with(&frame, 15, &[0x02])
            } else {
                with(&frame, 14, &[0x60, 0x20])
            };
            let congested = |frame: &[u8]| with(&tunnelled(7, frame), OUTER + 1, &[0x03]);
            let outcome = bench.not_dropped(Program::FromUplink, &congested(&capable));
            let marked = if service == 15 { &[0x03][..] } else { &[0x60, 0x30] };
            assert_eq!(outcome.frame[service..service + marked.len()], *marked);
            let outcome = bench
                .0
                .dry_run(Program::FromUplink, IFINDEX, &congested(&frame))
                .unwrap();
            assert_eq!(outcome.action, Outcome::DROP);
        }
        assert!(bench.0.drops().unwrap().contains(&(DropReason::Congested, 2)));
    });
}

pub(crate) fn the_host_s_own_packets_are_left_alone() {
    alone(|bpffs| {
        let bench = Bench::of_two(bpffs);
        let dns = {
            let headers = PacketBuilder::ethernet2([9; 6], [8; 6])
                .ipv4(OUTSIDE4.octets(), HOST.octets(), 64)
                .udp(53, 40_000);
            let mut bytes = Vec::new();
            headers.write(&mut bytes, &[]).unwrap();
            bytes
        };
        let arp = with(&dns, 12, &[0x08, 0x06]);
        // A tunnel of somebody else's, on the way through this host.
        let through = tunnelled_between(FAR_HOST, OUTSIDE4, 7, &frame4(FAR4, A.ipv4));
        let broadcast = with(&dns, 0, &[0xff; 6]);
        for frame in [dns, arp, through, broadcast, frame4(OUTSIDE4, A.ipv4)] {
            bench.passes(Program::FromUplink, &frame);
        }
    });
    alone(|bpffs| {
        // Before there is a network.
        let dataplane = flynn_dataplane::Dataplane::open(&crate::support::pins(bpffs)).unwrap();
        let [(frame, _), _] = from_far();
        let outcome = dataplane.dry_run(Program::FromUplink, IFINDEX, &frame).unwrap();
        assert_eq!(outcome.action, Outcome::NEXT);
    });
}

pub(crate) fn no_change_to_a_tunnelled_frame_makes_it_another_host_s() {
    alone(|bpffs| {
        let bench = Bench::of_two(bpffs);
        let frames = from_far().map(|(tunnelled, _)| Just(tunnelled));
        let [four, six_] = frames;
        let changes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..6);
        let property = (prop_oneof![four, six_], changes, any::<Index>());
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
            let outcome = bench.0.dry_run(Program::FromUplink, IFINDEX, &frame).unwrap();
            match outcome.action {
                Outcome::DROP => {}
                // Congestion is told on in the inner header.
                Outcome::REDIRECT if frame[OUTER + 1] & 3 == 3 => {}
                Outcome::NEXT => prop_assert_eq!(&outcome.frame, &frame),
                _ => {
                    prop_assert_eq!(&frame[OUTER + 12..OUTER + 16], &FAR_HOST.octets());
                    prop_assert_eq!(&outcome.frame[14..], &frame[INNER_IP..]);
                    let (source, destination) = if frame[INNER + 12..INNER_IP] == [0x08, 0x00] {
                        (12, 16)
                    } else {
                        (8 + 12, 24 + 12)
                    };
                    prop_assert_eq!(&frame[INNER_IP + source..][..3], &FAR4.octets()[..3]);
                    let receivers = [A.ipv4.octets(), B.ipv4.octets()];
                    prop_assert!(
                        receivers
                            .iter()
                            .any(|to| frame[INNER_IP + destination..].starts_with(to))
                    );
                }
            }
            Ok(())
        });
        result.unwrap();
    });
}
