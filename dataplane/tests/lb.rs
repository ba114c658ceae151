//! The load balancer's programs, one packet at a time: named packets, what is decided about each, and what it is like
//! afterwards.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod support;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::{Duration, Instant},
};

use etherparse::{PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice, ip_number};
use flynn_dataplane::{
    Attachment, Container, Dataplane, DropReason, Host, Network, Outcome, Prefix, Program, Protocol,
    VXLAN_PORT, Way,
    lb::{Backend, Balancer, Event, Limits, Mode, Service, Uplink, Vip},
};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};
use support::{alone, ip, pins};

const UPLINK: u32 = 1;
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 9];
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];
const LOCAL: Container = Container {
    ipv4: Ipv4Addr::new(100, 100, 1, 2),
    ipv6: Some(Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0x6464, 0x102)),
    mac: [2, 0, 0, 0, 0, 2],
    ifindex: UPLINK,
};
const REMOTE: Ipv4Addr = Ipv4Addr::new(100, 100, 2, 2);
const US: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const VIP4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const CLIENT4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 7);
const PORT: u16 = 3000;
const BACKEND_PORT: u16 = 8080;

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            ("what_is_not_for_a_vip_goes_on", what_is_not_for_a_vip_goes_on),
            (
                "a_container_here_gets_it_translated",
                a_container_here_gets_it_translated,
            ),
            (
                "another_host_gets_it_through_a_tunnel",
                another_host_gets_it_through_a_tunnel,
            ),
            ("a_tunnelled_packet_arrives", a_tunnelled_packet_arrives),
            ("answers_go_back_as_asked", answers_go_back_as_asked),
            ("flows_stay_while_backends_drain", flows_stay_while_backends_drain),
            ("affinity_is_by_client", affinity_is_by_client),
            (
                "two_vips_and_one_port_of_a_client",
                two_vips_and_one_port_of_a_client,
            ),
            ("errors_find_their_backend", errors_find_their_backend),
            ("too_big_is_answered", too_big_is_answered),
            ("a_flood_is_not_remembered", a_flood_is_not_remembered),
            ("xdp_sends_to_other_hosts", xdp_sends_to_other_hosts),
            (
                "what_was_set_survives_its_process",
                what_was_set_survives_its_process,
            ),
            ("no_packet_passes_a_bound", no_packet_passes_a_bound),
        ],
    )
}

struct Bench {
    dataplane: Dataplane,
    balancer: Balancer,
}

fn uplink() -> Uplink {
    Uplink {
        name: "lo".into(),
        index: UPLINK,
        mtu: 1500,
        mac: UPLINK_MAC,
        is_device: false,
    }
}

fn vip(address: impl Into<IpAddr>, protocol: Protocol) -> Vip {
    Vip {
        address: address.into(),
        port: PORT,
        protocol,
    }
}

