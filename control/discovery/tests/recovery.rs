//! The operator's last resorts: a majority lost for good, snapshots put back, members that follow.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{Cluster, block_on, eventually, instance};
use flynn_api::ErrorCode;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Consistency, RejoinRequest, ServiceConfig, ServiceMeta};
use flynn_discovery::Options;
use flynn_discovery::recovery::JUMP;
use serde_json::json;

/// Times in which nothing is taken for dead because the machine is busy.
fn patient(options: &mut Options) {
    options.timing.election = Duration::from_millis(1500);
    options.timing.silence = Duration::from_secs(4);
}

async fn three() -> Cluster {
    Cluster::three_with(patient).await
}

/// Writes this metadata over what is there.
async fn set(client: &DiscoveryClient, service: &str, data: serde_json::Value) -> ServiceMeta {
    eventually("a write", async || {
        client
            .ensure_service(service, &ServiceConfig::default())
            .await
            .ok()?;
        let index = client.find_meta(service).await.ok()?.map_or(0, |meta| meta.index);
        let meta = ServiceMeta {
            data: data.clone(),
            index,
            leader_id: None,
        };
        client.set_meta(service, &meta).await.ok()
    })
    .await
}

/// A member that has ended for an order is started again, as whoever runs it does.
async fn started_again(cluster: &mut Cluster, at: usize) {
    eventually("its end", async || cluster.members[at].has_ended().then_some(())).await;
    cluster.members[at].kill();
    cluster.members[at].start();
}

async fn id(cluster: &Cluster, at: usize) -> u64 {
    let status = async || cluster.client(at).own_status().await.ok();
    eventually("its status", status).await.id
}

async fn has(cluster: &Cluster, at: usize, service: &str, data: serde_json::Value) {
    let client = cluster.client(at).consistency(Consistency::Local);
    let reads = async || client.meta(service).await.ok().filter(|meta| meta.data == data);
    eventually("what was written", reads).await;
}

async fn voters(cluster: &Cluster, at: usize, count: usize) {
    let votes = async || {
        let peers = cluster.client(at).peers().await.ok()?;
        (peers.len() == count && peers.iter().all(|peer| peer.voter)).then_some(())
    };
    eventually("all members vote", votes).await;
}

#[test]
fn one_of_three_goes_on_alone_and_the_others_follow() {
    block_on(async {
        let mut cluster = three().await;
        let old = id(&cluster, 2).await;
        let mut last = ServiceMeta::default();
        for n in 0..60 {
            last = set(&cluster.client(0), "web", json!(n)).await;
        }
        cluster
            .client(0)
            .register("web", &instance("10.0.0.1:80"))
            .await
            .unwrap();
        has(&cluster, 2, "web", json!(59)).await;
        let refused = cluster.client(2).recover(true).await.unwrap_err();
        assert_eq!(
            refused.code,
            ErrorCode::Conflict,
            "a majority is there: {refused}"
        );

        for gone in [0, 1] {
            cluster.members[gone].kill();
        }
        let plan = cluster.client(2).recovery().await.unwrap();
        assert!(!plan.majority && plan.objections.is_empty(), "{plan:?}");
        assert_eq!(
            plan.others.iter().filter(|other| !other.answers).count(),
            2,
            "{plan:?}"
        );
        cluster.client(2).recover(false).await.unwrap();
        started_again(&mut cluster, 2).await;
        cluster.ready(2).await;
        let client = cluster.client(2);
        assert_ne!(
            id(&cluster, 2).await,
            old,
            "survivors of the old cluster would reach it"
        );
        assert_eq!(
            client.meta("web").await.unwrap(),
            last,
            "all that was committed is there"
        );
        assert_eq!(client.instances("web").await.unwrap().len(), 1);
        let new = set(&client, "web", json!("alone")).await;
        assert!(new.index > last.index + JUMP, "fencing tokens go up: {new:?}");

        // Both that were lost come back at once: they are a majority of the old cluster, but follow the new one.
        for back in [0, 1] {
            cluster.members[back].start();
        }
        for back in [0, 1] {
            started_again(&mut cluster, back).await;
        }
        voters(&cluster, 2, 3).await;
        for back in [0, 1] {
            has(&cluster, back, "web", json!("alone")).await;
            assert!(cluster.members[back].options.data.join("raft").is_dir());
        }
        assert!(set(&cluster.client(0), "web", json!("together")).await.index > new.index);

        // And it goes on like any other: whoever was recovered may be lost as well.
        cluster.members[2].kill();
        let other = async || cluster.leader(0).await.filter(|leader| *leader != 2);
        eventually("another leader", other).await;
        set(&cluster.client(0), "web", json!("without")).await;
        cluster.members[2].start();
        has(&cluster, 2, "web", json!("without")).await;
    });
}

