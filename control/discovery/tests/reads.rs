//! Reads in three strengths, and watches that resume.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Cluster, block_on, create, eventually, instance};
use flynn_api::ErrorCode;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::{Http, Watch, full};
use flynn_api::discovery::{
    Consistency, Event, EventKind, INDEX_HEADER, LeaderType, ServiceConfig, ServiceMeta,
};
use flynn_api::tls::PeerIdentity;
use futures::StreamExt as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

fn meta(data: serde_json::Value, index: u64) -> ServiceMeta {
    ServiceMeta {
        data,
        index,
        leader_id: None,
    }
}

/// The status of an answer, and the index that it names.
async fn index_of(http: &Http, path: &str) -> (u16, u64) {
    let request = http::Request::get(path).body(full("")).unwrap();
    let answer = http.send_raw(request).await.unwrap();
    let index = answer.headers().get(INDEX_HEADER);
    (
        answer.status().as_u16(),
        index.map_or(0, |index| index.to_str().unwrap().parse().unwrap()),
    )
}

#[test]
fn each_strength_says_what_it_reflects() {
    block_on(async {
        let mut cluster = Cluster::three().await;
        let leader = cluster.ready(0).await;
        let tester = PeerIdentity::Host("tester".into());
        let https: Vec<Http> = (0..3).map(|at| cluster.http_as(at, Some(&tester))).collect();
        let writer = cluster.client(leader);
        create(&writer, "web").await;
        let mut last = 0;
        for round in 0..30 {
            last = writer
                .set_meta("web", &meta(json!(round), last))
                .await
                .unwrap()
                .index;
            for (at, http) in https.iter().enumerate() {
                for consistency in [Consistency::Linearizable, Consistency::Lease] {
                    let client = cluster.client(at).consistency(consistency);
                    assert_eq!(client.meta("web").await.unwrap(), meta(json!(round), last));
                    // Whatever usually is local is as fresh when it is asked to be.
                    for path in [
                        "/services",
                        "/services/web",
                        "/services/web/instances",
                        "/services/none",
                    ] {
                        let (status, index) =
                            index_of(http, &format!("{path}?consistency={consistency}")).await;
                        assert_eq!(status == 404, path.ends_with("none"));
                        assert!(index >= last, "{consistency} at {at}, {path}: {index} for {last}");
                    }
                }
            }
        }
        let (status, index) = index_of(&https[0], "/services/web/meta?consistency=strong").await;
        assert_eq!((status, index), (400, 0));

        // A member that is left alone says what it knows, to those who want no more.
        let alone = (leader + 1) % 3;
        let known = index_of(&https[alone], "/services/web/meta").await;
        for at in (0..3).filter(|at| *at != alone) {
            cluster.members[at].kill();
        }
        let local = cluster.client(alone).consistency(Consistency::Local);
        assert_eq!(local.meta("web").await.unwrap(), meta(json!(29), last));
        let (status, index) = index_of(&https[alone], "/services/web/meta?consistency=local").await;
        assert_eq!((status, index), (200, known.1));
        for consistency in [Consistency::Linearizable, Consistency::Lease] {
            let client = cluster.client(alone).consistency(consistency);
            assert_eq!(client.services().await.unwrap_err().code, ErrorCode::Unavailable);
        }
    });
}

#[test]
fn reads_at_once_are_all_answered_and_none_is_old() {
    block_on(async {
        let cluster = Cluster::three().await;
        let leader = cluster.ready(0).await;
        let writer = cluster.client(leader);
        create(&writer, "web").await;
        let first = writer.set_meta("web", &meta(json!(0), 0)).await.unwrap().index;
        let (done, _) = tokio::sync::watch::channel(first);
        let reader = async |at: usize| {
            let client = cluster.client(at);
            for _ in 0..40 {
                let written = *done.borrow();
                let read = client.meta("web").await.unwrap().index;
                assert!(read >= written, "{read} was read after {written} was written");
            }
        };
        let writing = async {
            let mut index = first;
            for round in 0..60 {
                index = writer
                    .set_meta("web", &meta(json!(round), index))
                    .await
                    .unwrap()
                    .index;
                done.send_replace(index);
            }
        };
        let readers = futures::future::join_all((0..24).map(|number| reader(number % 3)));
        futures::join!(readers, writing);
    });
}