fn vips() -> Vec<Vip> {
    [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .flat_map(|protocol| [vip(VIP4, protocol), vip(VIP6, protocol)])
        .collect()
}

fn service(backends: &[Ipv4Addr]) -> Service {
    Service {
        vips: vips(),
        backends: backends
            .iter()
            .map(|address| Backend::new(*address, BACKEND_PORT))
            .collect(),
        ..Service::default()
    }
}

impl Bench {
    fn new(bpffs: &Path) -> Self {
        Self::with(bpffs, uplink(), Mode::Auto, 1000)
    }

    fn with(bpffs: &Path, uplink: Uplink, mode: Mode, flood: u32) -> Self {
        let ifindex = uplink.index;
        let mut dataplane = Dataplane::open(&pins(bpffs)).unwrap();
        dataplane
            .configure(&Network {
                cluster4: Prefix {
                    address: Ipv4Addr::new(100, 100, 0, 0),
                    length: 16,
                },
                cluster6: Some(Prefix {
                    address: Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 0),
                    length: 64,
                }),
                gateway4: Ipv4Addr::new(100, 100, 1, 1),
                gateway6: None,
                subnet_length: 24,
                address: Some(US),
                tunnel_mtu: 1450,
                device: None,
                gateway_mac: GATEWAY,
            })
            .unwrap();
        dataplane.add(&LOCAL, &Attachment::default()).unwrap();
        dataplane.set_hosts(&[host(ifindex, false)]).unwrap();
        let limits = Limits {
            flows: 1 << 12,
            flood,
        };
        let balancer = Balancer::open(&pins(bpffs), uplink, mode, &limits).unwrap();
        Self { dataplane, balancer }
    }

    fn set(&mut self, service: Service) {
        self.balancer.set(&[service]).unwrap();
    }

    fn uplink(&self, frame: &[u8]) -> Outcome {
        self.balancer.dry_run(Program::LbUplink, UPLINK, frame).unwrap()
    }

    fn answer(&self, frame: &[u8]) -> Outcome {
        self.balancer.dry_run(Program::LbAnswer, UPLINK, frame).unwrap()
    }

    /// What comes out, which must go to another interface with all checksums right.
    fn sent(&self, frame: &[u8]) -> Vec<u8> {
        let outcome = self.uplink(frame);
        assert_eq!(outcome.action, Outcome::REDIRECT, "{:?}", self.reasons());
        check(&outcome.frame);
        outcome.frame
    }

    fn answered(&self, frame: &[u8]) -> Vec<u8> {
        let outcome = self.answer(frame);
        assert_eq!(outcome.action, Outcome::REDIRECT, "{:?}", self.reasons());
        check(&outcome.frame);
        outcome.frame
    }

    fn drops(&self, reason: DropReason, frame: &[u8]) {
        let before = self.reasons();
        assert_eq!(self.uplink(frame).action, Outcome::DROP);
        let after = self.reasons();
        let count = |all: &[(DropReason, u64)]| all.iter().find(|(r, _)| *r == reason).unwrap().1;
        assert_eq!(count(&after), count(&before) + 1, "{}", reason.name());
    }

    fn reasons(&self) -> Vec<(DropReason, u64)> {
        self.dataplane.drops().unwrap()
    }

    fn event(&self, event: Event) -> u64 {
        let events = self.balancer.events().unwrap();
        events.iter().find(|(other, _)| *other == event).unwrap().1
    }
}

fn host(ifindex: u32, direct: bool) -> Host {
    Host {
        subnet: Ipv4Addr::new(100, 100, 2, 0),
        address: OTHER,
        direct,
        encrypted: false,
        only_encrypted: false,
        way: Some(Way {
            ifindex,
            next_hop: OTHER,
            source: US,
        }),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Syn,
    SynAck,
    Ack,
    Udp,
}

/// A frame of a kind between two addresses of one family with their ports.
fn frame(kind: Kind, from: (IpAddr, u16), to: (IpAddr, u16), payload: usize) -> Vec<u8> {
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

fn build(
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
        Kind::Udp => ip.udp(from, to).write(&mut frame, &payload),
    }
    .unwrap();
    frame
}

fn question4(kind: Kind, port: u16) -> Vec<u8> {
    frame(kind, (CLIENT4.into(), port), (VIP4.into(), PORT), 10)
}

fn question6(kind: Kind, port: u16) -> Vec<u8> {
    frame(kind, (CLIENT6.into(), port), (VIP6.into(), PORT), 10)
}

/// Source and destination of a frame.
fn ends(frame: &[u8]) -> ((IpAddr, u16), (IpAddr, u16)) {
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
fn check(frame: &[u8]) {
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
                TransportSlice::Icmpv6(icmp) => assert!(icmp.is_checksum_valid(source, destination)),
                other => panic!("{other:?}"),
            }
        }
        etherparse::NetSlice::Arp(_) => panic!("ARP"),
    }
}

/// What a tunnelled frame carries: the header in front, and the frame.
fn inner(frame: &[u8]) -> ([u8; 8], Vec<u8>) {
    let ((source, _), (destination, port)) = ends(frame);
    assert_eq!((source, destination, port), (US.into(), OTHER.into(), VXLAN_PORT));
    (frame[42..50].try_into().unwrap(), frame[50..].to_vec())
}

