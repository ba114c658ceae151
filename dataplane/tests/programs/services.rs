//! Services' virtual addresses in packets, which have come past the sockets.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use etherparse::{
    Icmpv4Type, Icmpv6Type, IpNumber, Ipv4HeaderSlice, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
    icmpv4, icmpv6,
};
use flynn_dataplane::{
    AppPolicy, Attachment, Container, DropReason, Outcome, Policy, Prefix, Program, UNKNOWN,
    service::{Instance, Services},
};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};

use crate::{
    bench::{A, B, Bench, FAR4, FAR6, GATEWAY, GATEWAY4, IFINDEX, OUTSIDE4, OUTSIDE6, frame4, six, with},
    support::{alone, ip, pins},
    tunnel::tunnelled,
};

const NETWORK4: Prefix<Ipv4Addr> = Prefix {
    address: Ipv4Addr::new(100, 101, 0, 0),
    length: 16,
};
const NETWORK6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6c79, 0x6e73, 0, 0, 0, 0, 0);
const SERVICE: u16 = 5;
const PORT: u16 = 80;
const CLIENT: u16 = 40_000;

fn virtual4(number: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(NETWORK4.address.to_bits() + 2 * u32::from(number))
}

fn virtual6(number: u16) -> Ipv6Addr {
    Ipv6Addr::from_bits(NETWORK6.to_bits() + 2 * u128::from(number))
}

fn leader4(number: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(virtual4(number).to_bits() + 1)
}

fn instance(id: u64, container: Container) -> Instance {
    Instance {
        id,
        address: container.ipv4.into(),
        address6: container.ipv6,
    }
}

const FAR: Instance = Instance {
    id: 9,
    address: IpAddr::V4(FAR4),
    address6: Some(FAR6),
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Syn,
    SynAck,
    Ack,
    Fin,
    Rst,
    Udp,
    UnsummedUdp,
    Icmp,
    Other,
}

const STREAM: [Kind; 2] = [Kind::Syn, Kind::SynAck];
const DATAGRAMS: [Kind; 2] = [Kind::Udp, Kind::Udp];

fn packet(mac: [u8; 6], from: (IpAddr, u16), to: (IpAddr, u16), kind: Kind) -> Vec<u8> {
    const PAYLOAD: &[u8] = b"payload";
    let ethernet = PacketBuilder::ethernet2(mac, GATEWAY);
    let ip = match (from.0, to.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => panic!("one family"),
    };
    let mut bytes = Vec::new();
    let (source, destination) = (from.1, to.1);
    let written = match kind {
        Kind::Syn => ip.tcp(source, destination, 1, 1).syn().write(&mut bytes, &[]),
        Kind::SynAck => ip
            .tcp(source, destination, 1, 1)
            .syn()
            .ack(2)
            .write(&mut bytes, &[]),
        Kind::Ack => ip
            .tcp(source, destination, 1, 1)
            .ack(2)
            .write(&mut bytes, PAYLOAD),
        Kind::Fin => ip
            .tcp(source, destination, 1, 1)
            .ack(2)
            .fin()
            .write(&mut bytes, &[]),
        Kind::Rst => ip.tcp(source, destination, 1, 1).rst().write(&mut bytes, &[]),
        Kind::Udp | Kind::UnsummedUdp => ip.udp(source, destination).write(&mut bytes, PAYLOAD),
        Kind::Icmp if from.0.is_ipv4() => ip.icmpv4_echo_request(1, 1).write(&mut bytes, PAYLOAD),
        Kind::Icmp => ip.icmpv6_echo_request(1, 1).write(&mut bytes, PAYLOAD),
        Kind::Other => ip.write(&mut bytes, IpNumber::SCTP, &[0; 20]),
    };
    written.unwrap();
    if kind == Kind::UnsummedUdp {
        bytes = with(&bytes, 14 + 20 + 6, &[0, 0]);
    }
    bytes
}

/// What the container A sends to port 80 of an address.
fn out(to: impl Into<IpAddr>, kind: Kind) -> Vec<u8> {
    out_from(CLIENT, to, kind)
}

fn out_from(port: u16, to: impl Into<IpAddr>, kind: Kind) -> Vec<u8> {
    let to = to.into();
    packet(A.mac, (own(A, to), port), (to, PORT), kind)
}

