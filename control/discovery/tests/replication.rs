//! One and three members, killed and brought back.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::Duration;

use common::{Cluster, block_on, create, eventually, instance};
use flynn_api::ErrorCode;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{EventKind, ServiceConfig, ServiceMeta};
use flynn_api::tls::{Ca, PeerIdentity};
use futures::StreamExt as _;
use serde_json::json;

#[test]
fn one_member_keeps_what_it_acknowledged() {
    block_on(async {
        let mut cluster = Cluster::one();
        cluster.ready(0).await;
        let client = cluster.client(0);
        create(&client, "web").await;
        client.register("web", &instance("10.0.0.1:80")).await.unwrap();
        let meta = ServiceMeta {
            data: json!({"a": 1}),
            index: 0,
            leader_id: None,
        };
        let meta = client.set_meta("web", &meta).await.unwrap();
        cluster.members[0].kill();
        cluster.members[0].start();
        cluster.ready(0).await;
        assert_eq!(client.meta("web").await.unwrap(), meta);
        assert_eq!(client.instances("web").await.unwrap().len(), 1);
        assert_eq!(client.leader("web").await.unwrap().addr, "10.0.0.1:80");
        let again = client
            .create_service("web", &ServiceConfig::default())
            .await
            .unwrap_err();
        assert_eq!(again.code, ErrorCode::ObjectExists);
    });
}

/// In its old term it would write other entries in the places of those that it has lost and others have.
#[test]
fn whoever_led_before_it_was_killed_does_not_lead_without_an_election() {
    block_on(async {
        let mut cluster = Cluster::three().await;
        let leader = cluster.ready(0).await;
        let before = cluster.client(leader).own_status().await.unwrap();
        assert_eq!(before.state, "leader");
        for member in &mut cluster.members {
            member.kill();
        }
        cluster.members[leader].start();
        let alone = cluster.client(leader);
        let status = eventually("an answer", async || alone.own_status().await.ok()).await;
        assert_ne!(status.state, "leader", "nobody has elected it");
        for other in 1..3 {
            cluster.members[(leader + other) % 3].start();
        }
        eventually("an election", async || {
            let status = alone.own_status().await.ok()?;
            (status.term > before.term && status.leader.is_some()).then_some(())
        })
        .await;
    });
}

#[test]
fn three_members_elect_another_leader() {
    block_on(async {
        let mut cluster = Cluster::three().await;
        create(&cluster.client(0), "web").await;
        let leader = cluster.ready(0).await;
        let (a, b) = ((leader + 1) % 3, (leader + 2) % 3);

        // A follower takes writes and reads, and reads what it wrote.
        let follower = cluster.client(a);
        eventually("a follower that knows the leader", async || {
            cluster.leader(a).await
        })
        .await;
        follower.register("web", &instance("10.0.0.1:80")).await.unwrap();
        assert_eq!(follower.instances("web").await.unwrap().len(), 1);
        let meta = ServiceMeta {
            data: json!(1),
            index: 0,
            leader_id: None,
        };
        follower.set_meta("web", &meta).await.unwrap();
        assert_eq!(cluster.client(b).meta("web").await.unwrap().data, json!(1));
        // Its heartbeats reach the leader.
        follower.register("web", &instance("10.0.0.1:80")).await.unwrap();

        cluster.members[leader].kill();
        let next = eventually("another leader", async || {
            cluster.leader(a).await.filter(|next| *next != leader)
        })
        .await;
        for port in 1..=150 {
            cluster
                .client(a)
                .register("web", &instance(&format!("10.0.0.2:{port}")))
                .await
                .unwrap();
        }
        assert_eq!(cluster.client(next).instances("web").await.unwrap().len(), 151);

        // The one that was killed comes back, to a log that a snapshot has replaced meanwhile.
        cluster.members[leader].start();
        eventually("the one that was killed has caught up", async || {
            let instances = cluster.client(leader).instances("web").await.ok()?;
            (instances.len() == 151).then_some(())
        })
        .await;
    });
}