/// Reads up to (and without) the given `current`, or to `most` events.
async fn take(watch: &mut Watch, most: usize, upto: u64) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < most {
        let (_, event) = watch.next().await.unwrap().unwrap();
        if event.kind == EventKind::Current {
            if event.index >= upto {
                break;
            }
            continue;
        }
        events.push(event);
    }
    events
}

/// Changes of two services, many with several events; gives the index of the last.
async fn change_a_lot(client: &DiscoveryClient, random: &mut StdRng) -> u64 {
    let mut indices = [client.meta("a").await, client.meta("b").await].map(|meta| meta.unwrap().index);
    for number in 0..40 {
        let which = random.random_range(0..2);
        let service = ["a", "b"][which];
        let one = instance(&format!("10.0.0.{}:80", random.random_range(1..4)));
        match random.random_range(0..4) {
            0 => drop(client.deregister(service, &one.id).await),
            1 => client.register(service, &one).await.unwrap(),
            _ => {
                client.register(service, &one).await.unwrap();
                // The metadata and the leader at once: two events.
                let change = ServiceMeta {
                    leader_id: Some(one.id),
                    ..meta(json!(number), indices[which])
                };
                indices[which] = client.set_meta(service, &change).await.unwrap().index;
            }
        }
    }
    let last = meta(json!("last"), indices[0]);
    client.set_meta("a", &last).await.unwrap().index
}

#[test]
fn a_watch_resumes_at_any_host_without_gap_or_duplicate() {
    let seed = rand::random();
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    block_on(async {
        let cluster = Cluster::three().await;
        cluster.ready(0).await;
        let clients: Vec<_> = (0..3).map(|at| cluster.client(at)).collect();
        let manual = ServiceConfig {
            leader_type: LeaderType::Manual,
        };
        for service in ["a", "b"] {
            clients[0].create_service(service, &manual).await.unwrap();
            clients[0].set_meta(service, &meta(json!(0), 0)).await.unwrap();
        }
        let (mut of_a, mut of_all) = (
            clients[0].watch("a").await.unwrap(),
            clients[0].watch_all().await.unwrap(),
        );
        let begin = clients[0].meta("b").await.unwrap().index;
        let mut ids = Vec::new();
        for watch in [&mut of_a, &mut of_all] {
            while watch.next().await.unwrap().unwrap().1.kind != EventKind::Current {}
            ids.push(watch.last_id().unwrap().to_owned());
        }
        assert_eq!(ids, [begin.to_string(), begin.to_string()]);
        let last = change_a_lot(&clients[0], &mut random).await;

        // All of it by the watches that never broke off: of a service, the last event is that of its metadata.
        let whole = |mut watch: Watch, upto| async move {
            let mut events = Vec::new();
            loop {
                let (_, event) = watch.next().await.unwrap().unwrap();
                events.push(event);
                if events.last().unwrap().index >= upto {
                    return events;
                }
            }
        };
        let want_of_a = whole(of_a, last).await;
        assert!(want_of_a.iter().any(|event| event.kind == EventKind::Leader));
        let up_or_down = clients[0].register("a", &instance("10.9.9.9:80")).await;
        up_or_down.unwrap();
        let of_all_last = clients[0].instances("a").await.unwrap().last().unwrap().index;
        let want_of_all = whole(of_all, of_all_last).await;
        assert!(
            want_of_all
                .iter()
                .all(|event| event.kind != EventKind::ServiceMeta)
        );

        // The same in pieces of any length, each at another host.
        for (all, want, upto) in [(false, &want_of_a, last), (true, &want_of_all, of_all_last)] {
            for _ in 0..5 {
                let (mut id, mut got) = (begin.to_string(), Vec::new());
                while got.len() < want.len() {
                    let client = &clients[random.random_range(0..3)];
                    let mut watch = if all {
                        client.watch_all_since(&id).await.unwrap()
                    } else {
                        client.watch_since("a", &id).await.unwrap()
                    };
                    let most = random.random_range(1..6).min(want.len() - got.len());
                    let piece = take(&mut watch, most, upto).await;
                    got.extend(piece);
                    watch.last_id().unwrap().clone_into(&mut id);
                }
                assert_eq!(&got, want, "seed {seed}, all: {all}");
            }
        }
        // Nothing was missed: `current` at once.
        let mut watch = clients[1]
            .watch_since("b", &of_all_last.to_string())
            .await
            .unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap().1.kind, EventKind::Current);
    });
}

