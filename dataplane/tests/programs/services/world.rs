//! A host with a service, and what goes to its virtual addresses.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use etherparse::{IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use flynn_dataplane::{
    Container, DropReason, Outcome, Prefix, Program,
    service::{Instance, Services},
};

use crate::{
    bench::{A, B, Bench, FAR4, FAR6, GATEWAY, IFINDEX, six, with},
    support::{ip, pins},
};

pub(super) const NETWORK4: Prefix<Ipv4Addr> = Prefix {
    address: Ipv4Addr::new(100, 101, 0, 0),
    length: 16,
};
pub(super) const NETWORK6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6c79, 0x6e73, 0, 0, 0, 0, 0);
pub(super) const SERVICE: u16 = 5;
pub(super) const PORT: u16 = 80;
pub(super) const CLIENT: u16 = 40_000;

pub(super) fn virtual4(number: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(NETWORK4.address.to_bits() + 2 * u32::from(number))
}

pub(super) fn virtual6(number: u16) -> Ipv6Addr {
    Ipv6Addr::from_bits(NETWORK6.to_bits() + 2 * u128::from(number))
}

pub(super) fn leader4(number: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(virtual4(number).to_bits() + 1)
}

pub(super) fn instance(id: u64, container: Container) -> Instance {
    Instance {
        id,
        address: container.ipv4.into(),
        address6: container.ipv6,
    }
}

pub(super) const FAR: Instance = Instance {
    id: 9,
    address: IpAddr::V4(FAR4),
    address6: Some(FAR6),
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
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

pub(super) const STREAM: [Kind; 2] = [Kind::Syn, Kind::SynAck];
pub(super) const DATAGRAMS: [Kind; 2] = [Kind::Udp, Kind::Udp];

pub(super) fn packet(mac: [u8; 6], from: (IpAddr, u16), to: (IpAddr, u16), kind: Kind) -> Vec<u8> {
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
pub(super) fn out(to: impl Into<IpAddr>, kind: Kind) -> Vec<u8> {
    out_from(CLIENT, to, kind)
}

pub(super) fn out_from(port: u16, to: impl Into<IpAddr>, kind: Kind) -> Vec<u8> {
    let to = to.into();
    packet(A.mac, (own(A, to), port), (to, PORT), kind)
}

/// What somebody answers to it.
pub(super) fn back(mac: [u8; 6], from: impl Into<IpAddr>, kind: Kind) -> Vec<u8> {
    let from = from.into();
    packet(mac, (from, PORT), (own(A, from), CLIENT), kind)
}

pub(super) fn own(container: Container, family: IpAddr) -> IpAddr {
    if family.is_ipv4() {
        container.ipv4.into()
    } else {
        six(container).into()
    }
}

/// The addresses of a frame whose checksums are right.
pub(super) fn ends(frame: &[u8]) -> (IpAddr, IpAddr) {
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

pub(super) struct World {
    pub(super) bench: Bench,
    pub(super) services: Services,
}

impl World {
    pub(super) fn new(bpffs: &Path, instances: &[Instance], leader: Option<Instance>) -> Self {
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

    pub(super) fn set(&mut self, instances: &[Instance], leader: Option<Instance>) {
        self.services.set(SERVICE.into(), instances, leader).unwrap();
    }

    /// Where a packet of A's comes out, by its destination.
    pub(super) fn sent(&self, frame: &[u8]) -> IpAddr {
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
    pub(super) fn given(&self, program: Program, ifindex: u32, frame: &[u8]) -> IpAddr {
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

    pub(super) fn answered(&self, from: impl Into<IpAddr>, kind: Kind) -> IpAddr {
        self.given(Program::FromContainer, B.ifindex, &back(B.mac, from, kind))
    }

    pub(super) fn drops(&self, reason: DropReason, frame: &[u8]) {
        self.bench.drops(reason, Program::FromContainer, frame);
    }

    /// The packet is counted as dropped, and its sender is told so by a reset.
    pub(super) fn refuses(&self, reason: DropReason, frame: &[u8]) {
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