/// Raft itself goes on naming the last one where none can be elected.
#[test]
fn who_is_left_of_three_names_no_leader() {
    block_on(async {
        let mut cluster = Cluster::three().await;
        let leader = cluster.ready(0).await;
        let (left, other) = ((leader + 1) % 3, (leader + 2) % 3);
        eventually("all three vote", async || {
            let peers = cluster.client(left).peers().await.ok()?;
            (peers.iter().filter(|peer| peer.voter).count() == 3).then_some(())
        })
        .await;
        eventually("a follower that knows the leader", async || {
            cluster.leader(left).await
        })
        .await;
        // It is not asked for its vote any more.
        cluster.members[other].kill();
        cluster.members[leader].kill();
        let client = cluster.client(left);
        let status = eventually("no leader", async || {
            let status = client.own_status().await.ok()?;
            status.leader.is_none().then_some(status)
        })
        .await;
        assert_ne!(status.state, "leader");
        assert!(client.peers().await.unwrap().iter().all(|peer| !peer.leader));
        assert!(cluster.leader(left).await.is_none());
        let refused = client
            .create_service("web", &ServiceConfig::default())
            .await
            .unwrap_err();
        assert_eq!(refused.code, ErrorCode::Unavailable, "{refused}");

        cluster.members[other].start();
        let next = eventually("another leader", async || cluster.leader(left).await).await;
        assert_ne!(next, leader);
    });
}

#[test]
fn a_newcomer_gets_a_snapshot_and_answers_alone() {
    block_on(async {
        let mut cluster = Cluster::one();
        cluster.ready(0).await;
        let client = cluster.client(0);
        create(&client, "web").await;
        for port in 1..=400 {
            let meta = ServiceMeta {
                data: json!(port),
                index: client
                    .find_meta("web")
                    .await
                    .unwrap()
                    .map_or(0, |meta| meta.index),
                leader_id: None,
            };
            client.set_meta("web", &meta).await.unwrap();
        }
        client.register("web", &instance("10.0.0.1:80")).await.unwrap();
        cluster.add();
        let newcomer = cluster.client(1);
        eventually("the newcomer has the state", async || {
            newcomer
                .instances("web")
                .await
                .ok()
                .filter(|instances| !instances.is_empty())
        })
        .await;
        // Both are gone, and only the learner comes back: it answers by its last good view, but takes no writes.
        cluster.members[0].kill();
        cluster.members[1].kill();
        cluster.members[1].start();
        eventually("the learner answers", async || {
            newcomer
                .instances("web")
                .await
                .ok()
                .filter(|instances| instances.len() == 1)
        })
        .await;
        assert_eq!(
            newcomer.meta("web").await.unwrap_err().code,
            ErrorCode::Unavailable
        );
        cluster.members[0].start();
        let meta = eventually("a leader", async || newcomer.meta("web").await.ok()).await;
        assert_eq!(meta.data, json!(400));
    });
}

