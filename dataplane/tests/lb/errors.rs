//! Errors by ICMP: about answers, of backends, and the balancer's own.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};
use flynn_dataplane::{DropReason, Outcome, lb::Event};

use crate::{
    bench::{
        BACKEND_PORT, Bench, CLIENT4, CLIENT6, GATEWAY, LOCAL, PORT, REMOTE, ROUTER_MAC, UPLINK_MAC, VIP4,
        VIP6, backends, service,
    },
    frames::{
        Kind, check, ends, error4, error6, forward, frame, inner, question4, question6, tunnelled, with,
    },
    support::alone,
};

pub(crate) fn errors_find_their_backend() {
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

pub(crate) fn too_big_is_answered() {
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

/// What a container answers to a packet that it was given and has no use for.
fn refusal(given: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let ethernet = PacketBuilder::ethernet2(LOCAL.mac, GATEWAY);
    match ends(given) {
        ((IpAddr::V4(client), _), (IpAddr::V4(container), _)) => {
            let port = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
            ethernet
                .ipv4(container.octets(), client.octets(), 64)
                .icmpv4(port)
                .write(&mut out, &given[14..])
        }
        ((IpAddr::V6(client), _), (IpAddr::V6(container), _)) => {
            let port = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
            ethernet
                .ipv6(container.octets(), client.octets(), 64)
                .icmpv6(port)
                .write(&mut out, &given[14..])
        }
        ends => panic!("{ends:?}"),
    }
    .unwrap();
    out
}

/// Sees that an ICMP error comes from the VIP and is about the question as its sender knows it, but for its checksum.
fn is_about(error: &[u8], question: &[u8]) {
    check(error);
    let (ip, ports) = if question[12..14] == [8, 0] {
        (20, 14 + 20)
    } else {
        (40, 14 + 40)
    };
    let about = &error[14 + ip + 8..];
    assert_eq!(about[..ip], question[14..ports], "its addresses");
    assert_eq!(about[ip..ip + 4], question[ports..ports + 4], "its ports");
    let (source, size) = if ip == 20 { (12, 4) } else { (8, 16) };
    assert_eq!(
        error[14 + source..][..size],
        question[14 + source + size..][..size],
        "from whom it was for"
    );
}

pub(crate) fn backends_errors_are_translated() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        bench.set(service(&[LOCAL.ipv4]));
        for question in [question4(Kind::Udp, 4000), question6(Kind::Udp, 4000)] {
            let refusal = refusal(&bench.sent(&question));
            is_about(&bench.answered(&refusal), &question);
            // About another port, or not an error at all, it is the container's own business.
            let ports = refusal.len() - 10 - 8;
            let other = with(&refusal, ports, &[9, 9]);
            assert_eq!(bench.answer(&other).action, Outcome::NEXT);
            let kind = if question[12..14] == [8, 0] { 34 } else { 54 };
            let echo = with(&refusal, kind, &[if kind == 34 { 8 } else { 128 }]);
            assert_eq!(bench.answer(&echo).action, Outcome::NEXT);
        }
        // By the way that answers take, and to the port that the client knows.
        let question = question4(Kind::Udp, 5000);
        let given = bench.sent(&tunnelled(forward(2, LOCAL.ipv4), &question));
        let (header, carried) = inner(&bench.answered(&refusal(&given)));
        assert_eq!(header[0], 0x82);
        is_about(&carried, &question);
        let question = frame(
            Kind::Udp,
            (CLIENT4.into(), 5000),
            (Ipv4Addr::new(192, 0, 2, 2).into(), PORT),
            10,
        );
        let given = bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question));
        assert_ne!(ends(&given).0.1, 5000);
        is_about(&bench.answered(&refusal(&given)), &question);
    });
}
