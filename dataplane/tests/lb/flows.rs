//! Which backend a flow has, and for how long.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr},
};

use aya::maps::{Array, MapData};
use flynn_dataplane::{
    DropReason, Protocol,
    lb::{Backend, Event, Mode, Service},
};

use crate::{
    bench::{BACKEND_PORT, Bench, CLIENT4, LOCAL, PORT, REMOTE, VIP4, backends, service, uplink, vip},
    frames::{Kind, ends, forward, frame, inner, question4, question6, tunnelled},
    support::{alone, pins},
};

pub(crate) fn flows_stay_while_backends_drain() {
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

/// A connection that came by another host until now, when its slot has become another backend's.
pub(crate) fn a_connection_is_sought_where_its_slot_was() {
    const TRIED: u8 = 1 << 6;
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        let [second, third] = [3, 4].map(|last| Ipv4Addr::new(100, 100, 2, last));
        // Each in turn has all slots, and those before it keep what they have.
        let turn = |one: Ipv4Addr, before: &[Ipv4Addr]| {
            let mut all = service(&[&[one], before].concat());
            for backend in &mut all.backends[1..] {
                backend.draining = true;
            }
            all
        };
        let to = |frame: &[u8]| ends(frame).1.0;
        bench.set(turn(REMOTE, &[]));
        bench.set(turn(second, &[REMOTE]));
        bench.set(turn(third, &[REMOTE, second]));
        bench.set(turn(LOCAL.ipv4, &[REMOTE, second, third]));
        // What a process that begins anew is told changes nothing of that.
        drop(bench);
        let mut bench = Bench::new(bpffs);
        bench.set(turn(LOCAL.ipv4, &[REMOTE, second, third]));

        for question in [question4(Kind::Ack, 4000), question6(Kind::Ack, 4000)] {
            // Twice: what a flow table says meanwhile is no better.
            for _ in 0..2 {
                let (header, carried) = inner(&bench.sent(&question));
                assert_eq!(header, forward(TRIED, third), "the latest first");
                assert_eq!(carried[12..], question[12..], "unchanged");
            }
            for (tried, next) in [(1, second), (2, REMOTE)] {
                let asked = tunnelled(forward(tried * TRIED, LOCAL.ipv4), &question);
                assert_eq!(inner(&bench.sent(&asked)).0, forward((tried + 1) * TRIED, next));
            }
            let last = tunnelled(forward(3 * TRIED, LOCAL.ipv4), &question);
            assert_ne!(to(&bench.sent(&last)), VIP4, "nobody else is left");
        }
        assert_eq!(bench.event(Event::Sought), 8);

        // Whoever begins here stays here.
        for kind in [Kind::Syn, Kind::Ack] {
            assert_eq!(to(&bench.sent(&question4(kind, 4001))), IpAddr::from(LOCAL.ipv4));
        }
        // A datagram is anybody's, and who is gone has nothing.
        assert_eq!(
            to(&bench.sent(&question4(Kind::Udp, 4002))),
            IpAddr::from(LOCAL.ipv4)
        );
        bench.set(turn(LOCAL.ipv4, &[REMOTE]));
        assert_eq!(
            inner(&bench.sent(&question4(Kind::Ack, 4003))).0,
            forward(TRIED, REMOTE)
        );
        // Nor has who is dead, though it is not gone yet.
        let mut dead = turn(LOCAL.ipv4, &[REMOTE]);
        dead.backends[1].lost = true;
        for (port, service) in [(4004, dead), (4005, turn(LOCAL.ipv4, &[]))] {
            bench.set(service);
            assert_eq!(
                to(&bench.sent(&question4(Kind::Ack, port))),
                IpAddr::from(LOCAL.ipv4)
            );
        }
    });
}

/// A connection that has another port at its container, because a namesake by another VIP was there first, is known there
/// although that one is over by now.
pub(crate) fn a_connection_by_another_port_stays() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        let mut all = service(&[LOCAL.ipv4, REMOTE]);
        bench.set(service(&[REMOTE]));
        all.backends[1].draining = true;
        bench.set(all);
        let ask = |vip: Ipv4Addr, kind| {
            let question = frame(kind, (CLIENT4.into(), 4000), (vip.into(), PORT), 10);
            let (from, to) = ends(&bench.sent(&tunnelled(forward(0, LOCAL.ipv4), &question)));
            (from.1, to.0)
        };
        let namesake = Ipv4Addr::new(192, 0, 2, 200);
        assert_eq!(ask(namesake, Kind::Syn), (4000, LOCAL.ipv4.into()));
        let (port, _) = ask(VIP4, Kind::Syn);
        assert_ne!(port, 4000);
        for _ in 0..2 {
            assert_eq!(ask(VIP4, Kind::Ack), (port, LOCAL.ipv4.into()));
            ask(namesake, Kind::Rst);
        }
        assert_eq!(bench.event(Event::Sought), 0);
    });
}