/// As the other host would send it to us.
fn tunnelled(header: [u8; 8], frame: &[u8]) -> Vec<u8> {
    let payload = [&header[..], frame].concat();
    let mut out = Vec::new();
    PacketBuilder::ethernet2(ROUTER_MAC, UPLINK_MAC)
        .ipv4(OTHER.octets(), US.octets(), 64)
        .udp(50000, VXLAN_PORT)
        .write(&mut out, &payload)
        .unwrap();
    out
}

fn forward(flags: u8, to: Ipv4Addr) -> [u8; 8] {
    let [a, b, c, d] = to.octets();
    let [high, low] = BACKEND_PORT.to_be_bytes();
    [0x81, flags, high, low, a, b, c, d]
}

fn what_is_not_for_a_vip_goes_on() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        bench.set(service(&[LOCAL.ipv4]));
        let mut options = question4(Kind::Ack, 1);
        options[14] = 0x46;
        let mut fragment = question4(Kind::Ack, 1);
        fragment[20] = 0x20;
        let mut for_another = question4(Kind::Syn, 1);
        for_another[5] ^= 1;
        let cases: &[(&str, Vec<u8>)] = &[
            (
                "another address",
                frame(Kind::Syn, (CLIENT4.into(), 1), (US.into(), PORT), 0),
            ),
            (
                "another port",
                frame(Kind::Syn, (CLIENT4.into(), 1), (VIP4.into(), 1), 0),
            ),
            ("options", options),
            ("a fragment", fragment),
            ("for another host", for_another),
            ("ARP", [&UPLINK_MAC[..], &ROUTER_MAC, &[8, 6], &[0; 28]].concat()),
        ];
        for (name, frame) in cases {
            let outcome = bench.uplink(frame);
            assert_eq!((outcome.action, &outcome.frame), (Outcome::NEXT, frame), "{name}");
        }
        assert_eq!(
            (bench.event(Event::Options), bench.event(Event::Fragment)),
            (1, 1)
        );
        bench.set(service(&[]));
        bench.drops(DropReason::NoBackend, &question4(Kind::Syn, 1));
        bench.balancer.set(&[]).unwrap();
        assert_eq!(bench.uplink(&question4(Kind::Syn, 1)).action, Outcome::NEXT);
    });
}

fn a_container_here_gets_it_translated() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        bench.set(service(&[LOCAL.ipv4]));
        for kind in [Kind::Syn, Kind::Ack, Kind::Udp] {
            let out = bench.sent(&question4(kind, 4000));
            assert_eq!(
                ends(&out),
                ((CLIENT4.into(), 4000), (LOCAL.ipv4.into(), BACKEND_PORT))
            );
            assert_eq!((&out[..6], &out[6..12]), (&LOCAL.mac[..], &GATEWAY[..]));
            let out = bench.sent(&question6(kind, 4000));
            let to = LOCAL.ipv6.unwrap();
            assert_eq!(ends(&out), ((CLIENT6.into(), 4000), (to.into(), BACKEND_PORT)));
        }
        // UDP over IPv4 without a checksum stays without.
        let mut bare = question4(Kind::Udp, 4000);
        bare[40..42].fill(0);
        assert_eq!(bench.sent(&bare)[40..42], [0, 0]);
        assert_eq!(bench.event(Event::Delivered), 7);
    });
}

