//! The program in front of the network stack.

use std::time::{Duration, Instant};

use flynn_dataplane::lb::{Mode, Uplink};

use crate::{
    bench::{Bench, CLIENT4, LOCAL, PORT, REMOTE, VIP4, service, uplink},
    frames::{Kind, check, forward, frame, inner, question4, question6},
    support::{alone, ip},
};

pub(crate) fn xdp_sends_to_other_hosts() {
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
