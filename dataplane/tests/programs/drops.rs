//! Whose packets were dropped.

use std::collections::BTreeMap;

use flynn_dataplane::{AppPolicy, Attachment, Container, DropReason, Drops, Policy, Program};

use crate::{
    bench::{A, B, Bench, FAR4, FAR6, NOBODY4, NOBODY6, frame4, frame6, six},
    support::alone,
    tunnel::tunnelled,
};

fn of(bench: &Bench, container: &Container) -> Drops {
    let drops = bench.0.container_drops().unwrap();
    drops[&container.ipv4].clone()
}

pub(crate) fn drops_are_counted_for_sender_and_receiver() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        assert_eq!((of(&bench, &A), of(&bench, &B)), Default::default());
        let to_nobody = [frame4(A.ipv4, NOBODY4), frame6(six(A), NOBODY6)];
        for frame in &to_nobody {
            bench.drops(DropReason::NoEndpoint, Program::FromContainer, frame);
        }
        // In the name of somebody else: it is still A that sends it, and B that it is for.
        for frame in [frame4(NOBODY4, B.ipv4), frame6(NOBODY6, six(B))] {
            bench.drops(DropReason::SpoofedAddress, Program::FromContainer, &frame);
        }
        let sent = [(DropReason::NoEndpoint, 2), (DropReason::SpoofedAddress, 2)];
        let of_a = Drops {
            sent: sent.into(),
            for_it: BTreeMap::new(),
        };
        let of_b = Drops {
            sent: BTreeMap::new(),
            for_it: [(DropReason::SpoofedAddress, 2)].into(),
        };
        assert_eq!((of(&bench, &A), of(&bench, &B)), (of_a.clone(), of_b.clone()));

        // The next process goes on counting.
        let Bench(dataplane) = bench;
        drop(dataplane);
        bench = Bench::of_two(bpffs);
        assert_eq!((of(&bench, &A), of(&bench, &B)), (of_a, of_b));
        bench.drops(DropReason::NoEndpoint, Program::FromContainer, &to_nobody[0]);
        assert_eq!(of(&bench, &A).sent[&DropReason::NoEndpoint], 3);

        // Whoever gets the address next has nothing to do with it.
        bench.0.remove(A.ipv4, A.ipv6).unwrap();
        bench.0.add(&A, &Attachment::default()).unwrap();
        assert_eq!(of(&bench, &A), Drops::default());
    });
}

pub(crate) fn drops_of_what_came_through_a_tunnel_are_the_receivers() {
    alone(|bpffs| {
        let mut bench = Bench::of_two(bpffs);
        // Another interface for A: what comes by the uplink is then nobody's here.
        let elsewhere = Container { ifindex: 78, ..A };
        bench.0.add(&elsewhere, &Attachment::default()).unwrap();
        let isolated = AppPolicy {
            isolated: true,
            ..AppPolicy::default()
        };
        let policy = Policy {
            apps: [(9, isolated)].into(),
            ..Policy::default()
        };
        bench.0.set_policy(&policy).unwrap();
        let attachment = Attachment {
            identity: 9,
            ..Attachment::default()
        };
        bench.0.add(&B, &attachment).unwrap();
        for frame in [frame4(FAR4, B.ipv4), frame6(FAR6, six(B))] {
            bench.drops(DropReason::Isolated, Program::FromUplink, &tunnelled(7, &frame));
        }
        let expected = Drops {
            sent: BTreeMap::new(),
            for_it: [(DropReason::Isolated, 2)].into(),
        };
        assert_eq!(of(&bench, &B), expected);
        let containers = bench.0.container_drops().unwrap();
        assert_eq!(containers[&A.ipv4], Drops::default());
    });
}