fn another_host_gets_it_through_a_tunnel() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        bench.set(service(&[REMOTE]));
        for question in [
            question4(Kind::Syn, 4000),
            question4(Kind::Ack, 4000),
            question4(Kind::Udp, 4000),
            question6(Kind::Syn, 4000),
            question6(Kind::Udp, 4000),
        ] {
            let (header, carried) = inner(&bench.sent(&question));
            assert_eq!(header, forward(0, REMOTE));
            assert_eq!(carried[12..], question[12..], "unchanged");
        }
        bench.set(Service {
            first_host: true,
            ..service(&[REMOTE])
        });
        let (header, _) = inner(&bench.sent(&question4(Kind::Ack, 4000)));
        assert_eq!(header, forward(2, REMOTE), "answers are to come back");

        // On the same link it goes as it is.
        bench.set(service(&[REMOTE]));
        bench.dataplane.set_hosts(&[host(UPLINK, true)]).unwrap();
        let out = bench.sent(&question4(Kind::Ack, 4000));
        assert_eq!(ends(&out), ends(&question4(Kind::Ack, 4000)));
        assert_eq!(out[22], 63, "a hop less to go");
        bench.dataplane.set_hosts(&[]).unwrap();
        bench.drops(DropReason::NoRoute, &question4(Kind::Ack, 4000));
    });
}

fn a_tunnelled_packet_arrives() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        // There is no VIP here: the host that sent it has decided.
        let question = question4(Kind::Syn, 4000);
        let out = bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question));
        assert_eq!(
            ends(&out),
            ((CLIENT4.into(), 4000), (LOCAL.ipv4.into(), BACKEND_PORT))
        );
        assert_eq!(out.len(), question.len());
        let first = out;
        let out = bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question6(Kind::Udp, 4000)));
        assert_eq!(
            ends(&out),
            ((CLIENT6.into(), 4000), (LOCAL.ipv6.unwrap().into(), BACKEND_PORT))
        );

        let nobody = Ipv4Addr::new(100, 100, 1, 99);
        bench.drops(DropReason::NoEndpoint, &tunnelled(forward(0, nobody), &question));
        let mut stranger = tunnelled(forward(0, LOCAL.ipv4), &question);
        stranger[29] = 77;
        bench.drops(DropReason::UnknownHost, &stranger);
        let mut real = tunnelled(forward(0, LOCAL.ipv4), &question);
        real[42] = 8;
        assert_eq!(
            bench.uplink(&real).action,
            Outcome::NEXT,
            "VXLAN is the overlay's"
        );
        let secret = Host {
            encrypted: true,
            only_encrypted: true,
            ..host(UPLINK, false)
        };
        bench.dataplane.set_hosts(&[secret]).unwrap();
        let plain = tunnelled(forward(0, LOCAL.ipv4), &question);
        bench.drops(DropReason::NotEncrypted, &plain);
        let decrypted = |frame: &[u8]| {
            bench
                .balancer
                .dry_run(Program::LbEncrypted, UPLINK, frame)
                .unwrap()
        };
        let out = decrypted(&plain);
        assert_eq!((out.action, out.frame), (Outcome::REDIRECT, first));
        // The overlay's packets, and whatever else there may be, are for the program behind.
        assert_eq!(decrypted(&real).action, Outcome::NEXT);
        assert_eq!(decrypted(&question).action, Outcome::NEXT);
        bench.dataplane.set_hosts(&[]).unwrap();
        bench.drops(DropReason::UnknownHost, &plain);
    });
}

