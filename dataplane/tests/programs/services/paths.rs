//! Where packets go, and what becomes of answers and errors.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    Icmpv4Type, Icmpv6Type, Ipv4HeaderSlice, NetSlice, PacketBuilder, SlicedPacket, TransportSlice, icmpv4,
    icmpv6,
};
use flynn_dataplane::{
    AppPolicy, Attachment, DropReason, Outcome, Policy, Program, UNKNOWN, service::Instance,
};

use crate::{
    bench::{A, B, FAR4, FAR6, GATEWAY, GATEWAY4, IFINDEX, OUTSIDE4, OUTSIDE6, frame4, six, with},
    support::alone,
    tunnel::tunnelled,
};

use super::world::{
    DATAGRAMS, FAR, Kind, NETWORK6, SERVICE, STREAM, World, back, ends, instance, leader4, out, out_from,
    own, packet, virtual4, virtual6,
};

pub(crate) fn packets_to_a_service_go_to_an_instance_and_back() {
    alone(|bpffs| {
        let world = World::new(bpffs, &[instance(1, B)], None);
        let ways: [(IpAddr, IpAddr); 2] = [
            (virtual4(SERVICE).into(), B.ipv4.into()),
            (virtual6(SERVICE).into(), six(B).into()),
        ];
        let mut packets = 0;
        for (named, real) in ways {
            for [there, answer] in [STREAM, DATAGRAMS] {
                assert_eq!(world.sent(&out(named, there)), real);
                assert_eq!(world.answered(real, answer), named);
                packets += 1;
            }
            for kind in [Kind::Ack, Kind::Fin, Kind::Ack] {
                assert_eq!(world.sent(&out(named, kind)), real);
                assert_eq!(world.answered(real, kind), named);
                packets += 1;
            }
        }
        let datagram = out(virtual4(SERVICE), Kind::UnsummedUdp);
        assert_eq!(world.sent(&datagram), ways[0].1);
        assert_eq!(world.answered(B.ipv4, Kind::UnsummedUdp), ways[0].0);
        packets += 1;
        let [a, b] = world.bench.traffic();
        assert_eq!((a.sent_packets, b.received_packets), (packets, packets));
        assert_eq!((b.sent_packets, a.received_packets), (packets, packets));
        // IPv4 options do not hide the ports.
        let frame = out(virtual4(SERVICE), Kind::Udp);
        let mut frame = [&frame[..34], &[1; 4], &frame[34..]].concat();
        frame[14] = 0x46;
        let length = u16::try_from(frame.len() - 14).unwrap();
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        let mut header = Ipv4HeaderSlice::from_slice(&frame[14..]).unwrap().to_header();
        header.header_checksum = header.calc_header_checksum();
        frame[24..26].copy_from_slice(&header.header_checksum.to_be_bytes());
        assert_eq!(world.sent(&frame), ways[0].1);
    });
}

pub(crate) fn instances_may_be_anywhere() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, &[FAR], None);
        let ways: [(IpAddr, IpAddr); 2] = [
            (virtual4(SERVICE).into(), FAR4.into()),
            (virtual6(SERVICE).into(), FAR6.into()),
        ];
        // In another host's container: through the tunnel, and out of it.
        for (named, real) in ways {
            for [there, answer] in [STREAM, DATAGRAMS] {
                let outcome = world
                    .bench
                    .not_dropped(Program::FromContainer, &out(named, there));
                assert_eq!(outcome.action, Outcome::REDIRECT);
                assert_eq!(ends(&outcome.frame[50..]).1, real);
                let answer = tunnelled(7, &back(B.mac, real, answer));
                assert_eq!(world.given(Program::FromUplink, IFINDEX, &answer), named);
            }
        }
        // On a host itself: by its stack, both ways.
        for (id, host) in [(3, OUTSIDE4.into()), (4, IpAddr::from(GATEWAY4))] {
            let on_host = Instance {
                id,
                address: host,
                address6: None,
            };
            world.set(&[on_host], None);
            let outcome = world
                .bench
                .not_dropped(Program::FromContainer, &out(virtual4(SERVICE), Kind::Syn));
            assert_eq!(outcome.action, Outcome::NEXT);
            assert_eq!(ends(&outcome.frame), (A.ipv4.into(), host));
            let answer = back(B.mac, host, Kind::SynAck);
            assert_eq!(world.given(Program::ToOverlay, IFINDEX, &answer), ways[0].0);
            world.drops(DropReason::NoInstanceOfFamily, &out(virtual6(SERVICE), Kind::Syn));
        }
        let by_ipv6 = Instance {
            id: 5,
            address: OUTSIDE6.into(),
            address6: None,
        };
        world.set(&[by_ipv6], None);
        let outcome = world
            .bench
            .not_dropped(Program::FromContainer, &out(virtual6(SERVICE), Kind::Udp));
        assert_eq!(ends(&outcome.frame).1, IpAddr::from(OUTSIDE6));
        world.drops(DropReason::NoInstanceOfFamily, &out(virtual4(SERVICE), Kind::Udp));
    });
}