#[test]
fn a_watch_that_cannot_resume_says_so() {
    block_on(async {
        let mut cluster = Cluster::one();
        cluster.ready(0).await;
        let client = cluster.client(0);
        create(&client, "web").await;
        let mut index = client.set_meta("web", &meta(json!(0), 0)).await.unwrap().index;
        // Of another cluster, or of one that was restored since.
        let error = client
            .watch_since("web", &(index + 1000).to_string())
            .await
            .err()
            .unwrap();
        assert_eq!(error.code, ErrorCode::Gone);
        assert!(error.message.contains("begin anew"), "{error}");
        assert_eq!(
            client.watch_since("web", "x").await.err().unwrap().code,
            ErrorCode::Validation
        );

        // Before a snapshot nothing is known after a restart.
        let early = index.to_string();
        drop(client.watch_since("web", &early).await.unwrap());
        for round in 0..250 {
            index = client
                .set_meta("web", &meta(json!(round), index))
                .await
                .unwrap()
                .index;
        }
        eventually("a snapshot", async || {
            (client.own_status().await.ok()?.snapshot > 100).then_some(())
        })
        .await;
        cluster.members[0].kill();
        cluster.members[0].start();
        cluster.ready(0).await;
        let client = cluster.client(0);
        assert_eq!(client.meta("web").await.unwrap().index, index);
        assert_eq!(
            client.watch_since("web", &early).await.err().unwrap().code,
            ErrorCode::Gone
        );
        let mut watch = client.watch_since("web", &index.to_string()).await.unwrap();
        let current = watch.next().await.unwrap().unwrap();
        assert_eq!(current.1.kind, EventKind::Current);
        assert!(current.0.unwrap().parse::<u64>().unwrap() >= index);
    });
}

#[test]
fn figures_are_told() {
    block_on(async {
        let cluster = Cluster::three().await;
        let leader = cluster.ready(0).await;
        let client = cluster.client(leader);
        create(&client, "web").await;
        let mut watch = client.watch("web").await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap().1.kind, EventKind::Current);
        for round in 0..5 {
            let at = instance(&format!("10.0.0.{}:80", round + 1));
            client.register("web", &at).await.unwrap();
        }
        let tester = PeerIdentity::Host("tester".into());
        let figures = async |at: usize| {
            let http = cluster.http_as(at, Some(&tester));
            let request = http::Request::get("/metrics").body(full("")).unwrap();
            let answer = http.send(request).await.unwrap();
            let body = axum::body::to_bytes(axum::body::Body::new(answer.into_body()), 1 << 20).await;
            String::from_utf8(body.unwrap().to_vec()).unwrap()
        };
        let value = |text: &str, name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(&format!("flynn_discoverd_{name} ")));
            line.unwrap_or_else(|| panic!("{name} in {text}"))
                .parse::<f64>()
                .unwrap()
        };
        let text = figures(leader).await;
        assert!(value(&text, "raft_commit_seconds_count") >= 6.0);
        assert!(value(&text, "raft_commit_seconds_sum") > 0.0);
        assert!(value(&text, "raft_fsync_seconds_count") >= 6.0);
        assert!(value(&text, "raft_leader_changes_total") >= 1.0);
        assert!(value(&text, "raft_applied_index") >= 6.0);
        for (name, is) in [
            ("raft_role{role=\"leader\"}", 1.0),
            ("raft_role{role=\"follower\"}", 0.0),
            ("raft_has_leader", 1.0),
            ("members{voter=\"true\"}", 3.0),
            ("members{voter=\"false\"}", 0.0),
            // Ours, and that of the gateway for its host's lease.
            ("watches", 2.0),
            ("watch_lag_events", 0.0),
            ("watches_cut_off_total", 0.0),
            ("expired_total", 0.0),
            ("dns_answers_total{code=\"NXDOMAIN\"}", 0.0),
        ] {
            assert!((value(&text, name) - is).abs() < 0.5, "{name} in {text}");
        }
        let lags = text
            .lines()
            .filter(|line| line.starts_with("flynn_discoverd_member_lag_entries{"));
        assert_eq!(lags.count(), 3);
        let text = figures((leader + 1) % 3).await;
        assert!(value(&text, "raft_role{role=\"follower\"}") > 0.5);
        assert!(value(&text, "raft_fsync_seconds_count") >= 6.0);
        assert!(!text.contains("member_lag_entries{"));
    });
}