fn answers_go_back_as_asked() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        let reply4 = |kind, port| {
            frame(
                kind,
                (LOCAL.ipv4.into(), BACKEND_PORT),
                (CLIENT4.into(), port),
                10,
            )
        };
        assert_eq!(
            bench.answer(&reply4(Kind::SynAck, 4000)).action,
            Outcome::NEXT,
            "no answer"
        );

        bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question4(Kind::Syn, 4000)));
        let out = bench.answered(&reply4(Kind::SynAck, 4000));
        assert_eq!(ends(&out), ((VIP4.into(), PORT), (CLIENT4.into(), 4000)));
        assert_eq!(
            out[56..58],
            1410_u16.to_be_bytes(),
            "what the client sends has to fit into the tunnel"
        );
        bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question4(Kind::Ack, 4000)));
        let flows = bench.balancer.flows(10).unwrap();
        assert_eq!(flows.len(), 1, "established");
        assert_eq!(flows[0].client, (CLIENT4, 4000).into());
        assert_eq!(
            ends(&bench.answered(&reply4(Kind::Ack, 4000))).0,
            (VIP4.into(), PORT)
        );

        bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question6(Kind::Udp, 5000)));
        let from = (LOCAL.ipv6.unwrap().into(), BACKEND_PORT);
        let out = bench.answered(&frame(Kind::Udp, from, (CLIENT6.into(), 5000), 10));
        assert_eq!(ends(&out), ((VIP6.into(), PORT), (CLIENT6.into(), 5000)));

        // Through the first host.
        bench.sent(&tunnelled(forward(2, LOCAL.ipv4), &question4(Kind::Syn, 6000)));
        let (header, carried) = inner(&bench.answered(&reply4(Kind::SynAck, 6000)));
        assert_eq!(header[0], 0x82);
        assert_eq!(ends(&carried), ((VIP4.into(), PORT), (CLIENT4.into(), 6000)));
        check(&carried);
        // That host sends it out as it is.
        let out = bench.sent(&tunnelled(header, &carried));
        assert_eq!(out[14..], carried[14..]);
    });
}

/// Backends of many flows, by where they are tunnelled to.
fn backends(bench: &Bench, kind: Kind, ports: std::ops::Range<u16>) -> Vec<Ipv4Addr> {
    let backend = |port| {
        let (header, _) = inner(&bench.sent(&question4(kind, port)));
        Ipv4Addr::new(header[4], header[5], header[6], header[7])
    };
    ports.map(backend).collect()
}

fn flows_stay_while_backends_drain() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        let address = |last| Ipv4Addr::new(100, 100, 2, last);
        let four: Vec<_> = (2..6).map(address).collect();
        bench.set(service(&four));
        let first = backends(&bench, Kind::Syn, 1000..1200);
        for backend in &four {
            let share = first.iter().filter(|other| *other == backend).count();
            assert!((20..=80).contains(&share), "{share} of 200 are for {backend}");
        }
        assert_eq!(backends(&bench, Kind::Ack, 1000..1200), first);
        backends(&bench, Kind::Udp, 1000..1200);

        let mut draining = service(&four);
        draining.backends[0].draining = true;
        bench.set(draining);
        assert_eq!(backends(&bench, Kind::Ack, 1000..1200), first, "all stay");
        assert!(!backends(&bench, Kind::Syn, 2000..2200).contains(&four[0]));
        assert!(
            !backends(&bench, Kind::Udp, 1000..1200).contains(&four[0]),
            "datagrams do not wait"
        );

        bench.set(service(&four[1..]));
        let after = backends(&bench, Kind::Ack, 1000..1200);
        for (before, after) in first.iter().zip(&after) {
            assert!(
                before == after || *before == four[0],
                "only flows of what is gone move"
            );
            assert_ne!(*after, four[0]);
        }
        // Its number, given to another, does not inherit its flows.
        bench.set(service(&[four[1], four[2], four[3], address(9)]));
        assert_eq!(backends(&bench, Kind::Ack, 1000..1200), after);
    });
}

fn affinity_is_by_client() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        let many: Vec<_> = (2..40).map(|last| Ipv4Addr::new(100, 100, 2, last)).collect();
        let mut service = Service {
            affinity: true,
            ..service(&many)
        };
        bench.set(service.clone());
        let first = backends(&bench, Kind::Syn, 1000..1050);
        assert!(first.iter().all(|backend| *backend == first[0]));
        // More backends change nothing for who is known.
        service
            .backends
            .extend((40..200).map(|last| Backend::new(Ipv4Addr::new(100, 100, 2, last), BACKEND_PORT)));
        bench.set(service.clone());
        assert_eq!(backends(&bench, Kind::Syn, 2000..2050), first);
        // Of one that drains, new connections go elsewhere, together.
        let place = service
            .backends
            .iter()
            .position(|backend| backend.address == first[0]);
        service.backends[place.unwrap()].draining = true;
        bench.set(service);
        let next = backends(&bench, Kind::Syn, 3000..3050);
        assert!(next[0] != first[0] && next.iter().all(|backend| *backend == next[0]));
        assert_eq!(backends(&bench, Kind::Ack, 1000..1050), first, "connections stay");
    });
}

