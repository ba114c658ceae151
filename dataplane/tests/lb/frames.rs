//! Frames of all kinds, and what is in them.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice, ip_number};
use flynn_dataplane::VXLAN_PORT;

use crate::bench::{BACKEND_PORT, CLIENT4, CLIENT6, OTHER, PORT, ROUTER_MAC, UPLINK_MAC, US, VIP4, VIP6};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Syn,
    SynAck,
    Ack,
    Fin,
    Rst,
    Udp,
}

/// A frame of a kind between two addresses of one family with their ports.
pub(crate) fn frame(kind: Kind, from: (IpAddr, u16), to: (IpAddr, u16), payload: usize) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(ROUTER_MAC, UPLINK_MAC);
    match (from.0, to.0) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header =
                etherparse::Ipv4Header::new(0, 64, ip_number::TCP, source.octets(), destination.octets())
                    .unwrap();
            header.dont_fragment = true;
            build(
                kind,
                ethernet.ip(etherparse::IpHeaders::Ipv4(
                    header,
                    etherparse::Ipv4Extensions::default(),
                )),
                from.1,
                to.1,
                payload,
            )
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => build(
            kind,
            ethernet.ipv6(source.octets(), destination.octets(), 64),
            from.1,
            to.1,
            payload,
        ),
        _ => panic!("two families"),
    }
}

pub(crate) fn build(
    kind: Kind,
    ip: PacketBuilderStep<etherparse::IpHeaders>,
    from: u16,
    to: u16,
    payload: usize,
) -> Vec<u8> {
    let payload = vec![0x5a; payload];
    let mut frame = Vec::new();
    let mss = [etherparse::TcpOptionElement::MaximumSegmentSize(1460)];
    match kind {
        Kind::Syn => ip
            .tcp(from, to, 1, 1000)
            .syn()
            .options(&mss)
            .unwrap()
            .write(&mut frame, &payload),
        Kind::SynAck => ip
            .tcp(from, to, 1, 1000)
            .syn()
            .ack(2)
            .options(&mss)
            .unwrap()
            .write(&mut frame, &payload),
        Kind::Ack => ip.tcp(from, to, 1, 1000).ack(2).write(&mut frame, &payload),
        Kind::Fin => ip.tcp(from, to, 1, 1000).ack(2).fin().write(&mut frame, &payload),
        Kind::Rst => ip.tcp(from, to, 1, 1000).rst().write(&mut frame, &payload),
        Kind::Udp => ip.udp(from, to).write(&mut frame, &payload),
    }
    .unwrap();
    frame
}

pub(crate) fn question4(kind: Kind, port: u16) -> Vec<u8> {
    frame(kind, (CLIENT4.into(), port), (VIP4.into(), PORT), 10)
}

pub(crate) fn question6(kind: Kind, port: u16) -> Vec<u8> {
    frame(kind, (CLIENT6.into(), port), (VIP6.into(), PORT), 10)
}

/// An ICMP error from a router about an answer that a client was sent.
pub(crate) fn error4(about: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let unreachable = etherparse::Icmpv4Type::DestinationUnreachable(
        etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 },
    );
    PacketBuilder::ethernet2(ROUTER_MAC, UPLINK_MAC)
        .ipv4([203, 0, 113, 1], VIP4.octets(), 64)
        .icmpv4(unreachable)
        .write(&mut out, &about[14..42])
        .unwrap();
    out
}

pub(crate) fn error6(about: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    PacketBuilder::ethernet2(ROUTER_MAC, UPLINK_MAC)
        .ipv6(CLIENT6.octets(), VIP6.octets(), 64)
        .icmpv6(etherparse::Icmpv6Type::PacketTooBig { mtu: 1400 })
        .write(&mut out, &about[14..])
        .unwrap();
    out
}

/// Source and destination of a frame.
pub(crate) fn ends(frame: &[u8]) -> ((IpAddr, u16), (IpAddr, u16)) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (source, destination) = match packet.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => (
            IpAddr::V4(ip.header().source_addr()),
            IpAddr::V4(ip.header().destination_addr()),
        ),
        etherparse::NetSlice::Ipv6(ip) => (
            IpAddr::V6(ip.header().source_addr()),
            IpAddr::V6(ip.header().destination_addr()),
        ),
        etherparse::NetSlice::Arp(_) => panic!("ARP"),
    };
    let (from, to) = match packet.transport.unwrap() {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port()),
        TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port()),
        other => panic!("{other:?}"),
    };
    ((source, from), (destination, to))
}

/// Sees that the frame's checksums are right.
pub(crate) fn check(frame: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    match packet.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(
                header.to_header().calc_header_checksum(),
                header.header_checksum()
            );
            let (source, destination) = (header.source(), header.destination());
            match packet.transport.unwrap() {
                TransportSlice::Tcp(tcp) => {
                    assert_eq!(
                        tcp.calc_checksum_ipv4(source, destination).unwrap(),
                        tcp.checksum()
                    );
                }
                TransportSlice::Udp(udp) if udp.checksum() != 0 => {
                    let right = udp
                        .to_header()
                        .calc_checksum_ipv4_raw(source, destination, udp.payload());
                    assert_eq!(right.unwrap(), udp.checksum());
                }
                TransportSlice::Udp(_) => {}
                TransportSlice::Icmpv4(icmp) => {
                    let right = etherparse::checksum::Sum16BitWords::new().add_slice(icmp.slice());
                    assert_eq!(right.ones_complement(), 0);
                }
                other => panic!("{other:?}"),
            }
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let (source, destination) = (ip.header().source(), ip.header().destination());
            match packet.transport.unwrap() {
                TransportSlice::Tcp(tcp) => {
                    assert_eq!(
                        tcp.calc_checksum_ipv6(source, destination).unwrap(),
                        tcp.checksum()
                    );
                }
                TransportSlice::Udp(udp) => {
                    let right = udp
                        .to_header()
                        .calc_checksum_ipv6_raw(source, destination, udp.payload());
                    assert_eq!(right.unwrap(), udp.checksum());
                }
                TransportSlice::Icmpv6(icmp) => {
                    let right = icmp
                        .icmp_type()
                        .calc_checksum(source, destination, icmp.payload())
                        .unwrap();
                    assert_eq!(right, icmp.checksum(), "{frame:02x?}");
                }
                other => panic!("{other:?}"),
            }
        }
        etherparse::NetSlice::Arp(_) => panic!("ARP"),
    }
}

/// What a tunnelled frame carries: the header in front, and the frame.
pub(crate) fn inner(frame: &[u8]) -> ([u8; 8], Vec<u8>) {
    let ((source, _), (destination, port)) = ends(frame);
    assert_eq!((source, destination, port), (US.into(), OTHER.into(), VXLAN_PORT));
    (frame[42..50].try_into().unwrap(), frame[50..].to_vec())
}

/// As the other host would send it to us.
pub(crate) fn tunnelled(header: [u8; 8], frame: &[u8]) -> Vec<u8> {
    let payload = [&header[..], frame].concat();
    let mut out = Vec::new();
    PacketBuilder::ethernet2(ROUTER_MAC, UPLINK_MAC)
        .ipv4(OTHER.octets(), US.octets(), 64)
        .udp(50000, VXLAN_PORT)
        .write(&mut out, &payload)
        .unwrap();
    out
}

pub(crate) fn forward(flags: u8, to: Ipv4Addr) -> [u8; 8] {
    let [a, b, c, d] = to.octets();
    let [high, low] = BACKEND_PORT.to_be_bytes();
    [0x81, flags, high, low, a, b, c, d]
}

/// The same with other bytes at a place.
pub(crate) fn with(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}