/// An ICMP error to A about a packet as it went on: somebody says that nobody listens there.
fn unreachable(from: IpAddr, about: &[u8]) -> Vec<u8> {
    let about = &about[14..];
    let ethernet = PacketBuilder::ethernet2(B.mac, GATEWAY);
    let mut bytes = Vec::new();
    match (from, own(A, from)) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet
            .ipv4(from.octets(), to.octets(), 64)
            .icmpv4(Icmpv4Type::DestinationUnreachable(
                icmpv4::DestUnreachableHeader::Port,
            ))
            .write(&mut bytes, about),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet
            .ipv6(from.octets(), to.octets(), 64)
            .icmpv6(Icmpv6Type::DestinationUnreachable(
                icmpv6::DestUnreachableCode::Port,
            ))
            .write(&mut bytes, about),
        other => panic!("{other:?}"),
    }
    .unwrap();
    bytes
}

pub(crate) fn errors_are_about_what_was_sent() {
    alone(|bpffs| {
        let world = World::new(bpffs, &[instance(1, B)], None);
        let ways: [(IpAddr, IpAddr, IpAddr); 2] = [
            (virtual4(SERVICE).into(), B.ipv4.into(), OUTSIDE4.into()),
            (virtual6(SERVICE).into(), six(B).into(), OUTSIDE6.into()),
        ];
        for (named, real, router) in ways {
            for kind in [Kind::Udp, Kind::Syn] {
                let sent = out(named, kind);
                let went = world.bench.not_dropped(Program::FromContainer, &sent).frame;
                // From the instance, and from somebody on the way to it.
                let answers = [
                    (Program::FromContainer, B.ifindex, real, named),
                    (Program::ToOverlay, IFINDEX, router, router),
                ];
                for (program, ifindex, from, expected) in answers {
                    let outcome = world
                        .bench
                        .0
                        .dry_run(program, ifindex, &unreachable(from, &went))
                        .unwrap();
                    assert_eq!(outcome.action, Outcome::REDIRECT);
                    let sliced = SlicedPacket::from_ethernet(&outcome.frame).unwrap();
                    let (carried, source): (_, IpAddr) =
                        match (sliced.net.unwrap(), sliced.transport.unwrap()) {
                            (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
                                let header = ip.header().to_header();
                                assert_eq!(header.header_checksum, header.calc_header_checksum());
                                let sum = icmp.icmp_type().calc_checksum(icmp.payload());
                                assert_eq!(icmp.header().checksum, sum);
                                let about = Ipv4HeaderSlice::from_slice(icmp.payload()).unwrap().to_header();
                                assert_eq!(about.header_checksum, about.calc_header_checksum());
                                (icmp.payload().to_vec(), ip.header().source_addr().into())
                            }
                            (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                                let header = ip.header().to_header();
                                assert!(icmp.is_checksum_valid(header.source, header.destination));
                                (icmp.payload().to_vec(), ip.header().source_addr().into())
                            }
                            other => panic!("{other:?}"),
                        };
                    assert_eq!(source, expected);
                    // But for the checksum that TCP and UDP have further behind.
                    let header = if named.is_ipv4() { 20 } else { 40 };
                    assert_eq!(carried[..header + 4], sent[14..14 + header + 4]);
                }
            }
        }
        // About what went straight there, and what is none.
        world
            .bench
            .goes_to(&B, Program::FromContainer, &out_from(7, B.ipv4, Kind::Udp));
        let straight = unreachable(B.ipv4.into(), &out_from(7, B.ipv4, Kind::Udp));
        let ping = packet(B.mac, (B.ipv4.into(), 0), (A.ipv4.into(), 0), Kind::Icmp);
        for frame in [straight, ping] {
            let outcome = world
                .bench
                .0
                .dry_run(Program::FromContainer, B.ifindex, &frame)
                .unwrap();
            assert_eq!((outcome.action, outcome.frame), (Outcome::REDIRECT, frame));
        }
    });
}

