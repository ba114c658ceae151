//! Volumes on ZFS: zfs-fuse, a daemon of each test's own.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use flynn_api::volume::{Gc, NewProvider, ProviderKind, Rollback, VolumeType};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::limits::{holds, is_contained, resized};
use super::transfer::piped;
use super::{MIB, cli, copy, new, output};
use crate::host::{Host, kill};

/// What the machine lacks for these tests.
pub(crate) fn lacks() -> Option<String> {
    if !Path::new("/dev/fuse").exists() {
        return Some("no /dev/fuse".into());
    }
    // It says how it is used, and ends.
    let there = Command::new("zfs-fuse")
        .arg("--help")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    there.is_err().then(|| "no zfs-fuse (Debian: zfs-fuse)".into())
}

/// The daemon that is ZFS here, for as long as this lives. It sees the mounts of the test's thread, as does the host.
struct Daemon(Child);

impl Daemon {
    async fn start(host: &Host) -> Self {
        // Its lock and its socket are below /run, of which each test has its own, and so shall be its list of pools.
        fs::create_dir_all("/run/lock").unwrap();
        mount("tmpfs", "/var/lib", "tmpfs", MountFlags::empty(), None).unwrap();
        let daemon = Command::new("zfs-fuse")
            .args(["--no-daemon", "--no-kstat-mount"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Self(daemon);
        let answers = host.until(async || zfs(&["list"]).0.then_some(())).await;
        assert!(answers.is_some(), "zfs-fuse does not answer");
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Those of this thread: each test has its own.
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap_or_default();
        let of_zfs = mounts.lines().filter(|line| line.contains(" fuse.zfs "));
        let mut places: Vec<&str> = of_zfs.filter_map(|line| line.split(' ').nth(1)).collect();
        places.sort_unstable();
        for place in places.iter().rev() {
            let _ = unmount(*place, UnmountFlags::DETACH);
        }
        kill(self.0.id(), 9);
        let _ = self.0.wait();
    }
}

fn zfs(args: &[&str]) -> (bool, String) {
    let output = Command::new("zfs").args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A provider of a pool of its own.
struct Pool {
    path: PathBuf,
    dataset: String,
    _daemon: Option<Daemon>,
}

impl Pool {
    async fn of(host: &Host) -> Self {
        let daemon = Daemon::start(host).await;
        Self {
            _daemon: Some(daemon),
            ..Self::provide(host, "tank")
        }
    }

    fn provide(host: &Host, id: &str) -> Self {
        let path = host.state.with_file_name(id);
        fs::create_dir(&path).unwrap();
        let device = path.with_extension("img").display().to_string();
        let directory = path.display().to_string();
        let (ok, text) = cli(&[
            "add-provider",
            id,
            &directory,
            "--kind",
            "zfs",
            "--device",
            &device,
            "--size",
            "400MB",
        ]);
        assert!(ok, "{text}{}", host.log());
        // It has all that volumes hold.
        let mode = fs::metadata(&device).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        Self {
            path,
            dataset: format!("flynn-{id}"),
            _daemon: None,
        }
    }

    /// Where a volume's data are.
    fn data(&self, id: &str) -> PathBuf {
        let record = fs::read(self.path.join(id).join("volume.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        self.path.join(".data").join(record["dataset"].as_str().unwrap())
    }

    /// Its datasets and snapshots.
    fn datasets(&self) -> Vec<String> {
        let volumes = format!("{}/volumes", self.dataset);
        let (ok, text) = zfs(&[
            "list",
            "-H",
            "-r",
            "-t",
            "filesystem,snapshot",
            "-o",
            "name",
            &volumes,
        ]);
        assert!(ok, "{text}");
        text.lines().skip(1).map(str::to_owned).collect()
    }

    /// Sees to it that no volume is there, nor anything that was to become one.
    async fn is_empty(&self, host: &Host) {
        let empty = host
            .until(async || {
                host.api.collect_volumes(&Gc::default()).await.unwrap();
                self.datasets().is_empty().then_some(())
            })
            .await;
        let mut names: Vec<_> = fs::read_dir(&self.path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert!(empty.is_some(), "{:?}\n{}", self.datasets(), host.log());
        assert_eq!(names, [".data", ".flynn-provider"]);
    }
}

pub(crate) async fn a_full_dataset_is_contained() {
    let host = Host::boot().await;
    let pool = Pool::of(&host).await;
    is_contained(&host, "tank").await;
    let volume = host.api.volume("full").await.unwrap();
    assert!(
        volume.limit == Some(32 * MIB) && volume.used.is_some(),
        "{volume:?}"
    );
    for limit in [64, 20] {
        resized(&host, "full", limit * MIB).await;
        let held = holds(&host, "full").await;
        assert!(
            held <= limit * MIB && held > limit * MIB / 2,
            "{held} of {limit} MiB"
        );
    }
    for id in ["full", "other"] {
        host.api.delete_volume(id).await.unwrap();
    }
    pool.is_empty(&host).await;
}

pub(crate) async fn datasets_have_snapshots() {
    let host = Host::boot().await;
    let pool = Pool::of(&host).await;
    host.api
        .create_volume("tank", &new("one", Some(64 * MIB)))
        .await
        .unwrap();
    let write = |text: &str| fs::write(pool.data("one").join("file"), text).unwrap();
    let read = |id: &str| fs::read_to_string(pool.data(id).join("file")).unwrap();
    write("first");
    let first = host.api.snapshot_volume("one", &copy("first")).await.unwrap();
    assert_eq!(
        (first.kind, first.source.as_deref()),
        (VolumeType::Snapshot, Some("one"))
    );
    write("second");
    host.api.snapshot_volume("one", &copy("second")).await.unwrap();
    write("third");
    // Of a snapshot, and of the volume as it is.
    host.api.fork_volume("first", &copy("of-first")).await.unwrap();
    host.api.fork_volume("one", &copy("of-one")).await.unwrap();
    assert_eq!(
        (read("of-first").as_str(), read("of-one").as_str()),
        ("first", "third")
    );
    assert_eq!(
        output(
            &host,
            "of-first",
            "cat /data/file; echo; echo mine > /data/file; cat /data/file"
        )
        .await,
        ["first", "mine"]
    );
    assert!(
        holds(&host, "of-one").await < 64 * MIB,
        "a fork has its source's limit"
    );
    // Back, and forth again: what came after is in its snapshot still.
    for snapshot in ["first", "second", "first"] {
        let to = Rollback {
            snapshot: snapshot.into(),
        };
        host.api.roll_volume_back("one", &to).await.unwrap();
        assert_eq!(read("one"), snapshot);
    }
    let (ok, text) = cli(&["rollback", "of-one", "first"]);
    assert!(!ok && text.contains("no snapshot of volume of-one"), "{text}");
    // Each is on its own: what it was made of may go.
    host.api.delete_volume("one").await.unwrap();
    host.api.fork_volume("second", &copy("late")).await.unwrap();
    assert_eq!(
        (read("late").as_str(), read("of-one").as_str()),
        ("second", "third")
    );
    for id in ["first", "second", "of-first", "of-one", "late"] {
        host.api.delete_volume(id).await.unwrap();
    }
    pool.is_empty(&host).await;
}

pub(crate) async fn datasets_are_sent_and_received() {
    let host = Host::boot().await;
    let pool = Pool::of(&host).await;
    // Stands for another host's.
    let other = Pool::provide(&host, "other");
    host.api.create_volume("tank", &new("one", None)).await.unwrap();
    let noise: Vec<u8> = (0..MIB)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect();
    fs::write(pool.data("one").join("noise"), &noise).unwrap();
    host.api.snapshot_volume("one", &copy("first")).await.unwrap();
    fs::write(pool.data("one").join("more"), "more").unwrap();
    host.api.snapshot_volume("one", &copy("second")).await.unwrap();
    let (ok, first) = piped(&["send", "first"], b"");
    assert!(ok && first.len() > noise.len());
    let (ok, second) = piped(&["send", "second", "--from", "first"], b"");
    assert!(ok && second.len() < 128 << 10, "{}", second.len());
    for id in ["first", "second", "one"] {
        host.api.delete_volume(id).await.unwrap();
    }
    pool.is_empty(&host).await;

    let receive = |input: &[u8]| {
        let (ok, text) = piped(&["receive", "--provider", "other"], input);
        (ok, String::from_utf8_lossy(&text).into_owned())
    };
    let mut damaged = first.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    for (input, wanted) in [
        (&second[..], "send that first"),
        (&first[..first.len() - 40], "cut short"),
        (&damaged[..], ""),
        (&of_several(&first)[..], "more than a snapshot"),
    ] {
        let (ok, text) = receive(input);
        assert!(!ok && text.contains(wanted), "{text}");
        other.is_empty(&host).await;
    }
    for (input, id) in [(&first, "first"), (&second, "second")] {
        let (ok, text) = receive(input);
        assert!(ok && text == format!("{id}\n"), "{text}");
    }
    host.api.fork_volume("second", &copy("one")).await.unwrap();
    assert!(fs::read(other.data("one").join("noise")).unwrap() == noise);
    assert_eq!(output(&host, "one", "cat /data/more").await, ["more"]);
    for id in ["first", "one", "second"] {
        host.api.delete_volume(id).await.unwrap();
    }
    other.is_empty(&host).await;
}

/// The same stream, as if it were one of several snapshots, with all its digests right.
fn of_several(sent: &[u8]) -> Vec<u8> {
    use flynn_hostd::volumes::{Decoder, Encoder, Part};
    let (mut decoder, mut encoder, mut bytes) = (Decoder::default(), Encoder::default(), Vec::new());
    decoder.push(sent);
    while let Some(part) = decoder.part().unwrap() {
        match part {
            Part::Header(header) => bytes.extend(encoder.begin(&header).unwrap()),
            Part::Piece(piece) => {
                let mut piece = piece.to_vec();
                if piece[8..12] == [0xac, 0xcb, 0xba, 0xf5] {
                    piece[16] = (piece[16] & !3) | 2;
                }
                bytes.extend(encoder.piece(&piece));
            }
            Part::End => {}
        }
    }
    bytes.extend(encoder.end());
    bytes
}

pub(crate) async fn datasets_survive_kills() {
    let host = Host::boot().await;
    let pool = Pool::of(&host).await;
    host.api.create_volume("tank", &new("one", None)).await.unwrap();
    fs::write(pool.data("one").join("file"), "kept").unwrap();
    for round in 0..4_u64 {
        let churn = async {
            for step in 0.. {
                let snapshot = format!("s{round}-{step}");
                let made = host.api.snapshot_volume("one", &copy(&snapshot)).await;
                let fork = format!("f{round}-{step}");
                if made.is_err() || host.api.fork_volume(&snapshot, &copy(&fork)).await.is_err() {
                    return;
                }
                let to = Rollback { snapshot };
                if host.api.roll_volume_back("one", &to).await.is_err()
                    || host.api.delete_volume(&fork).await.is_err()
                {
                    return;
                }
            }
        };
        let kill = async {
            tokio::time::sleep(std::time::Duration::from_millis(150 + 61 * round)).await;
            host.kill_daemon();
        };
        tokio::join!(churn, kill);
        host.start().await;
        for volume in host.api.volumes().await.unwrap() {
            if volume.kind == VolumeType::Data {
                assert_eq!(
                    output(&host, &volume.id, "cat /data/file").await,
                    ["kept"],
                    "{}",
                    volume.id
                );
            }
        }
    }
    let volumes = host.api.volumes().await.unwrap();
    assert!(volumes.len() > 4, "{volumes:?}");
    for volume in volumes {
        host.api.delete_volume(&volume.id).await.unwrap();
    }
    pool.is_empty(&host).await;
    // It is there again when the machine is, and its dataset is what it was.
    let (ok, text) = cli(&["remove-provider", "tank"]);
    assert!(ok, "{text}");
    let again = NewProvider {
        id: "tank".into(),
        kind: ProviderKind::Zfs,
        path: pool.path.display().to_string(),
        dataset: Some(pool.dataset.clone()),
        ..NewProvider::default()
    };
    host.api.add_provider(&again).await.unwrap();
    host.api.create_volume("tank", &new("one", None)).await.unwrap();
    // Among its volumes there is no room for another provider's, and nothing is made of what is refused.
    let beside = host.state.with_file_name("beside");
    let below = pool.path.join("below");
    fs::create_dir(&beside).unwrap();
    fs::create_dir(&below).unwrap();
    let (within, other) = (
        format!("{}/volumes/within", pool.dataset),
        format!("{}/other", pool.dataset),
    );
    for (path, dataset, why) in [
        (&beside, &pool.dataset, "take another dataset"),
        (&beside, &within, "take another dataset"),
        (&below, &other, "take another directory"),
    ] {
        let overlapping = NewProvider {
            id: "overlapping".into(),
            path: path.display().to_string(),
            dataset: Some(dataset.clone()),
            ..again.clone()
        };
        let refused = host.api.add_provider(&overlapping).await.unwrap_err();
        assert!(refused.message.contains(why), "{refused}");
    }
    for dataset in [&within, &other] {
        assert!(!zfs(&["list", dataset.as_str()]).0, "{dataset} was made");
    }
    let apart = NewProvider {
        id: "apart".into(),
        path: beside.display().to_string(),
        dataset: Some(other.clone()),
        ..again
    };
    host.api.add_provider(&apart).await.unwrap();
    assert!(zfs(&["list", other.as_str()]).0);
}
