//! A full disk is waited out.

use std::path::{Path, PathBuf};

use flynn_api::ErrorCode;
use flynn_api::discovery::ServiceMeta;
use flynn_discovery::raft::journal::{Journal, Record};
use serde_json::json;

use crate::common::process::Apart;
use crate::common::{Cluster, Member, block_on, create, eventually};

/// The process's data directory as it sees it.
fn data(member: &Member) -> PathBuf {
    let inside = member.options.data.strip_prefix("/").unwrap();
    Path::new("/proc")
        .join(member.pid().to_string())
        .join("root")
        .join(inside)
}

fn meta(n: u64, index: u64) -> ServiceMeta {
    ServiceMeta {
        data: json!(n),
        index,
        leader_id: None,
    }
}

/// Fills a member's disk; gives the file that does.
fn fill(member: &Member) -> PathBuf {
    let filler = data(member).join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 512]).is_ok() {}
    filler
}

/// The leader's disk is full: another one leads, and writes go on, there as well once it has room.
pub(crate) fn of_the_leader() {
    block_on(async {
        let mut cluster = Cluster::apart(Apart {
            disk: Some("2m"),
            ..Apart::default()
        });
        cluster.grow(3, |_| ()).await;
        let full = cluster.ready(0).await;
        let other = (full + 1) % 3;
        create(&cluster.client(other), "web").await;
        cluster.client(other).set_meta("web", &meta(1, 0)).await.unwrap();
        let filler = fill(&cluster.members[full]);
        let write = async |at: usize| {
            let client = cluster.client(at);
            let index = client.meta("web").await.ok()?.index;
            let long = ServiceMeta {
                data: json!("x".repeat(5000)),
                ..meta(0, index)
            };
            client.set_meta("web", &long).await.ok()
        };
        eventually("another leads, and writes go on", async || {
            let written = write(other).await.is_some();
            (cluster.leader(other).await? != full && written).then_some(())
        })
        .await;
        for _ in 0..10 {
            eventually("a write", async || write(other).await).await;
        }
        std::fs::remove_file(filler).unwrap();
        eventually("a write by way of the one that was full", async || {
            write(full).await
        })
        .await;
    });
}

/// A disk of two megabytes fills up while it writes, and is emptied.
pub(crate) fn run() {
    block_on(full_disk());
}

async fn full_disk() {
    let mut cluster = Cluster::apart(Apart {
        disk: Some("2m"),
        ..Apart::default()
    });
    cluster.add();
    cluster.ready(0).await;
    let (client, member) = (&cluster.client(0), &cluster.members[0]);
    create(client, "web").await;
    let mut last = client.set_meta("web", &meta(1, 0)).await.unwrap();

    let filler = fill(member);
    // The page that the journal ends in may have room for a few.
    let refused = eventually("a clear refusal", async || {
        let read = client.meta("web").await.unwrap();
        match client
            .set_meta(
                "web",
                &ServiceMeta {
                    data: json!("x".repeat(5000)),
                    ..read
                },
            )
            .await
        {
            Ok(_) => None,
            Err(error) => (error.code != ErrorCode::Timeout).then_some(error),
        }
    })
    .await;
    assert_eq!(refused.code, ErrorCode::LimitExceeded, "{refused}");
    assert!(refused.message.contains("make room"), "{refused}");
    // It goes on answering.
    assert_eq!(client.services().await.unwrap(), ["web"]);
    client.meta("web").await.unwrap();

    std::fs::remove_file(&filler).unwrap();
    last = eventually("writes go on", async || {
        let read = client.meta("web").await.unwrap();
        client
            .set_meta(
                "web",
                &ServiceMeta {
                    data: json!(3),
                    ..read
                },
            )
            .await
            .ok()
            .filter(|new| new.index > last.index)
    })
    .await;
    assert_eq!(client.meta("web").await.unwrap(), last);
    // What is on the disk is whole.
    let copy = member.dir.path().join("journal");
    std::fs::copy(data(member).join("raft").join("journal"), &copy).unwrap();
    let mut entries = 0;
    Journal::open(&copy, |record| {
        entries += u32::from(matches!(record, Record::Entry(_)));
    })
    .unwrap();
    assert!(entries > 3);
}
