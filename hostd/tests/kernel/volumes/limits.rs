//! How much a volume holds, and that nobody else pays for one that is full.

use std::fs;

use flynn_api::volume::Resize;
use rustix::mount::{UnmountFlags, unmount};

use super::{Btrfs, MIB, cli, copy, job_with, new, output};
use crate::host::Host;

/// Fills a volume to its last byte. Its neighbour, and the host, have what they had.
pub(super) async fn is_contained(host: &Host, provider: &str) {
    host.api
        .create_volume(provider, &new("full", Some(32 * MIB)))
        .await
        .unwrap();
    host.api
        .create_volume(provider, &new("other", Some(32 * MIB)))
        .await
        .unwrap();
    let before = host.api.status().await.unwrap().disk_free;
    // Twice: what does not fit into an empty one does not fit into a full one.
    let fill = "for i in 1 2; do dd if=/dev/zero of=/data/fill$i bs=64k count=1000 2>&1; sync; done; \
                echo $(($(cat /data/fill* | wc -c) / 1048576))";
    let lines = output(host, "full", fill).await;
    let said: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("No space left") || line.contains("quota exceeded"))
        .collect();
    assert_eq!(said.len(), 2, "{lines:?}");
    let held: u64 = lines.last().unwrap().parse().unwrap();
    assert!((16..=32).contains(&held), "{held} MiB");
    let lines = output(
        host,
        "other",
        "dd if=/dev/zero of=/data/file bs=64k count=200 2>/dev/null && sync && echo written",
    )
    .await;
    assert_eq!(lines, ["written"]);
    // What others write on this machine meanwhile is let pass.
    let after = host.api.status().await.unwrap().disk_free;
    assert!(after + 512 * MIB > before, "{before} {after}");
    // It is emptied by the one who filled it.
    let lines = output(
        host,
        "full",
        "rm /data/fill*; echo again > /data/file && cat /data/file",
    )
    .await;
    assert_eq!(lines, ["again"]);
}

pub(crate) async fn a_full_image_is_contained() {
    let host = Host::boot().await;
    is_contained(&host, "default").await;
    let volume = host.api.volume("full").await.unwrap();
    assert!(volume.used.unwrap() < 8 * MIB, "{volume:?}");
    // The file has its room from the beginning, and gives none back.
    let image = fs::metadata(host.state.join("volumes/full/image.ext4")).unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&image) * 512 >= 32 * MIB);
}

pub(crate) async fn a_full_subvolume_is_contained() {
    let host = Host::boot().await;
    let _pool = Btrfs::of(&host).await;
    is_contained(&host, "fast").await;
    assert_eq!(host.api.volume("full").await.unwrap().limit, Some(32 * MIB));
}

/// What a volume's limit comes to, as its job sees it.
pub(super) async fn holds(host: &Host, volume: &str) -> u64 {
    let fill =
        "dd if=/dev/zero of=/data/fill bs=64k count=3000 2>&1; sync; wc -c < /data/fill; rm /data/fill";
    let lines = output(host, volume, fill).await;
    lines.last().unwrap().trim().parse().unwrap()
}

/// Has a volume hold so many bytes, as soon as its filesystem has counted what was removed.
pub(super) async fn resized(host: &Host, volume: &str, limit: u64) {
    let mut last = None;
    let done = host
        .until(async || {
            last = Some(host.api.resize_volume(volume, &Resize { limit }).await);
            last.as_ref()?.as_ref().ok().map(|volume| volume.limit)
        })
        .await;
    assert_eq!(done, Some(Some(limit)), "{last:?}");
}

