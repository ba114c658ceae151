//! Volumes on a disk whose power is cut.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flynn_api::volume::{NewProvider, ProviderKind, Resize};
use rustix::mount::{UnmountFlags, unmount};
use tokio::sync::Notify;

use super::transfer::piped;
use super::{Btrfs, MIB, cannot_grow, copy, new, output, run};
use crate::host::{Host, PATIENCE};

/// The provider on the disk.
const DISK: &str = "disk";

const ROUNDS: usize = 6;

/// A filesystem in a file, which is on a btrfs: so that it can be copied in one moment.
struct Disk {
    shelf: Btrfs,
    number: u32,
    path: PathBuf,
}

impl Disk {
    fn new(host: &Host, filesystem: &str) -> Self {
        let shelf = Btrfs::mount(&host.state.with_file_name("shelf"));
        let disk = Self {
            path: host.state.with_file_name(DISK),
            shelf,
            number: 0,
        };
        fs::create_dir(&disk.path).unwrap();
        fs::File::create(disk.file()).unwrap().set_len(800 * MIB).unwrap();
        run(&format!("mkfs.{filesystem}"), &["-q"], &[&disk.file()]);
        disk.mount();
        disk
    }

    fn file(&self) -> PathBuf {
        self.shelf.0.join(self.number.to_string())
    }

    fn mount(&self) {
        run("mount", &["-o", "loop"], &[&self.file(), &self.path]);
    }