fn two_vips_and_one_port_of_a_client() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        let other = Ipv4Addr::new(192, 0, 2, 2);
        let to = |vip: Ipv4Addr, kind| {
            let question = frame(kind, (CLIENT4.into(), 4000), (vip.into(), PORT), 10);
            ends(&bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question)))
        };
        let ((_, first), _) = to(VIP4, Kind::Syn);
        let ((_, second), _) = to(other, Kind::Syn);
        assert_eq!(first, 4000);
        assert_ne!(second, 4000, "another port tells them apart");
        assert_eq!(to(VIP4, Kind::Ack).0.1, first);
        assert_eq!(to(other, Kind::Ack).0.1, second);
        for (port, vip) in [(first, VIP4), (second, other)] {
            let reply = frame(
                Kind::Ack,
                (LOCAL.ipv4.into(), BACKEND_PORT),
                (CLIENT4.into(), port),
                10,
            );
            assert_eq!(
                ends(&bench.answered(&reply)),
                ((vip.into(), PORT), (CLIENT4.into(), 4000))
            );
        }
        assert!(bench.event(Event::PortTranslated) > 0);
    });
}

/// An ICMP error from a router about an answer that a client was sent.
fn error4(about: &[u8]) -> Vec<u8> {
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

fn error6(about: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    PacketBuilder::ethernet2(ROUTER_MAC, UPLINK_MAC)
        .ipv6(CLIENT6.octets(), VIP6.octets(), 64)
        .icmpv6(etherparse::Icmpv6Type::PacketTooBig { mtu: 1400 })
        .write(&mut out, &about[14..])
        .unwrap();
    out
}

fn errors_find_their_backend() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        let many: Vec<_> = (2..40).map(|last| Ipv4Addr::new(100, 100, 2, last)).collect();
        bench.set(service(&many));
        let backend = backends(&bench, Kind::Syn, 4000..4001)[0];
        let answer = frame(Kind::Ack, (VIP4.into(), PORT), (CLIENT4.into(), 4000), 30);
        let error = error4(&answer);
        let (header, carried) = inner(&bench.sent(&error));
        assert_eq!(header, forward(0, backend));
        assert_eq!(carried[12..], error[12..]);
        // At the backend's host.
        let out = bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &error));
        assert_eq!(out[30..34], LOCAL.ipv4.octets());
        assert_eq!(out[42 + 12..42 + 16], LOCAL.ipv4.octets(), "its own answer");
        assert_eq!(out[62..64], BACKEND_PORT.to_be_bytes());

        bench.set(service(&[LOCAL.ipv4]));
        let answer = frame(Kind::Udp, (VIP6.into(), PORT), (CLIENT6.into(), 4000), 30);
        let out = bench.sent(&error6(&answer));
        assert_eq!(out[62 + 8..62 + 24], LOCAL.ipv6.unwrap().octets());
        assert_eq!(bench.event(Event::IcmpRouted), 2);

        let mut echo = Vec::new();
        PacketBuilder::ethernet2(ROUTER_MAC, UPLINK_MAC)
            .ipv4(CLIENT4.octets(), VIP4.octets(), 64)
            .icmpv4_echo_request(1, 1)
            .write(&mut echo, &[0; 40])
            .unwrap();
        assert_eq!(
            bench.uplink(&echo).action,
            Outcome::NEXT,
            "the host answers for its addresses"
        );
    });
}