pub(crate) async fn images_grow() {
    let host = Host::boot().await;
    let volume = |id: &str| new(id, Some(32 * MIB));
    host.api.create_volume("default", &volume("one")).await.unwrap();
    let before = holds(&host, "one").await;
    assert!(before < 32 * MIB, "{before}");
    // While it is used.
    let job = job_with(&host, "one", "echo kept > /data/file; echo up; sleep 1000");
    host.run(&job).await;
    host.says(&job.id, "up").await;
    let (ok, text) = cli(&["resize", "one", "64MB"]);
    assert!(ok && text == "one\n", "{text}");
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    let after = holds(&host, "one").await;
    assert!(after > 40 * MIB && after < 64 * MIB, "{after}");
    assert_eq!(output(&host, "one", "cat /data/file").await, ["kept"]);
    assert_eq!(host.api.volume("one").await.unwrap().limit, Some(64 * MIB));
    // And while nobody does, after a boot.
    host.kill_daemon();
    unmount("/run/flynn/volumes/one", UnmountFlags::empty()).unwrap();
    host.start().await;
    let grown = host
        .api
        .resize_volume("one", &Resize { limit: 80 * MIB })
        .await
        .unwrap();
    assert_eq!(grown.limit, Some(80 * MIB));
    assert!(holds(&host, "one").await > after);
    for (limit, wanted) in [("32MB", "only be made larger"), ("900TB", "make room")] {
        let (ok, text) = cli(&["resize", "one", limit]);
        assert!(!ok && text.contains(wanted), "{text}");
        assert_eq!(host.api.volume("one").await.unwrap().limit, Some(80 * MIB));
    }
    // One that was broken off is done by the next start, and loses nothing.
    let record = host.state.join("volumes/one/volume.json");
    let mut broken: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    broken["resizing"] = (100 * MIB).into();
    host.kill_daemon();
    fs::write(&record, broken.to_string()).unwrap();
    host.start().await;
    let done = host
        .until(async || (host.api.volume("one").await.ok()?.limit == Some(100 * MIB)).then_some(()))
        .await;
    assert!(done.is_some(), "{}", host.log());
    assert_eq!(output(&host, "one", "cat /data/file").await, ["kept"]);
    assert!(holds(&host, "one").await > 80 * MIB);
}

pub(crate) async fn subvolumes_are_resized() {
    let host = Host::boot().await;
    let _pool = Btrfs::of(&host).await;
    host.api
        .create_volume("fast", &new("one", Some(128 * MIB)))
        .await
        .unwrap();
    assert!(holds(&host, "one").await > 64 * MIB);
    for limit in [32, 160] {
        resized(&host, "one", limit * MIB).await;
        let held = holds(&host, "one").await;
        assert!((held < 32 * MIB) == (limit == 32), "{held} of {limit} MiB");
    }
    output(
        &host,
        "one",
        "dd if=/dev/zero of=/data/fill bs=64k count=800 2>&1; sync",
    )
    .await;
    // What monitoring sees is what the filesystem counts, which it does now and then.
    let metrics = host
        .until(async || {
            let metrics = host.metrics().await;
            let used = metrics
                .lines()
                .find(|line| line.starts_with("flynn_host_volume_used_bytes{volume=\"one\""))?;
            let used: u64 = used.rsplit_once(' ')?.1.parse().ok()?;
            (50 * MIB..60 * MIB).contains(&used).then_some(metrics)
        })
        .await
        .unwrap();
    let of_one = "{volume=\"one\",provider=\"fast\",type=\"data\",app=\"\",process_type=\"\"}";
    for line in [
        format!("flynn_host_volume_limit_bytes{of_one} {}\n", 160 * MIB),
        "flynn_host_volume_provider_up{provider=\"fast\",kind=\"btrfs\"} 1\n".into(),
    ] {
        assert!(metrics.contains(&line), "{metrics}");
    }
    let (ok, text) = cli(&["resize", "one", "20MB"]);
    assert!(!ok && text.contains("remove some of that first"), "{text}");
    host.api.snapshot_volume("one", &copy("then")).await.unwrap();
    let (ok, text) = cli(&["resize", "then", "200MB"]);
    assert!(!ok && text.contains("never changes"), "{text}");
}

pub(crate) async fn releases_raise_limits() {
    let host = Host::boot().await;
    let with = |limit: u64| {
        let mut job = job_with(&host, "one", "cat /data/file; echo kept > /data/file");
        job.config.volumes[0].limit = Some(limit * MIB);
        job
    };
    for (limit, has, lines) in [(32, 32, vec![]), (64, 64, vec!["kept"]), (16, 64, vec!["kept"])] {
        let (job, said) = host.finish(&with(limit)).await;
        assert!(job.error.is_none(), "{job:?}");
        let said: Vec<_> = said.into_iter().filter(|line| line == "kept").collect();
        assert_eq!(said, lines);
        assert_eq!(host.api.volume("one").await.unwrap().limit, Some(has * MIB));
    }
    assert!(holds(&host, "one").await < 64 * MIB);
    let mut small = job_with(&host, "two", "true");
    small.config.volumes[0].limit = Some(MIB);
    let refused = host.api.add_job(&small).await.unwrap_err();
    assert!(refused.message.contains("at least 16 MiB"), "{refused}");
}