pub(crate) fn affinity_is_by_client() {
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

/// A client that uses one port for one VIP after the other finds its backend each time.
pub(crate) fn a_port_is_free_again_when_its_connection_is_over() {
    alone(|bpffs| {
        let bench = Bench::new(bpffs);
        let question = |vip: u8, kind| {
            let vip = Ipv4Addr::new(192, 0, 2, vip);
            let question = frame(kind, (CLIENT4.into(), 4000), (vip.into(), PORT), 10);
            tunnelled(forward(0, LOCAL.ipv4), &question)
        };
        let ask = |vip, kind| ends(&bench.sent(&question(vip, kind))).0.1;
        let answer = |vip: u8, port, kind| {
            let answer = frame(
                kind,
                (LOCAL.ipv4.into(), BACKEND_PORT),
                (CLIENT4.into(), port),
                10,
            );
            let vip = Ipv4Addr::new(192, 0, 2, vip);
            assert_eq!(
                ends(&bench.answered(&answer)),
                ((vip.into(), PORT), (CLIENT4.into(), 4000))
            );
        };
        for vip in 1..50 {
            assert_eq!(ask(vip, Kind::Syn), 4000, "nobody else has it");
            answer(vip, 4000, Kind::SynAck);
            assert_eq!(ask(vip, Kind::Ack), 4000);
            // One ends it at once, or both in either order.
            match vip % 4 {
                0 => drop(ask(vip, Kind::Rst)),
                1 => answer(vip, 4000, Kind::Rst),
                2 => {
                    ask(vip, Kind::Fin);
                    answer(vip, 4000, Kind::Fin);
                }
                _ => {
                    answer(vip, 4000, Kind::Fin);
                    ask(vip, Kind::Fin);
                }
            }
            // What is still under way finds its way.
            assert_eq!(ask(vip, Kind::Ack), 4000);
            answer(vip, 4000, Kind::Ack);
        }
        assert_eq!(bench.event(Event::PortTranslated), 0);

        // One half is open, and one has begun anew on the ports that it had: they are somebody's.
        ask(100, Kind::Syn);
        ask(100, Kind::Fin);
        assert_ne!(ask(101, Kind::Syn), 4000);
        answer(100, 4000, Kind::Fin);
        ask(100, Kind::Syn);
        let ports: BTreeSet<u16> = (100..104).map(|vip| ask(vip, Kind::Syn)).collect();
        assert_eq!(ports.len(), 4, "each has its own");
        bench.drops(DropReason::PortsTaken, &question(104, Kind::Syn));
    });
}

pub(crate) fn two_vips_and_one_port_of_a_client() {
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

pub(crate) fn a_flood_is_not_remembered() {
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

pub(crate) fn what_was_set_survives_its_process() {
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

/// An older build has pinned its maps below another number: those of the same shape move as they are.
pub(crate) fn what_an_older_layout_held_is_kept() {
    alone(|bpffs| {
        let mut bench = Bench::new(bpffs);
        let many: Vec<_> = (2..40).map(|last| Ipv4Addr::new(100, 100, 2, last)).collect();
        bench.set(service(&many));
        let first = backends(&bench, Kind::Syn, 1000..1100);
        drop(bench);
        let pins = pins(bpffs);
        let (today, older) = (pins.join(format!("v{}", flynn_abi::LAYOUT)), pins.join("v2"));
        fs::rename(&today, &older).unwrap();
        // One that is not of today's shape.
        fs::remove_file(older.join("lb_traffic")).unwrap();
        let strange: Array<MapData, u64> = Array::create(1, 0).unwrap();
        strange.pin(older.join("lb_traffic")).unwrap();

        let mut bench = Bench::new(bpffs);
        // Those of services are for whoever opens services.
        let left = fs::read_dir(&older).unwrap();
        let left: Vec<_> = left
            .map(|pin| pin.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(left.iter().all(|name| name.starts_with("service_")), "{left:?}");
        bench.set(service(&many));
        assert_eq!(backends(&bench, Kind::Ack, 1000..1100), first);
        assert_eq!(bench.event(Event::BackendGone) + bench.event(Event::Miss), 0);
        let traffic = bench.balancer.traffic().unwrap();
        let packets: u64 = traffic.iter().map(|(_, traffic)| traffic.packets).sum();
        assert_eq!(packets, 100, "this count begins anew");
    });
}