/// What somebody answers to it.
fn back(mac: [u8; 6], from: impl Into<IpAddr>, kind: Kind) -> Vec<u8> {
    let from = from.into();
    packet(mac, (from, PORT), (own(A, from), CLIENT), kind)
}

fn own(container: Container, family: IpAddr) -> IpAddr {
    if family.is_ipv4() {
        container.ipv4.into()
    } else {
        six(container).into()
    }
}

/// The addresses of a frame whose checksums are right.
fn ends(frame: &[u8]) -> (IpAddr, IpAddr) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let (source, destination) = match sliced.net.unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            )
        }
        NetSlice::Ipv6(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        NetSlice::Arp(_) => panic!("neither IPv4 nor IPv6"),
    };
    let sums = match (sliced.transport.unwrap(), source, destination) {
        (TransportSlice::Tcp(tcp), IpAddr::V4(a), IpAddr::V4(b)) => (
            tcp.checksum(),
            tcp.calc_checksum_ipv4(a.octets(), b.octets()).unwrap(),
        ),
        (TransportSlice::Tcp(tcp), IpAddr::V6(a), IpAddr::V6(b)) => (
            tcp.checksum(),
            tcp.to_header()
                .calc_checksum_ipv6_raw(a.octets(), b.octets(), tcp.payload())
                .unwrap(),
        ),
        (TransportSlice::Udp(udp), IpAddr::V4(_), IpAddr::V4(_)) if udp.checksum() == 0 => (0, 0),
        (TransportSlice::Udp(udp), IpAddr::V4(a), IpAddr::V4(b)) => (
            udp.checksum(),
            udp.to_header()
                .calc_checksum_ipv4_raw(a.octets(), b.octets(), udp.payload())
                .unwrap(),
        ),
        (TransportSlice::Udp(udp), IpAddr::V6(a), IpAddr::V6(b)) => (
            udp.checksum(),
            udp.to_header()
                .calc_checksum_ipv6_raw(a.octets(), b.octets(), udp.payload())
                .unwrap(),
        ),
        other => panic!("{other:?}"),
    };
    assert_eq!(sums.0, sums.1, "the checksum");
    (source, destination)
}

struct World {
    bench: Bench,
    services: Services,
}

impl World {
    fn new(bpffs: &Path, instances: &[Instance], leader: Option<Instance>) -> Self {
        // The kernel looks for the interface that a packet comes by.
        ip(&[
            "link",
            "add",
            "name",
            "b",
            "index",
            &B.ifindex.to_string(),
            "type",
            "veth",
        ]);
        let bench = Bench::of_two(bpffs);
        let mut services = Services::open(&pins(bpffs)).unwrap();
        services.configure(NETWORK4, NETWORK6).unwrap();
        services.set(SERVICE.into(), instances, leader).unwrap();
        Self { bench, services }
    }

    fn set(&mut self, instances: &[Instance], leader: Option<Instance>) {
        self.services.set(SERVICE.into(), instances, leader).unwrap();
    }

    /// Where a packet of A's comes out, by its destination.
    fn sent(&self, frame: &[u8]) -> IpAddr {
        let outcome = self.bench.not_dropped(Program::FromContainer, frame);
        assert_eq!(outcome.action, Outcome::REDIRECT);
        // The addresses are all that changes, and what covers them.
        assert_eq!(outcome.frame.len(), frame.len());
        assert_eq!(outcome.frame[..14], frame[..14]);
        let (source, destination) = ends(&outcome.frame);
        assert_eq!(source, own(A, destination));
        destination
    }

    /// From whom a packet is that a program gives to A.
    fn given(&self, program: Program, ifindex: u32, frame: &[u8]) -> IpAddr {
        let drops = self.bench.0.drops().unwrap();
        let outcome = self.bench.0.dry_run(program, ifindex, frame).unwrap();
        assert_eq!(self.bench.0.drops().unwrap(), drops);
        assert_eq!(outcome.action, Outcome::REDIRECT);
        let mut frame = outcome.frame;
        // What was taken out of a tunnel has the outer Ethernet header, which nobody looks at any more.
        let is_ipv4 = frame[14] >> 4 == 4;
        frame[12..14].copy_from_slice(if is_ipv4 { &[0x08, 0x00] } else { &[0x86, 0xdd] });
        let (source, destination) = ends(&frame);
        assert_eq!(destination, own(A, source));
        source
    }