pub(crate) fn no_packet_leaves_for_a_virtual_address() {
    alone(|bpffs| {
        let world = World::new(bpffs, &[instance(1, B)], None);
        let (named4, named6) = (virtual4(SERVICE), virtual6(SERVICE));
        let beyond = Ipv6Addr::from_bits(NETWORK6.to_bits() + (1 << 40));
        let nobodys: [IpAddr; 6] = [
            virtual4(4).into(),
            leader4(SERVICE).into(),
            virtual4(0).into(),
            Ipv4Addr::new(100, 101, 255, 255).into(),
            virtual6(4).into(),
            beyond.into(),
        ];
        for address in nobodys {
            world.refuses(DropReason::NoInstance, &out(address, Kind::Syn));
            world.drops(DropReason::NoInstance, &out(address, Kind::Udp));
        }
        for named in [IpAddr::V4(named4), named6.into()] {
            for kind in [Kind::Ack, Kind::SynAck, Kind::Fin] {
                world.refuses(DropReason::UnknownConnection, &out(named, kind));
            }
            world.drops(DropReason::UnknownConnection, &out(named, Kind::Rst));
        }
        for kind in [Kind::Icmp, Kind::Other] {
            world.drops(DropReason::NotTranslatable, &out(named4, kind));
            world.drops(DropReason::NotTranslatable, &out(named6, kind));
        }
        // Fragments, the first and a later one.
        for fragment in [[0x20, 0x00], [0x20, 0x10], [0x00, 0x10]] {
            let frame = with(&out(named4, Kind::Udp), 20, &fragment);
            world.drops(DropReason::NotTranslatable, &frame);
        }
        for offset in [[0, 1], [0, 9], [0, 8]] {
            let frame = out(named6, Kind::Udp);
            let header = [17, 0, offset[0], offset[1], 0, 0, 0, 1];
            let frame = [&with(&frame[..54], 20, &[44]), &header[..], &frame[54..]].concat();
            world.drops(DropReason::NotTranslatable, &frame);
        }
        for (frame, most) in [(out(named4, Kind::Udp), 8), (out(named4, Kind::Syn), 18)] {
            for length in 34..34 + most {
                let outcome = world
                    .bench
                    .0
                    .dry_run(Program::FromContainer, IFINDEX, &frame[..length]);
                assert_eq!(outcome.unwrap().action, Outcome::DROP, "{length}");
            }
        }
        // The addresses beside the network are anybody's.
        world.bench.passes(
            Program::FromContainer,
            &frame4(A.ipv4, Ipv4Addr::new(100, 102, 0, 0)),
        );
    });
}

pub(crate) fn whoever_is_behind_an_address_obeys_the_policy() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, &[instance(1, B)], None);
        let system = Attachment {
            identity: 7,
            system: true,
            ..Attachment::default()
        };
        world.bench.0.add(&B, &system).unwrap();
        let dropped = |world: &World, reason, frame: &[u8]| {
            let count = |world: &World| {
                let drops = world.bench.0.drops().unwrap();
                drops
                    .into_iter()
                    .find_map(|(of, count)| (of == reason).then_some(count))
                    .unwrap()
            };
            let before = count(world);
            let outcome = world
                .bench
                .0
                .dry_run(Program::FromContainer, IFINDEX, frame)
                .unwrap();
            assert_eq!((outcome.action, count(world)), (Outcome::DROP, before + 1));
        };
        for named in [IpAddr::V4(virtual4(SERVICE)), virtual6(SERVICE).into()] {
            dropped(&world, DropReason::PortClosed, &out(named, Kind::Syn));
            dropped(&world, DropReason::PortClosed, &out(named, Kind::Udp));
        }
        let isolated = Attachment {
            identity: 7,
            ..Attachment::default()
        };
        world.bench.0.add(&B, &isolated).unwrap();
        let mut policy = Policy::default();
        let app = AppPolicy {
            isolated: true,
            system: false,
        };
        policy.apps.insert(7, app);
        world.bench.0.set_policy(&policy).unwrap();
        dropped(&world, DropReason::Isolated, &out(virtual4(SERVICE), Kind::Syn));
        assert_ne!(UNKNOWN, 7);
    });
}
