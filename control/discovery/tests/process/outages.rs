//! Kills at any time, and power cuts of all hosts at once.

use std::net::Ipv4Addr;
use std::time::Duration;

use flynn_api::discovery::Consistency;
use rand::Rng as _;
use rand::seq::SliceRandom as _;

use crate::common::{block_on, eventually};
use crate::disk::Cut;
use crate::failpoints::long;
use crate::hosts::{Hosts, SNAPSHOT_AFTER};
use crate::ledger::Ledger;
use crate::watch::Plan;

/// One member is killed again and again while four write.
pub(crate) fn kills() {
    const KILLS: u64 = 12;
    block_on(async {
        let mut hosts = Hosts::one();
        let ledger = Ledger::default();
        hosts.start(0);
        hosts.ready(0).await;
        ledger.create(hosts.client(0), 4).await;
        let load = ledger.load(hosts.clients());
        for _ in 0..KILLS {
            // Some while, so that kills meet every stage.
            let while_ = hosts.rng.random_range(20..250);
            tokio::time::sleep(Duration::from_millis(while_)).await;
            hosts.kill(0);
            hosts.start(0);
            hosts.ready(0).await;
        }
        load.stop().await;
        hosts.kill(0);
        hosts.start(0);
        hosts.agree(&ledger).await;
        assert!(ledger.total() > KILLS, "the test did not test");
    });
}

/// Three hosts without power: each boots first once, or in every order.
pub(crate) fn three() {
    block_on(async {
        let mut hosts = Hosts::voters(3).await;
        let orders = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [1, 0, 2], [2, 1, 0]];
        let orders = orders.map(Vec::from);
        outages(&mut hosts, &orders[..if long() { 6 } else { 3 }]).await;
    });
}

/// Five hosts without power, in some orders.
pub(crate) fn five() {
    block_on(async {
        let mut hosts = Hosts::voters(5).await;
        let mut orders = vec![vec![0, 1, 2, 3, 4]; if long() { 20 } else { 2 }];
        for order in &mut orders {
            order.shuffle(&mut hosts.rng);
        }
        outages(&mut hosts, &orders).await;
    });
}

async fn outages(hosts: &mut Hosts, orders: &[Vec<usize>]) {
    let ledger = Ledger::default();
    ledger.create(hosts.client(0), 4).await;
    for at in 0..orders[0].len() {
        hosts.kill(at);
        hosts.start_watched(at, Plan::new());
        hosts.ready(at).await;
    }
    for (round, order) in orders.iter().enumerate() {
        let how = [Cut::Clean, Cut::Torn][round % 2];
        // In every other round the host that boots first finds itself at another address: nobody can call it, and its log
        // may be shorter than that of the others.
        let moved = (round % 2 == 1).then(|| order[0]);
        eprintln!("round {round}: {order:?}, {how:?}, moved: {moved:?}");
        outage(hosts, &ledger, order, how, moved).await;
    }
    println!("{} outages, {} writes", orders.len(), ledger.total());
}

/// Under load all hosts lose their power at once, and boot in this order: as many as are a majority, and the others
/// much later.
async fn outage(hosts: &mut Hosts, ledger: &Ledger, order: &[usize], how: Cut, moved: Option<usize>) {
    let load = ledger.load(hosts.clients());
    written(ledger, 40).await;
    for at in order {
        hosts.watch(*at).cut(how);
        hosts.cluster.members[*at].strike();
    }
    for at in order {
        hosts.kill(*at);
    }
    load.stop().await;

    if let Some(at) = moved {
        let [a, b, c, d] = hosts.cluster.members[at].options.host_ip.octets();
        hosts.move_to(at, Ipv4Addr::new(a, b, c, d + 10));
    }
    let (majority, late) = order.split_at(order.len() / 2 + 1);
    for at in majority {
        hosts.start_watched(*at, Plan::new());
        // Each answers by what it knows, however many others are there.
        let local = hosts.client(*at).clone().consistency(Consistency::Local);
        eventually("what it knows", async || {
            local
                .services()
                .await
                .ok()
                .filter(|services| !services.is_empty())
        })
        .await;
    }
    for at in majority {
        hosts.ready(*at).await;
        ledger.check(hosts.client(*at)).await;
    }
    let there: Vec<_> = majority.iter().map(|at| hosts.client(*at).clone()).collect();
    let load = ledger.load(&there);
    written(ledger, 3 * SNAPSHOT_AFTER).await;
    for at in late {
        hosts.start_watched(*at, Plan::new());
    }
    load.stop().await;
    hosts.agree(ledger).await;
}

async fn written(ledger: &Ledger, count: u64) {
    let before = ledger.total();
    eventually("writes", async || (ledger.total() > before + count).then_some(())).await;
}