    fn answered(&self, from: impl Into<IpAddr>, kind: Kind) -> IpAddr {
        self.given(Program::FromContainer, B.ifindex, &back(B.mac, from, kind))
    }

    fn drops(&self, reason: DropReason, frame: &[u8]) {
        self.bench.drops(reason, Program::FromContainer, frame);
    }

    /// The packet is counted as dropped, and its sender is told so by a reset.
    fn refuses(&self, reason: DropReason, frame: &[u8]) {
        let mut expected = self.bench.0.drops().unwrap();
        for (found, count) in &mut expected {
            *count += u64::from(*found == reason);
        }
        let traffic = self.bench.traffic();
        let outcome = self
            .bench
            .0
            .dry_run(Program::FromContainer, IFINDEX, frame)
            .unwrap();
        assert_eq!(self.bench.0.drops().unwrap(), expected, "{}", reason.name());
        assert_eq!(self.bench.traffic(), traffic);
        assert_eq!(outcome.action, Outcome::REDIRECT);
        let (there, back) = (ends(frame), ends(&outcome.frame));
        assert_eq!(back, (there.1, there.0));
        let [sent, answer] = [frame, &outcome.frame].map(|frame| {
            match SlicedPacket::from_ethernet(frame).unwrap().transport {
                Some(TransportSlice::Tcp(tcp)) => tcp.to_header(),
                other => panic!("{other:?}"),
            }
        });
        let at = if there.0.is_ipv4() { 34 } else { 54 };
        assert_eq!(outcome.frame.len(), at + 20);
        assert_eq!(
            (answer.source_port, answer.destination_port),
            (sent.destination_port, sent.source_port)
        );
        assert!(answer.rst && !answer.syn && !answer.fin);
        if sent.ack {
            assert_eq!(
                (answer.ack, answer.sequence_number),
                (false, sent.acknowledgment_number)
            );
        } else {
            assert_eq!(
                (answer.ack, answer.acknowledgment_number),
                (true, sent.sequence_number + 1)
            );
        }
    }
}

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

pub(crate) fn flows_stay_with_their_instance() {
    alone(|bpffs| {
        let both = [instance(1, B), FAR];
        let mut world = World::new(bpffs, &both, Some(instance(1, B)));
        let named = virtual4(SERVICE);
        let target = |world: &World, frame: &[u8]| {
            let outcome = world.bench.not_dropped(Program::FromContainer, frame);
            assert_eq!(outcome.action, Outcome::REDIRECT);
            let inner = if outcome.frame.len() == frame.len() { 0 } else { 50 };
            ends(&outcome.frame[inner..]).1
        };
        // New flows are spread, the packets of each stay together, and so do SYNs that are sent again.
        for kind in [Kind::Syn, Kind::Udp] {
            let mut found = HashSet::new();
            for port in 2000..2040 {
                let frame = out_from(port, named, kind);
                let first = target(&world, &frame);
                assert!((0..5).all(|_| target(&world, &frame) == first));
                if kind == Kind::Syn {
                    assert_eq!(target(&world, &out_from(port, named, Kind::Ack)), first);
                }
                found.insert(first);
            }
            assert_eq!(found.len(), 2, "all of 40 at one of two");
        }
        // The leader is another address.
        assert_eq!(
            target(&world, &out(leader4(SERVICE), Kind::Syn)),
            IpAddr::from(B.ipv4)
        );
        assert_eq!(
            target(&world, &out(leader4(SERVICE), Kind::Udp)),
            IpAddr::from(B.ipv4)
        );

        // A deposed leader, and an instance that has left: what is connected stays until user space says otherwise,
        // datagrams move.
        world.set(&[FAR], Some(FAR));
        assert_eq!(
            target(&world, &out(leader4(SERVICE), Kind::Ack)),
            IpAddr::from(B.ipv4)
        );
        assert_eq!(
            target(&world, &out(leader4(SERVICE), Kind::Udp)),
            IpAddr::from(FAR4)
        );
        assert_eq!(
            target(&world, &out_from(2000, named, Kind::Udp)),
            IpAddr::from(FAR4)
        );
        let port = (2000..2040)
            .find(|port| target(&world, &out_from(*port, named, Kind::Ack)) == B.ipv4)
            .unwrap();
        let is_deposed = |flow: &flynn_dataplane::service::Flow| flow.leader && flow.instance == 1;
        assert_eq!(world.services.sever_packets(is_deposed, &[]).unwrap(), 1);
        world.refuses(DropReason::UnknownConnection, &out(leader4(SERVICE), Kind::Ack));
        assert_eq!(
            target(&world, &out_from(port, named, Kind::Ack)),
            IpAddr::from(B.ipv4)
        );
        // One that is dead, by its address.
        let dead = SocketAddr::from((B.ipv4, PORT));
        assert!(world.services.sever_packets(|_| false, &[dead]).unwrap() > 0);
        world.refuses(DropReason::UnknownConnection, &out_from(port, named, Kind::Ack));
        assert_eq!(world.services.sever_packets(|_| false, &[dead]).unwrap(), 0);
        // What begins anew goes to who is there.
        assert_eq!(
            target(&world, &out_from(port, named, Kind::Syn)),
            IpAddr::from(FAR4)
        );
        assert_eq!(
            target(&world, &out(leader4(SERVICE), Kind::Syn)),
            IpAddr::from(FAR4)
        );
    });
}