#[test]
fn a_survivor_answers_by_what_it_knew_while_it_follows() {
    block_on(async {
        let mut cluster = three().await;
        let learner = cluster.add_with(patient);
        set(&cluster.client(0), "web", json!("before")).await;
        cluster
            .client(0)
            .register("web", &instance("10.0.0.1:80"))
            .await
            .unwrap();
        has(&cluster, learner, "web", json!("before")).await;
        has(&cluster, 2, "web", json!("before")).await;
        for gone in [0, 1] {
            cluster.members[gone].kill();
        }
        cluster.client(2).recover(false).await.unwrap();
        started_again(&mut cluster, 2).await;
        // The learner was running all the while, and finds out that its cluster has no majority any more.
        eventually("its end", async || {
            cluster.members[learner].has_ended().then_some(())
        })
        .await;
        cluster.members[learner].kill();
        cluster.members[2].kill();
        cluster.members[learner].start();
        has(&cluster, learner, "web", json!("before")).await;
        let instances = cluster.client(learner).instances("web").await.unwrap();
        assert_eq!(
            instances.len(),
            1,
            "discovery answers while there is nobody to join"
        );
        cluster.members[2].start();
        cluster.ready(learner).await;
        set(&cluster.client(learner), "web", json!("after")).await;
        has(&cluster, learner, "web", json!("after")).await;
    });
}

#[test]
fn whoever_has_more_is_to_be_recovered() {
    block_on(async {
        let mut cluster = three().await;
        let learner = cluster.add_with(patient);
        set(&cluster.client(0), "web", json!("before")).await;
        has(&cluster, learner, "web", json!("before")).await;
        cluster.members[learner].kill();
        set(&cluster.client(0), "web", json!("after")).await;
        let leader = cluster.ready(0).await;
        let left = (leader + 1) % 3;
        has(&cluster, left, "web", json!("after")).await;
        for gone in (0..3).filter(|at| *at != left) {
            cluster.members[gone].kill();
        }
        // Without a leader the learner stays behind.
        cluster.members[learner].start();
        let answers = async || cluster.client(learner).own_status().await.ok();
        eventually("an answer", answers).await;
        let error = cluster.client(learner).recover(false).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
        let more = format!("h{left} ({}) has later entries", cluster.members[left].addr());
        assert!(error.message.contains(&more), "{error}");
        cluster.client(left).recover(false).await.unwrap();
        started_again(&mut cluster, left).await;
        cluster.ready(left).await;
        has(&cluster, left, "web", json!("after")).await;
        started_again(&mut cluster, learner).await;
        has(&cluster, learner, "web", json!("after")).await;
    });
}

#[test]
fn a_snapshot_is_put_back_everywhere() {
    block_on(async {
        let mut cluster = three().await;
        // One that does not lead.
        let at = (cluster.ready(0).await + 1) % 3;
        let client = cluster.client(at);
        set(&client, "web", json!("then")).await;
        set(&client, "gone", json!("then")).await;
        let snapshot = cluster.client((at + 1) % 3).snapshot().await.unwrap();
        let now = set(&client, "web", json!("now")).await;
        set(&client, "new", json!("now")).await;
        client.remove_service("gone").await.unwrap();

        let plan = client.check_restore(snapshot.clone()).await.unwrap();
        assert_eq!(
            (&plan.lost[..], &plan.changed[..]),
            (&["new".to_owned()][..], &["web".to_owned()][..])
        );
        assert_eq!((plan.services, plan.objections.len()), (2, 1), "{plan:?}");
        let refused = client.restore(snapshot.clone(), false).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Conflict);
        for byte in [0, 8, 12, 40, snapshot.len() - 1] {
            let mut damaged = snapshot.to_vec();
            damaged[byte] ^= 1;
            let error = client.restore(damaged.into(), true).await.unwrap_err();
            assert_eq!(error.code, ErrorCode::Validation, "{error}");
        }
        assert_eq!(client.meta("web").await.unwrap(), now, "nothing was changed");

        client.restore(snapshot, true).await.unwrap();
        for at in [at, (at + 1) % 3, (at + 2) % 3] {
            started_again(&mut cluster, at).await;
        }
        voters(&cluster, at, 3).await;
        for at in 0..3 {
            has(&cluster, at, "web", json!("then")).await;
            let services = cluster.client(at).services().await.unwrap();
            assert_eq!(services, ["gone", "web"]);
        }
        assert!(set(&client, "web", json!("on")).await.index > now.index + JUMP);
    });
}

