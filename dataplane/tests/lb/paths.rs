//! Where packets go, and what they are like there.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    num::NonZeroU64,
};

use flynn_dataplane::{
    Attachment, DropReason, Host, Limits, Outcome, Program, Protocol,
    lb::{Event, Flow, Service, flows},
};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};

use crate::{
    bench::{
        BACKEND_PORT, Bench, CLIENT4, CLIENT6, GATEWAY, LOCAL, PORT, REMOTE, ROUTER_MAC, UPLINK, UPLINK_MAC,
        US, VIP4, VIP6, host, service, vip,
    },
    frames::{Kind, check, ends, error4, error6, forward, frame, inner, question4, question6, tunnelled},
    support::{alone, pins},
};

pub(crate) fn what_is_not_for_a_vip_goes_on() {
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
        let unserved: u64 = bench
            .balancer
            .traffic()
            .unwrap()
            .iter()
            .map(|(_, traffic)| traffic.unserved)
            .sum();
        assert!(unserved > 0);
        bench.balancer.set(&[]).unwrap();
        assert_eq!(bench.uplink(&question4(Kind::Syn, 1)).action, Outcome::NEXT);
    });
}

pub(crate) fn a_container_here_gets_it_translated() {
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

pub(crate) fn another_host_gets_it_through_a_tunnel() {
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

pub(crate) fn a_tunnelled_packet_arrives() {
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

pub(crate) fn answers_go_back_as_asked() {
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
        let expected = Flow {
            client: (CLIENT4, 4000).into(),
            vip: vip(VIP4, Protocol::Tcp),
            backend: SocketAddrV4::new(LOCAL.ipv4, BACKEND_PORT),
            seen: (CLIENT4, 4000).into(),
        };
        assert_eq!(flows(&pins(bpffs), 10).unwrap(), [expected], "established");
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

pub(crate) fn the_limit_of_what_is_received_holds() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        bench.set(service(&[LOCAL.ipv4]));
        // A byte a second, after a burst.
        let limits = Limits {
            received: NonZeroU64::new(1),
            ..Limits::default()
        };
        let attachment = Attachment {
            limits,
            ..Attachment::default()
        };
        bench.dataplane.add(&LOCAL, &attachment).unwrap();
        let question = frame(Kind::Ack, (CLIENT4.into(), 4000), (VIP4.into(), PORT), 1400);
        let most = 256 * 1024 / question.len() + 1;
        for _ in 0..most {
            bench.sent(&question);
        }
        bench.drops(DropReason::ReceivedTooFast, &question);
        bench.drops(
            DropReason::ReceivedTooFast,
            &tunnelled(forward(0, LOCAL.ipv4), &question6(Kind::Udp, 1)),
        );
    });
}

pub(crate) fn no_packet_passes_a_bound() {
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
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 1500,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
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