pub(crate) fn a_port_reaches_an_instance_once() {
    alone(|bpffs| {
        let world = World::new(bpffs, &[instance(1, B)], Some(instance(1, B)));
        let (named, leader) = (virtual4(SERVICE), leader4(SERVICE));
        for (kind, reason) in [
            (Kind::Syn, DropReason::PortInUse),
            (Kind::Udp, DropReason::PortInUse),
        ] {
            world.sent(&out(named, kind));
            world.drops(reason, &out(leader, kind));
            assert_eq!(world.answered(B.ipv4, kind), IpAddr::from(named), "{kind:?}");
            // Another port is another flow.
            world.sent(&out_from(CLIENT + 1, leader, kind));
        }
        // Once it is over the port is free, whoever has ended it.
        world.sent(&out(named, Kind::Fin));
        world.sent(&out(leader, Kind::Syn));
        assert_eq!(world.answered(B.ipv4, Kind::SynAck), IpAddr::from(leader));
        world.refuses(DropReason::UnknownConnection, &out(named, Kind::Ack));
        assert_eq!(world.answered(B.ipv4, Kind::Rst), IpAddr::from(leader));
        world.sent(&out(named, Kind::Syn));
        assert_eq!(world.answered(B.ipv4, Kind::SynAck), IpAddr::from(named));
        // What goes straight to the instance is answered straight, then and after.
        for kind in [Kind::Syn, Kind::Udp] {
            world
                .bench
                .goes_to(&B, Program::FromContainer, &out(B.ipv4, kind));
            assert_eq!(world.answered(B.ipv4, kind), IpAddr::from(B.ipv4));
        }
        world.refuses(DropReason::UnknownConnection, &out(named, Kind::Ack));
        world.sent(&out(named, Kind::Udp));
        assert_eq!(world.answered(B.ipv4, Kind::Udp), IpAddr::from(named));
    });
}

