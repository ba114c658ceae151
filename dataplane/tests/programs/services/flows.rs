//! Which instance a flow has, for how long, and whom it may be taken for.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
};

use flynn_dataplane::{
    Attachment, DropReason, Outcome, Program,
    service::{Instance, Services},
};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};

use crate::{
    bench::{A, B, Bench, FAR4, FAR6, IFINDEX, six},
    support::{alone, pins},
};

use super::world::{
    CLIENT, FAR, Kind, NETWORK6, PORT, SERVICE, World, ends, instance, leader4, out, out_from, virtual4,
    virtual6,
};

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