fn too_big_is_answered() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        bench.set(service(&[REMOTE]));
        let big =
            |client: IpAddr, vip: IpAddr, payload| frame(Kind::Ack, (client, 4000), (vip, PORT), payload);
        inner(&bench.sent(&big(CLIENT4.into(), VIP4.into(), 1410)));
        let question = big(CLIENT4.into(), VIP4.into(), 1411);
        let out = bench.sent(&question);
        assert_eq!((&out[..6], &out[6..12]), (&ROUTER_MAC[..], &UPLINK_MAC[..]));
        assert_eq!(
            (&out[26..30], &out[30..34]),
            (&VIP4.octets()[..], &CLIENT4.octets()[..])
        );
        assert_eq!(out[34..36], [3, 4]);
        assert_eq!(out[40..42], 1450_u16.to_be_bytes());
        assert_eq!(out[42..], question[14..42]);

        let question = big(CLIENT6.into(), VIP6.into(), 1391);
        let out = bench.sent(&question);
        assert_eq!((out[54], &out[58..62]), (2, &1450_u32.to_be_bytes()[..]));
        assert_eq!(out[62..], question[14..62]);
        assert_eq!(bench.event(Event::TooBigSent), 2);

        // Who lets routers cut packets is not told.
        let mut cut = big(CLIENT4.into(), VIP4.into(), 1411);
        cut[20] = 0;
        bench.drops(DropReason::TooBig, &cut);
    });
}

fn a_flood_is_not_remembered() {
    alone(|bpffs| {
        // One a second, so that any machine is fast enough for a flood.
        let mut bench = Bench::with(bpffs, uplink(), Mode::Auto, 1);
        let many: Vec<_> = (2..40).map(|last| Ipv4Addr::new(100, 100, 2, last)).collect();
        bench.set(service(&many));
        let first = backends(&bench, Kind::Syn, 1000..1200);
        assert!(bench.event(Event::Flood) > 0);
        assert_eq!(
            backends(&bench, Kind::Ack, 1000..1200),
            first,
            "the ring says the same"
        );
    });
}

fn xdp_sends_to_other_hosts() {
    alone(|bpffs| {
        ip(&["link", "add", "up0", "type", "veth", "peer", "name", "down0"]);
        for link in ["up0", "down0"] {
            ip(&["link", "set", "dev", link, "up"]);
        }
        ip(&["link", "set", "dev", "up0", "address", "02:00:00:00:01:01"]);
        ip(&["address", "add", "10.0.0.1/24", "dev", "up0"]);
        ip(&[
            "neighbour",
            "add",
            "10.0.0.2",
            "lladdr",
            "02:00:00:00:02:02",
            "dev",
            "up0",
        ]);
        std::fs::write("/proc/sys/net/ipv4/conf/up0/forwarding", "1").unwrap();
        let line = ip(&["-o", "link", "show", "dev", "up0"]);
        let index: u32 = line.split(':').next().unwrap().parse().unwrap();
        let uplink = Uplink {
            name: "up0".into(),
            index,
            ..uplink()
        };
        let mut bench = Bench::with(bpffs, uplink, Mode::Native, 1000);
        bench.set(service(&[REMOTE]));
        assert_eq!(bench.balancer.mode(), Mode::Native);
        for question in [question4(Kind::Ack, 4000), question6(Kind::Udp, 4000)] {
            // Now and then one takes the slow way; the next does not.
            let mut tries = (0..100).map(|_| bench.balancer.dry_run_xdp(index, &question).unwrap());
            let sent = tries.find(|outcome| outcome.action == 3).unwrap().frame;
            let (header, carried) = inner(&sent);
            assert_eq!(header, forward(0, REMOTE));
            assert_eq!(carried, question);
            check(&sent);
        }
        let out = bench
            .balancer
            .dry_run_xdp(index, &question4(Kind::Ack, 4000))
            .unwrap();
        if out.action == 3 {
            assert_eq!(out.frame[..12], [2, 0, 0, 0, 2, 2, 2, 0, 0, 0, 1, 1]);
        }
        // What is for this host, or too big, is left to the stack.
        let big = frame(Kind::Ack, (CLIENT4.into(), 1), (VIP4.into(), PORT), 1411);
        assert_eq!(bench.balancer.dry_run_xdp(index, &big).unwrap().action, 2);
        bench.set(service(&[LOCAL.ipv4]));
        for _ in 0..3 {
            let outcome = bench
                .balancer
                .dry_run_xdp(index, &question4(Kind::Ack, 4000))
                .unwrap();
            assert_eq!(outcome.action, 2);
        }
        // Nothing to balance, nothing attached, once the kernel has let go of it.
        bench.balancer.set(&[]).unwrap();
        let begun = Instant::now();
        while ip(&["link", "show", "dev", "up0"]).contains("xdp") {
            assert!(begun.elapsed() < Duration::from_mins(1), "it stays attached");
        }
    });
}