pub(crate) fn what_user_space_writes_ends_no_flow() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, &[instance(1, B)], None);
        let named = [IpAddr::V4(virtual4(SERVICE)), virtual6(SERVICE).into()];
        // Nobody looks for flows of a container that has none.
        assert_eq!(world.answered(B.ipv4, Kind::SynAck), IpAddr::from(B.ipv4));
        for named in named {
            world.sent(&out(named, Kind::Syn));
        }
        let is = |identity| Attachment {
            identity,
            ..Attachment::default()
        };
        for identity in [3, 4] {
            world.bench.0.add(&A, &is(identity)).unwrap();
            assert_eq!(world.answered(B.ipv4, Kind::SynAck), named[0]);
            assert_eq!(world.answered(six(B), Kind::SynAck), named[1]);
        }
        // Another process.
        drop(world);
        let mut world = World {
            bench: Bench::of_two(bpffs),
            services: Services::open(&pins(bpffs)).unwrap(),
        };
        world.bench.0.add(&A, &is(5)).unwrap();
        for (named, real) in named.into_iter().zip([IpAddr::V4(B.ipv4), six(B).into()]) {
            assert_eq!(world.answered(real, Kind::SynAck), named);
            assert_eq!(world.sent(&out(named, Kind::Ack)), real);
        }
        assert_eq!(world.services.sever_packets(|_| true, &[]).unwrap(), 2);
        // A container that goes takes the mark along.
        world.bench.0.remove(A.ipv4, A.ipv6).unwrap();
        world.bench.0.add(&A, &is(5)).unwrap();
        assert_eq!(world.answered(B.ipv4, Kind::SynAck), IpAddr::from(B.ipv4));
    });
}

pub(crate) fn no_instance_is_a_way_out() {
    alone(|bpffs| {
        let mut world = World::new(bpffs, &[instance(1, A)], None);
        // Itself, and what is virtual in turn.
        world.refuses(DropReason::NoInstance, &out(virtual4(SERVICE), Kind::Syn));
        world.refuses(DropReason::NoInstance, &out(virtual6(SERVICE), Kind::Syn));
        let virtual_too = Instance {
            id: 2,
            address: virtual4(77).into(),
            address6: Some(virtual6(77)),
        };
        world.set(&[virtual_too], None);
        world.refuses(DropReason::NoInstance, &out(virtual4(SERVICE), Kind::Syn));
        world.drops(DropReason::NoInstance, &out(virtual6(SERVICE), Kind::Udp));
    });
}

pub(crate) fn no_change_to_a_packet_gets_it_past_its_bounds() {
    alone(|bpffs| {
        let world = World::new(bpffs, &[instance(1, B), FAR], Some(instance(1, B)));
        let frames = [Kind::Syn, Kind::Ack, Kind::Udp]
            .into_iter()
            .flat_map(|kind| [out(virtual4(SERVICE), kind), out(virtual6(SERVICE), kind)]);
        let frames = prop::sample::select(frames.collect::<Vec<_>>());
        let changes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..6);
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 4000,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let result = runner.run(&(frames, changes, any::<Index>()), |(mut frame, changes, cut)| {
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            let shortest = if frame[12..14] == [0x86, 0xdd] { 54 } else { 34 };
            frame.truncate(shortest.max(cut.index(frame.len() * 2)));
            let dropped = || {
                world
                    .bench
                    .0
                    .drops()
                    .unwrap()
                    .iter()
                    .map(|(_, count)| count)
                    .sum::<u64>()
            };
            let before = dropped();
            let outcome = world
                .bench
                .0
                .dry_run(Program::FromContainer, IFINDEX, &frame)
                .unwrap();
            if outcome.action == Outcome::DROP {
                return Ok(());
            }
            let (fixed, destination) = match frame[12..14] {
                [0x08, 0x00] => (26..30, 30..34),
                _ => (22..38, 38..54),
            };
            if dropped() > before {
                // Refused: that is for the sender alone.
                prop_assert_eq!(outcome.frame.len(), destination.end + 20);
                prop_assert_eq!(&outcome.frame[destination], &frame[fixed]);
                return Ok(());
            }
            let after = &outcome.frame[outcome.frame.len() - frame.len()..];
            prop_assert_eq!(&after[fixed.clone()], &frame[fixed]);
            let is_virtual = |address: &[u8]| {
                address[..2] == [100, 101] && address.len() == 4
                    || address.len() == 16 && address[..8] == NETWORK6.octets()[..8]
            };
            prop_assert!(!is_virtual(&after[destination.clone()]), "{:02x?}", after);
            if is_virtual(&frame[destination.clone()]) {
                let to = &after[destination];
                let instances: [&[u8]; 4] =
                    [&B.ipv4.octets(), &six(B).octets(), &FAR4.octets(), &FAR6.octets()];
                prop_assert!(instances.contains(&to), "{:?}", to);
            } else {
                prop_assert_eq!(&after[14..], &frame[14..]);
            }
            Ok(())
        });
        result.unwrap();
    });
}
