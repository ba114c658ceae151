//! Members die under a client that writes and watches; its caller notices nothing.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Cluster, block_on, create, eventually};
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::full;
use flynn_api::discovery::{EventKind, ServiceMeta};
use flynn_api::tls::PeerIdentity;
use flynn_api::{Error, ErrorCode, IDEMPOTENCY_KEY};
use futures::StreamExt as _;
use serde_json::json;
use tokio::sync::mpsc;

/// Writes by compare-and-swap until told to stop, and gives the indices.
async fn write(
    client: DiscoveryClient,
    service: String,
    mut index: u64,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
) -> Vec<u64> {
    let mut indices = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let meta = ServiceMeta {
            data: json!(indices.len()),
            index,
            leader_id: None,
        };
        index = client.set_meta(&service, &meta).await.unwrap().index;
        indices.push(index);
        count.fetch_add(1, Ordering::SeqCst);
        // The members share the machine with the writers.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    indices
}

/// [`eventually`], but as long as it takes on a machine that is busy with other things.
async fn patiently<T>(what: &str, ask: impl AsyncFn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(
            began.elapsed() < Duration::from_mins(2),
            "waited too long for {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn members_that_die_are_not_noticed() {
    block_on(async {
        // Members that start anew know the changes since their snapshot.
        let mut cluster = Cluster::three_with(|options| options.timing.snapshot_after = 100_000).await;
        let chosen = (cluster.ready(0).await + 1) % 3;
        let tls = tempfile::tempdir().unwrap();
        let tester = PeerIdentity::Host("tester".into());
        cluster.ca.issue(&tester, &[]).unwrap().save(tls.path()).unwrap();
        // A busy machine may take long to elect; what counts is that no call fails.
        let http = cluster
            .http_as(chosen, Some(&tester))
            .timeout(Duration::from_mins(1));
        let client = DiscoveryClient::new(http).learning(tls.path());
        client.ping().await.unwrap();
        eventually("the others to be learnt", async || {
            (format!("{client:?}").matches("https://").count() == 3).then_some(())
        })
        .await;

        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (mut writers, mut watches) = (Vec::new(), Vec::new());
        for number in 0..4 {
            let service = format!("s{number}");
            create(&client, &service).await;
            let mut watch = client.watch(&service).await.unwrap();
            assert_eq!(watch.next().await.unwrap().unwrap().1.kind, EventKind::Current);
            let (sender, told) = mpsc::unbounded_channel();
            let watching = tokio::spawn(async move {
                loop {
                    let (_, event) = watch.next().await.unwrap().unwrap();
                    assert_eq!(event.kind, EventKind::ServiceMeta);
                    sender.send(event.index).unwrap();
                }
            });
            watches.push((watching, told));
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
            writers.push(tokio::spawn(write(client.clone(), service, 0, stop, count)));
        }
        // First the one that was chosen, then whoever leads, then both again.
        for round in 0..4 {
            let leader = cluster.ready((chosen + round) % 3).await;
            let killed = if round % 2 == 0 { chosen } else { leader };
            cluster.members[killed].kill();
            for _ in 0..2 {
                let before = count.load(Ordering::SeqCst);
                patiently("writes to go on", async || {
                    (count.load(Ordering::SeqCst) > before + 20).then_some(())
                })
                .await;
            }
            cluster.members[killed].start();
            patiently("all to be well", async || {
                let members = client.members().await.ok()?;
                let well = members
                    .iter()
                    .all(|member| member.lag.is_some_and(|lag| lag < 100));
                (members.len() == 3 && well).then_some(())
            })
            .await;
        }
        stop.store(true, Ordering::SeqCst);
        for (writer, (watch, mut told)) in writers.into_iter().zip(watches) {
            for index in writer.await.unwrap() {
                let next = told.recv().await;
                assert_eq!(next, Some(index), "each once, in order, and none is missing");
            }
            watch.abort();
        }
    });
}

#[test]
fn a_write_of_the_same_name_is_done_once_at_whichever_host() {
    block_on(async {
        let cluster = Cluster::three().await;
        cluster.ready(0).await;
        let tester = PeerIdentity::Host("tester".into());
        let https: Vec<_> = (0..3).map(|at| cluster.http_as(at, Some(&tester))).collect();
        let client = cluster.client(0);
        create(&client, "web").await;
        let put = async |at: usize, key: &str, index: u64| {
            let body = json!({ "data": key, "index": index }).to_string();
            let request = http::Request::put("/services/web/meta")
                .header("content-type", "application/json")
                .header(IDEMPOTENCY_KEY, key)
                .body(full(body))
                .unwrap();
            let answer = https[at].send(request).await?;
            let body = axum::body::to_bytes(axum::body::Body::new(answer.into_body()), 1 << 20).await;
            let meta: ServiceMeta = serde_json::from_slice(&body.unwrap()).unwrap();
            Ok::<_, Error>(meta.index)
        };
        let first = put(0, "the-first-of-them", 0).await.unwrap();
        for host in 0..3 {
            assert_eq!(put(host, "the-first-of-them", 0).await.unwrap(), first);
        }
        let second = put(1, "the-second-of-them", first).await.unwrap();
        assert_eq!(put(2, "the-first-of-them", 0).await.unwrap(), first);
        assert_eq!(
            client.meta("web").await.unwrap().data,
            json!("the-second-of-them")
        );
        // Of another name it is another write, and it is known that it was not done.
        let error = put(0, "the-third-of-them", first).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::PreconditionFailed);
        assert!(error.surely_undone());
        // After many others nobody knows any more.
        let mut index = second;
        for number in 0..10 {
            index = put(0, &format!("one-of-many-others-{number}"), index)
                .await
                .unwrap();
        }
        let error = put(0, "the-first-of-them", 0).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::ObjectExists);
        assert!(!error.surely_undone());
        assert_eq!(
            put(0, "short", index).await.unwrap_err().code,
            ErrorCode::Validation
        );
    });
}