#[test]
fn a_snapshot_begins_a_new_cluster_where_the_old_one_ended() {
    block_on(async {
        let old = Cluster::one();
        old.ready(0).await;
        let mut last = ServiceMeta::default();
        for n in 0..50 {
            last = set(&old.client(0), "web", json!(n)).await;
        }
        let snapshot = old.client(0).snapshot().await.unwrap();
        drop(old);

        let mut new = Cluster::one();
        new.ready(0).await;
        let plan = new.client(0).check_restore(snapshot.clone()).await.unwrap();
        assert!(plan.objections.is_empty() && plan.lost.is_empty(), "{plan:?}");
        new.client(0).restore(snapshot.clone(), false).await.unwrap();
        started_again(&mut new, 0).await;
        new.ready(0).await;
        assert_eq!(new.client(0).meta("web").await.unwrap(), last);
        let next = set(&new.client(0), "web", json!("next")).await;
        assert!(next.index > last.index + JUMP, "{next:?}");

        // Also where there is no cluster at all.
        let mut none = Cluster::new();
        none.add_with(|options| options.init = false);
        eventually("an answer", async || none.client(0).own_status().await.ok()).await;
        none.client(0).restore(snapshot, false).await.unwrap();
        started_again(&mut none, 0).await;
        none.ready(0).await;
        assert_eq!(none.client(0).meta("web").await.unwrap(), last);
    });
}

#[test]
fn what_cannot_be_recovered_goes_on_as_it_was() {
    block_on(async {
        let mut cluster = Cluster::new();
        cluster.add_with(|options| options.init = false);
        eventually("an answer", async || cluster.client(0).own_status().await.ok()).await;
        let error = cluster.client(0).recover(true).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");

        let mut cluster = Cluster::one();
        cluster.ready(0).await;
        set(&cluster.client(0), "web", json!(1)).await;
        let before = id(&cluster, 0).await;
        cluster.members[0].kill();
        let data = cluster.members[0].options.data.clone();
        let order = flynn_discovery::recovery::Order::Restore;
        flynn_discovery::recovery::place(&data, order).unwrap();
        cluster.members[0].start();
        cluster.ready(0).await;
        has(&cluster, 0, "web", json!(1)).await;
        let status = cluster.client(0).own_status().await.unwrap();
        assert_eq!(status.id, before);
        assert!(status.refused_order.is_some_and(|why| why.contains("snapshot")));
    });
}

#[test]
fn a_host_changes_clusters_when_it_is_told_to() {
    block_on(async {
        let mut cluster = three().await;
        set(&cluster.client(0), "web", json!("one")).await;
        has(&cluster, 2, "web", json!("one")).await;
        let own = cluster.members[0].addr().to_string();
        let mut request = RejoinRequest {
            members: vec![own],
            force: true,
        };
        let error = cluster.client(2).rejoin(&request).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict, "it is there already: {error}");
        request.members = vec!["nowhere".into()];
        let error = cluster.client(2).rejoin(&request).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Validation, "{error}");

        // A second cluster of the same CA.
        let other = cluster.add_with(|options| (options.init, options.join) = (true, Vec::new()));
        cluster.ready(other).await;
        set(&cluster.client(other), "web", json!("other")).await;
        request = RejoinRequest {
            members: vec![cluster.members[other].addr().to_string()],
            force: false,
        };
        let error = cluster.client(2).rejoin(&request).await.unwrap_err();
        assert!(error.message.contains("works"), "{error}");
        request.force = true;
        cluster.client(2).rejoin(&request).await.unwrap();
        started_again(&mut cluster, 2).await;
        has(&cluster, 2, "web", json!("other")).await;
        // Its first cluster goes on.
        set(&cluster.client(0), "web", json!("without")).await;
        has(&cluster, 2, "web", json!("other")).await;
        let kept: BTreeMap<String, bool> = std::fs::read_dir(&cluster.members[2].options.data)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.path().is_dir()))
            .collect();
        assert!(kept.keys().any(|name| name.starts_with("raft.old-")), "{kept:?}");
    });
}