    /// What was not synced is lost. The daemon is dead, and what it has started does nothing any more that counts.
    async fn cut(&mut self, host: &Host) {
        let old = self.file();
        self.number += 1;
        run("cp", &["--reflink=always"], &[&old, &self.file()]);
        let below = Path::new("/run/flynn/volumes").join(format!("@{DISK}"));
        let gone = host
            .until(async || {
                for mounted in fs::read_dir(&below).into_iter().flatten().flatten() {
                    let _ = unmount(mounted.path(), UnmountFlags::empty());
                    let _ = fs::remove_dir(mounted.path());
                }
                unmount(&self.path, UnmountFlags::empty()).ok()
            })
            .await;
        assert!(gone.is_some(), "{} stays mounted", self.path.display());
        fs::remove_file(old).unwrap();
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

/// What is known to be there, with what it may hold: before and after what was under way.
type Known = BTreeMap<String, [Option<u64>; 2]>;

/// Makes, copies, resizes and removes volumes until the daemon is gone. Tells when the first is there.
async fn churn(host: &Host, round: usize, kind: ProviderKind, known: &mut Known, first: &Notify) {
    let is_btrfs = kind == ProviderKind::Btrfs;
    let resizes = is_btrfs || cannot_grow().is_none();
    let (small, large) = (16 * MIB, 24 * MIB);
    for step in 0.. {
        let id = format!("v{round}-{step}");
        // First what may be, then what is.
        known.insert(id.clone(), [None, Some(small)]);
        if host
            .api
            .create_volume(DISK, &new(&id, Some(small)))
            .await
            .is_err()
        {
            return;
        }
        known.insert(id.clone(), [Some(small); 2]);
        first.notify_one();
        if is_btrfs {
            let snapshot = format!("s{round}-{step}");
            known.insert(snapshot.clone(), [None, Some(small)]);
            if host.api.snapshot_volume(&id, &copy(&snapshot)).await.is_err() {
                return;
            }
            known.insert(snapshot, [Some(small); 2]);
        }
        let mut has = small;
        if resizes {
            has = large;
            known.insert(id.clone(), [Some(small), Some(large)]);
            let to = Resize { limit: large };
            if host.api.resize_volume(&id, &to).await.is_err() {
                return;
            }
            known.insert(id.clone(), [Some(large); 2]);
        }
        if step % 2 == 1 {
            known.insert(id.clone(), [Some(has), None]);
            if host.api.delete_volume(&id).await.is_err() {
                return;
            }
            known.remove(&id);
        }
    }
}

async fn survives(filesystem: &str, kind: ProviderKind) {
    let host = Host::boot().await;
    let mut disk = Disk::new(&host, filesystem);
    let provider = NewProvider {
        id: DISK.into(),
        kind,
        path: disk.path.display().to_string(),
        ..NewProvider::default()
    };
    host.api.add_provider(&provider).await.unwrap();
    let mut known = Known::new();
    for round in 0..ROUNDS {
        let first = Notify::new();
        let kill = async {
            let _ = tokio::time::timeout(PATIENCE, first.notified()).await;
            // Not a wait: how far into all this the power goes, each time a little further.
            tokio::time::sleep(Duration::from_millis(100 + 37 * round as u64)).await;
            host.kill_daemon();
        };
        tokio::join!(churn(&host, round, kind, &mut known, &first), kill);
        disk.cut(&host).await;
        host.start().await;
        let swept = host
            .until(async || {
                let left = fs::read_dir(&disk.path).unwrap().flatten().any(|entry| {
                    let record = fs::read_to_string(entry.path().join("volume.json")).unwrap_or_default();
                    let name = entry.file_name().into_string().unwrap();
                    name.starts_with(".unfinished") || record.contains("resizing")
                });
                (!left).then_some(())
            })
            .await;
        assert!(swept.is_some(), "{}", host.log());
        let there: BTreeMap<String, Option<u64>> = host
            .api
            .volumes()
            .await
            .unwrap()
            .into_iter()
            .map(|volume| (volume.id, volume.limit))
            .collect();
        for id in there.keys() {
            assert!(known.contains_key(id), "{id} had gone");
        }
        for (id, may_be) in &mut known {
            let is = there.get(id).copied().flatten();
            assert!(may_be.contains(&is), "{id} is {is:?} and not of {may_be:?}");
            *may_be = [is; 2];
        }
        known.retain(|_, is| is[0].is_some());
    }
    assert!(known.len() >= ROUNDS, "{known:?}");
    // Each can be used, and be made larger or smaller.
    for id in known.keys().filter(|id| id.starts_with('v')).rev().take(4) {
        let lines = output(&host, id, "echo kept > /data/file; sync; cat /data/file").await;
        assert_eq!(lines, ["kept"]);
        let to = Resize { limit: 32 * MIB };
        let resized = host.api.resize_volume(id, &to).await;
        assert!(
            resized.is_ok() || kind == ProviderKind::Dir && cannot_grow().is_some(),
            "{resized:?}"
        );
        host.api.delete_volume(id).await.unwrap();
    }
}

/// Whoever has sent it may remove their own as soon as it is taken.
pub(crate) async fn what_was_received_survives_a_power_cut() {
    let host = Host::boot().await;
    let source = Btrfs::provide(&host, "source").await;
    let mut disk = Disk::new(&host, "btrfs");
    let provider = NewProvider {
        id: DISK.into(),
        kind: ProviderKind::Btrfs,
        path: disk.path.display().to_string(),
        ..NewProvider::default()
    };
    host.api.add_provider(&provider).await.unwrap();
    host.api.create_volume("source", &new("one", None)).await.unwrap();
    let noise: Vec<u8> = (0..10 * MIB)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect();
    fs::write(source.data("one").join("noise"), &noise).unwrap();
    host.api.snapshot_volume("one", &copy("kept")).await.unwrap();
    let (sent, stream) = piped(&["send", "kept"], &[]);
    assert!(sent, "{}", String::from_utf8_lossy(&stream));
    host.api.delete_volume("kept").await.unwrap();
    let (received, said) = piped(&["receive", "--provider", DISK], &stream);
    assert!(received, "{}", String::from_utf8_lossy(&said));
    host.kill_daemon();
    disk.cut(&host).await;
    host.start().await;
    let there = fs::read(disk.path.join("kept/data/noise")).unwrap();
    assert!(there == noise, "{} of {} bytes", there.len(), noise.len());
}

pub(crate) async fn subvolumes_survive_power_cuts() {
    survives("btrfs", ProviderKind::Btrfs).await;
}

pub(crate) async fn images_survive_power_cuts() {
    survives("ext4", ProviderKind::Dir).await;
}
