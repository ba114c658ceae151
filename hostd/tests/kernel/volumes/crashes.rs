//! Volumes when what looks after them is gone.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use flynn_api::volume::{Gc, Rollback};
use rustix::mount::{UnmountFlags, unmount};

use super::{Btrfs, MIB, copy, job_with, new, output};
use crate::host::Host;

pub(crate) async fn images_outlive_daemons_and_boots() {
    let host = Host::boot().await;
    host.api
        .create_volume("default", &new("one", Some(16 * MIB)))
        .await
        .unwrap();
    let running = job_with(
        &host,
        "one",
        "ls /data; echo kept > /data/file; sync; echo up; sleep 1000",
    );
    host.run(&running).await;
    host.says(&running.id, "up").await;
    // What programs need that want an empty directory.
    assert_eq!(host.lines(&running.id).await[0].msg, "up");
    host.kill_daemon();
    host.start().await;
    assert_eq!(output(&host, "one", "cat /data/file").await, ["kept"]);
    let busy = host.api.delete_volume("one").await.unwrap_err();
    assert!(busy.message.contains(&running.id), "{busy}");
    host.api.stop_job(&running.id).await.unwrap();
    host.end(&running.id).await;
    // After a boot nothing is mounted.
    host.kill_daemon();
    unmount("/run/flynn/volumes/one", UnmountFlags::empty()).unwrap();
    fs::remove_dir("/run/flynn/volumes/one").unwrap();
    host.start().await;
    assert_eq!(output(&host, "one", "cat /data/file").await, ["kept"]);
    host.api.delete_volume("one").await.unwrap();
    assert!(!Path::new("/run/flynn/volumes/one").exists() && !host.state.join("volumes/one").exists());
}

/// What is known to be there, of each volume what its file says.
type Known = BTreeMap<String, String>;

/// Makes, copies and removes volumes until the daemon is gone. What was under way then may be done or not.
async fn churn(host: &Host, pool: &Btrfs, round: usize, known: &mut Known) -> Vec<String> {
    for step in 0.. {
        let id = format!("v{round}-{step}");
        if host.api.create_volume("fast", &new(&id, None)).await.is_err() {
            return vec![id];
        }
        known.insert(id.clone(), id.clone());
        fs::write(pool.data(&id).join("file"), &id).unwrap();
        let snapshot = format!("s{round}-{step}");
        if host.api.snapshot_volume(&id, &copy(&snapshot)).await.is_err() {
            return vec![snapshot];
        }
        known.insert(snapshot.clone(), id.clone());
        let fork = format!("f{round}-{step}");
        if host.api.fork_volume(&snapshot, &copy(&fork)).await.is_err() {
            return vec![fork];
        }
        known.insert(fork.clone(), id.clone());
        let back = Rollback { snapshot };
        if host.api.roll_volume_back(&id, &back).await.is_err() {
            return Vec::new();
        }
        if step % 2 == 1 {
            if host.api.delete_volume(&fork).await.is_err() {
                return vec![fork];
            }
            known.remove(&fork);
        }
    }
    Vec::new()
}

pub(crate) async fn volumes_survive_kills() {
    let host = Host::boot().await;
    let pool = Btrfs::of(&host).await;
    let mut known = Known::new();
    for round in 0..10 {
        let kill = async {
            tokio::time::sleep(Duration::from_millis(20 + 13 * round as u64)).await;
            host.kill_daemon();
        };
        let (in_doubt, ()) = tokio::join!(churn(&host, &pool, round, &mut known), kill);
        host.start().await;
        // A program that the daemon had started may have outlived it.
        let swept = host
            .until(async || {
                host.api.collect_volumes(&Gc::default()).await.ok()?;
                let mut names = fs::read_dir(&pool.0).unwrap();
                let unfinished = names.any(|entry| {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    name.starts_with(".unfinished") || pool.0.join(name).join("next").exists()
                });
                (!unfinished).then_some(())
            })
            .await;
        assert!(swept.is_some(), "{}", host.log());
        let there: Vec<String> = host
            .api
            .volumes()
            .await
            .unwrap()
            .into_iter()
            .map(|volume| volume.id)
            .collect();
        for id in in_doubt {
            if there.contains(&id) {
                // A fork or a snapshot: whole.
                let source = format!("v{}", &id[1..]);
                if id.starts_with('v') {
                    fs::write(pool.data(&id).join("file"), &id).unwrap();
                    known.insert(id.clone(), id);
                } else {
                    known.insert(id, source);
                }
            } else {
                known.remove(&id);
            }
        }
        let known_ids: Vec<_> = known.keys().cloned().collect();
        assert_eq!(there, known_ids);
        for (id, content) in &known {
            assert_eq!(
                fs::read_to_string(pool.data(id).join("file")).unwrap(),
                *content,
                "{id}"
            );
        }
    }
    assert!(known.len() > 10, "{known:?}");
}