#[test]
fn the_silent_expire_and_the_living_stay() {
    block_on(async {
        let mut cluster = Cluster::new();
        cluster.add_with(|options| options.timing.lease = Duration::from_secs(5));
        cluster.ready(0).await;
        let client = cluster.client(0);
        create(&client, "web").await;
        let mut watch = client.watch("web").await.unwrap();
        client.register("web", &instance("10.0.0.1:80")).await.unwrap();
        client.register("web", &instance("10.0.0.2:80")).await.unwrap();
        let index = client.instances("web").await.unwrap()[1].index;
        let heartbeats = async {
            loop {
                client.register("web", &instance("10.0.0.2:80")).await.unwrap();
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        };
        let mut seen = Vec::new();
        let watching = async {
            while let Some(event) = watch.next().await {
                let (_, event) = event.unwrap();
                let addr = event.instance.map(|instance| instance.addr);
                seen.push((event.kind, addr));
                if event.kind == EventKind::Leader && seen.len() > 3 {
                    break;
                }
            }
        };
        tokio::select! {
            () = heartbeats => unreachable!(),
            () = watching => {}
        }
        let (first, second) = (Some("10.0.0.1:80".to_owned()), Some("10.0.0.2:80".to_owned()));
        assert_eq!(
            seen,
            [
                (EventKind::Current, None),
                (EventKind::Up, first.clone()),
                (EventKind::Leader, first.clone()),
                (EventKind::Up, second.clone()),
                (EventKind::Down, first),
                (EventKind::Leader, second),
            ]
        );
        let left = client.instances("web").await.unwrap();
        assert_eq!(
            (left.len(), left[0].index),
            (1, index),
            "heartbeats are not written to the log"
        );
    });
}

#[test]
fn a_leader_that_stops_hands_over() {
    block_on(async {
        // Whoever waits for an election waits longer than this test.
        let mut cluster =
            Cluster::three_with(|options| options.timing.election = Duration::from_mins(2)).await;
        let leader = cluster.ready(0).await;
        let other = (leader + 1) % 3;
        eventually("another that knows the leader", async || {
            cluster.leader(other).await
        })
        .await;
        cluster.members[leader].stop();
        eventually("another leader", async || {
            cluster.leader(other).await.filter(|next| *next != leader)
        })
        .await;
        create(&cluster.client(other), "web").await;
    });
}

#[test]
fn members_are_removed_and_move() {
    block_on(async {
        let mut cluster = Cluster::three().await;
        let http = cluster.http_as(0, Some(&PeerIdentity::Host("tester".into())));
        let gone = cluster.members[2].addr();
        http.delete(&format!("/raft/peers/{gone}")).await.unwrap();
        let peers = eventually("two members", async || {
            cluster
                .client(0)
                .peers()
                .await
                .ok()
                .filter(|peers| peers.len() == 2)
        })
        .await;
        assert!(peers.iter().all(|peer| peer.addr != gone.to_string()));
        let error = http.delete(&format!("/raft/peers/{gone}")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        cluster.members[2].kill();

        // Another address, the same store: the same member.
        let id = peers
            .iter()
            .find(|peer| peer.addr == cluster.members[1].addr().to_string())
            .unwrap()
            .id;
        cluster.members[1].kill();
        let [_, a, b, _] = cluster.members[1].options.host_ip.octets();
        let moved = std::net::Ipv4Addr::new(127, a, b, 77);
        let identity = PeerIdentity::Job("discoverd".into());
        let identity = cluster.ca.issue(&identity, &[moved.to_string()]).unwrap();
        identity.save(&cluster.members[1].options.tls).unwrap();
        cluster.members[1].options.host_ip = moved;
        cluster.members[1].start();
        let addr = cluster.members[1].addr().to_string();
        eventually("the member is known at its new address", async || {
            let peers = cluster.client(0).peers().await.ok()?;
            (peers.len() == 2 && peers.iter().any(|peer| peer.id == id && peer.addr == addr)).then_some(())
        })
        .await;
        create(&cluster.client(1), "web").await;
    });
}

#[test]
fn a_renewed_certificate_is_used_at_once() {
    block_on(async {
        let cluster = Cluster::one();
        cluster.ready(0).await;
        let member = &cluster.members[0];
        let identity = PeerIdentity::Job("discoverd".into());
        let renewed = Ca::create("another cluster").unwrap();
        let other = renewed
            .issue(&identity, &[member.options.host_ip.to_string()])
            .unwrap();
        let http = Http::new(&format!("https://{}", member.addr())).unwrap();
        let client = || DiscoveryClient::new(http.clone().identity(&other).unwrap());
        assert!(client().services().await.is_err());
        other.save(&member.options.tls).unwrap();
        eventually("the new one", async || client().services().await.ok()).await;
        assert!(!member.has_ended());
    });
}

#[test]
fn a_long_log_is_cut_short() {
    block_on(async {
        let mut cluster = Cluster::new();
        cluster.add_with(|options| options.timing.snapshot_after = 100_000);
        cluster.ready(0).await;
        let client = cluster.client(0);
        create(&client, "web").await;
        let mut meta = ServiceMeta {
            data: json!("x".repeat(900_000)),
            index: 0,
            leader_id: None,
        };
        for _ in 0..50 {
            meta = client.set_meta("web", &meta).await.unwrap();
        }
        let journal = cluster.members[0].options.data.join("raft/journal");
        let length = || std::fs::metadata(&journal).unwrap().len();
        eventually("a short journal", async || (length() < 32 << 20).then_some(())).await;
        cluster.members[0].kill();
        cluster.members[0].start();
        cluster.ready(0).await;
        assert_eq!(client.meta("web").await.unwrap(), meta);
    });
}

#[test]
fn nobody_says_of_a_write_that_may_have_happened_that_it_has_not() {
    block_on(async {
        let mut cluster = Cluster::three().await;
        let learner = cluster.add();
        let leader = cluster.ready(0).await;
        let client = cluster.client(leader);
        create(&client, "web").await;
        eventually("the learner has it", async || {
            cluster.client(learner).service("web").await.ok()
        })
        .await;
        // The leader is left without a majority: it has the write in its log, and no more.
        for at in (0..3).filter(|at| *at != leader) {
            cluster.members[at].kill();
        }
        let before = client.own_status().await.unwrap().last_log;
        let writer = cluster.client(learner);
        let write = tokio::spawn(async move {
            let meta = ServiceMeta {
                data: json!(1),
                ..ServiceMeta::default()
            };
            writer.set_meta("web", &meta).await
        });
        eventually("the write in the leader's log", async || {
            (client.own_status().await.ok()?.last_log > before).then_some(())
        })
        .await;
        cluster.members[leader].kill();
        let error = write.await.unwrap().unwrap_err();
        assert_eq!(error.code, ErrorCode::Timeout, "{error}");
        assert!(error.may_be_done() && error.message.contains("may or may not have happened"));
    });
}