fn what_was_set_survives_its_process() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        let many: Vec<_> = (2..40).map(|last| Ipv4Addr::new(100, 100, 2, last)).collect();
        bench.set(service(&many));
        let first = backends(&bench, Kind::Syn, 1000..1100);
        drop(bench);
        let mut bench = Bench::new(bpffs);
        assert_eq!(bench.balancer.vips().len(), 4);
        assert_eq!(backends(&bench, Kind::Ack, 1000..1100), first);
        bench.set(service(&many));
        assert_eq!(backends(&bench, Kind::Ack, 1000..1100), first);
        assert_eq!(bench.event(Event::BackendGone) + bench.event(Event::Miss), 0);
        let traffic = bench.balancer.traffic().unwrap();
        let tcp = traffic
            .iter()
            .find(|(known, _)| *known == vip(VIP4, Protocol::Tcp))
            .unwrap()
            .1;
        assert_eq!((tcp.packets, tcp.flows), (300, 100));
    });
}

fn no_packet_passes_a_bound() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        bench.set(service(&[LOCAL.ipv4, REMOTE]));
        let about = frame(Kind::Ack, (VIP4.into(), PORT), (CLIENT4.into(), 4000), 30);
        let seeds = vec![
            question4(Kind::Syn, 1),
            question4(Kind::Udp, 2),
            question6(Kind::Ack, 3),
            question6(Kind::Udp, 4),
            error4(&about),
            error6(&frame(Kind::Udp, (VIP6.into(), PORT), (CLIENT6.into(), 4000), 30)),
            tunnelled(forward(0, LOCAL.ipv4), &question4(Kind::Ack, 5)),
            tunnelled(forward(2, LOCAL.ipv4), &question6(Kind::Ack, 5)),
            tunnelled(forward(0, LOCAL.ipv4), &error4(&about)),
        ];
        let strategy = (
            proptest::sample::select(seeds),
            proptest::collection::vec((any::<Index>(), any::<u8>()), 0..6),
            any::<Index>(),
        );
        let mut runner = TestRunner::new(ProptestConfig::with_cases(1500));
        let bench = std::cell::RefCell::new(bench);
        runner
            .run(&strategy, |(mut frame, changes, length)| {
                for (at, value) in changes {
                    // All but the address that makes it ours.
                    let at = at.index(frame.len() - 6) + 6;
                    frame[at] = value;
                }
                let length = 14 + length.index(frame.len() - 13);
                frame.truncate(length);
                let bench = &mut *bench.borrow_mut();
                // The kernel itself refuses frames without a whole IP header.
                let Ok(outcome) = bench.balancer.dry_run(Program::LbUplink, UPLINK, &frame) else {
                    return Ok(());
                };
                match outcome.action {
                    Outcome::NEXT => prop_assert_eq!(&outcome.frame, &frame),
                    Outcome::DROP => {}
                    Outcome::REDIRECT => prop_assert!(outcome.frame.len() <= frame.len() + 50),
                    other => prop_assert!(false, "{}", other),
                }
                let action = bench.answer(&frame).action;
                prop_assert!(matches!(
                    action,
                    Outcome::NEXT | Outcome::REDIRECT | Outcome::DROP
                ));
                let outcome = bench.balancer.dry_run_xdp(0, &frame);
                if let Ok(outcome) = outcome {
                    prop_assert!(outcome.action <= 3);
                }
                Ok(())
            })
            .unwrap();
    });
}
