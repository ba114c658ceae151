//! What volumes were.

use std::fs;

use flynn_api::ErrorCode;
use flynn_api::host::label;
use flynn_api::volume::{Gc, Rollback, Volume, VolumeType};

use super::{Btrfs, MIB, cli, job_with, new, output};
use crate::host::Host;

pub(crate) async fn snapshots_forks_and_rollbacks() {
    let host = Host::boot().await;
    let pool = Btrfs::of(&host).await;
    let mut volume = new("one", Some(64 * MIB));
    volume.meta.insert(label::APP_NAME.into(), "shop".into());
    host.api.create_volume("fast", &volume).await.unwrap();
    // A snapshot is what was there in one moment, whoever writes.
    let writer = "i=0; while :; do i=$((i+1)); echo $i > /data/a.new; mv /data/a.new /data/a; \
                  cp /data/a /data/b.new; mv /data/b.new /data/b; done";
    let job = job_with(
        &host,
        "one",
        &format!("echo 0 > /data/a; echo 0 > /data/b; echo up; {writer}"),
    );
    host.run(&job).await;
    host.says(&job.id, "up").await;
    let (ok, text) = cli(&["snapshot", "one", "then", "--json"]);
    assert!(ok, "{text}");
    let snapshot: Volume = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (
            snapshot.kind,
            snapshot.source.as_deref(),
            snapshot.meta[label::APP_NAME].as_str()
        ),
        (VolumeType::Snapshot, Some("one"), "shop")
    );
    let number = |id: &str, name: &str| -> u64 {
        let text = fs::read_to_string(pool.data(id).join(name)).unwrap();
        text.trim().parse().unwrap()
    };
    let (a, b) = (number("then", "a"), number("then", "b"));
    assert!(a == b || a == b + 1, "{a} {b}");
    assert!(fs::write(pool.data("then").join("a"), "x").is_err());
    let now = host.until(async || (number("one", "a") > a).then_some(())).await;
    assert!(now.is_some());

    let busy = host
        .api
        .roll_volume_back(
            "one",
            &Rollback {
                snapshot: "then".into(),
            },
        )
        .await
        .unwrap_err();
    assert!(
        busy.code == ErrorCode::Conflict && busy.message.contains(&job.id),
        "{busy}"
    );
    let refused = host
        .api
        .add_job(&job_with(&host, "then", "true"))
        .await
        .unwrap_err();
    assert!(
        refused.message.contains("flynn-host volume fork then"),
        "{refused}"
    );
    let (ok, text) = cli(&["fork", "then", "copy"]);
    assert!(ok && text == "copy\n", "{text}");
    let seen = output(&host, "copy", "cat /data/a; echo other > /data/a; cat /data/a").await;
    assert_eq!(seen, [a.to_string(), "other".into()]);
    assert_eq!(number("then", "a"), a);
    // The fork has the limit of its source.
    let fork = host.api.volume("copy").await.unwrap();
    assert!(fork.limit == Some(64 * MIB) && fork.used.is_some(), "{fork:?}");
    let lines = output(
        &host,
        "copy",
        "dd if=/dev/zero of=/data/fill bs=64k count=2000 2>&1",
    )
    .await;
    assert!(
        lines
            .iter()
            .any(|line| line.contains("quota exceeded") || line.contains("No space")),
        "{lines:?}"
    );

    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    let (ok, text) = cli(&["rollback", "one", "then"]);
    assert!(ok, "{text}");
    assert_eq!((number("one", "a"), number("one", "b")), (a, b));
    assert!(!pool.0.join("one/next").exists());
    let lines = output(
        &host,
        "one",
        "dd if=/dev/zero of=/data/fill bs=64k count=2000 2>&1",
    )
    .await;
    assert!(
        lines
            .iter()
            .any(|line| line.contains("quota exceeded") || line.contains("No space")),
        "{lines:?}"
    );
    let (ok, text) = cli(&["rollback", "copy", "then"]);
    assert!(!ok && text.contains("no snapshot of volume copy"), "{text}");

    // Each is on its own: what it was made of may go.
    host.api.delete_volume("one").await.unwrap();
    assert_eq!(number("then", "a"), a);
    let (ok, text) = cli(&["list"]);
    assert!(
        ok && text.contains("then") && text.contains("shop") && text.contains("snapshot"),
        "{text}"
    );
    let old = host.api.decommission_volume("copy").await.unwrap();
    assert_eq!(host.api.collect_volumes(&Gc::default()).await.unwrap(), [old.id]);
    host.api.delete_volume("then").await.unwrap();
    assert!(host.api.volumes().await.unwrap().is_empty());
    pool.is_empty();
}
