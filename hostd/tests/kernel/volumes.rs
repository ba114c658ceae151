//! Volumes on real filesystems: an ext4 in a file, and a btrfs of each test's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use flynn_api::ErrorCode;
use flynn_api::host::{Job, VolumeBinding, label};
use flynn_api::volume::{Copy, Gc, NewProvider, NewVolume, ProviderKind, Rollback, Volume, VolumeType};
use rustix::mount::{UnmountFlags, unmount};

use crate::host::Host;

const MIB: u64 = 1 << 20;

/// What the machine lacks for these tests.
pub(crate) fn lacks() -> Option<String> {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if let Some(name) = ["btrfs", "ext4"]
        .into_iter()
        .find(|name| !filesystems.contains(name))
    {
        return Some(format!("the kernel has no {name}"));
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("no loop devices".into());
    }
    for (program, package) in [("mkfs.ext4", "e2fsprogs"), ("mkfs.btrfs", "btrfs-progs")] {
        let there = Command::new(program)
            .arg("-V")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if there.is_err() {
            return Some(format!("no {program} (Debian: {package})"));
        }
    }
    None
}

/// A btrfs, mounted for as long as this lives. It goes before its host does.
pub(crate) struct Btrfs(PathBuf);

impl Btrfs {
    /// Makes one and gives it to the host as the provider `fast`.
    pub(crate) async fn of(host: &Host) -> Self {
        let pool = Self::mount(&host.state.with_file_name("pool"));
        let new = NewProvider {
            id: "fast".into(),
            kind: ProviderKind::Btrfs,
            path: pool.0.display().to_string(),
            default: false,
        };
        host.api.add_provider(&new).await.unwrap();
        pool
    }

    fn mount(path: &Path) -> Self {
        let image = path.with_extension("btrfs");
        let file = fs::File::create(&image).unwrap();
        file.set_len(1024 * MIB).unwrap();
        fs::create_dir(path).unwrap();
        let paths = [image.as_path(), path];
        run("mkfs.btrfs", &["-q"], &paths[..1]);
        run("mount", &["-o", "loop"], &paths);
        Self(path.to_owned())
    }

    fn data(&self, id: &str) -> PathBuf {
        self.0.join(id).join("data")
    }
}

impl Drop for Btrfs {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn run(program: &str, words: &[&str], paths: &[&Path]) {
    let output = Command::new(program).args(words).args(paths).output().unwrap();
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn new(id: &str, limit: Option<u64>) -> NewVolume {
    NewVolume {
        id: Some(id.into()),
        limit,
        ..NewVolume::default()
    }
}

fn copy(id: &str) -> Copy {
    Copy { id: Some(id.into()) }
}

/// A job with this volume at `/data`.
fn job_with(host: &Host, volume: &str, script: &str) -> Job {
    let mut job = host.job(script);
    job.config.volumes = vec![VolumeBinding {
        path: "/data".into(),
        volume_id: volume.into(),
        delete_on_stop: false,
    }];
    job
}

async fn output(host: &Host, volume: &str, script: &str) -> Vec<String> {
    host.finish(&job_with(host, volume, script)).await.1
}

/// `flynn-host volume …`, as an operator would.
fn cli(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .arg("volume")
        .args(args)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// Fills a volume to its last byte. Its neighbour, and the host, have what they had.
async fn is_contained(host: &Host, provider: &str) {
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
    let left: Vec<_> = fs::read_dir(&pool.0)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, [".flynn-provider"]);
}

/// Runs `flynn-host volume …` with such an input; gives whether it went well, and its output as bytes.
fn piped(args: &[&str], input: &[u8]) -> (bool, Vec<u8>) {
    use std::io::Write as _;
    let mut child = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .arg("volume")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // Whoever has seen enough does not read on.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let ok = output.status.success();
    (ok, if ok { output.stdout } else { output.stderr })
}

pub(crate) async fn snapshots_are_sent_and_received() {
    let host = Host::boot().await;
    let pool = Btrfs::of(&host).await;
    // Stands for another host's.
    let other = Btrfs::mount(&host.state.with_file_name("other"));
    let new_provider = NewProvider {
        id: "other".into(),
        kind: ProviderKind::Btrfs,
        path: other.0.display().to_string(),
        default: false,
    };
    host.api.add_provider(&new_provider).await.unwrap();
    host.api
        .create_volume("fast", &new("one", Some(64 * MIB)))
        .await
        .unwrap();
    let data = pool.data("one");
    let noise: Vec<u8> = (0..3 * MIB)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect();
    fs::write(data.join("noise"), &noise).unwrap();
    fs::create_dir(data.join("dir")).unwrap();
    std::os::unix::fs::symlink("../noise", data.join("dir/link")).unwrap();
    host.api.snapshot_volume("one", &copy("first")).await.unwrap();
    fs::write(data.join("more"), "more").unwrap();
    fs::remove_file(data.join("dir/link")).unwrap();
    host.api.snapshot_volume("one", &copy("second")).await.unwrap();

    let (ok, error) = piped(&["send", "one"], b"");
    assert!(!ok && String::from_utf8_lossy(&error).contains("make a snapshot"));
    let (ok, first) = piped(&["send", "first"], b"");
    assert!(ok && first.len() > noise.len());
    let (ok, second) = piped(&["send", "second", "--from", "first"], b"");
    assert!(ok && second.len() < 64 << 10, "{}", second.len());

    // Both are here under these ids: as on another host, they are not.
    for id in ["first", "second", "one"] {
        host.api.delete_volume(id).await.unwrap();
    }
    let refused = |input: &[u8], wanted: &str| {
        let (ok, error) = piped(&["receive", "--provider", "other"], input);
        let error = String::from_utf8_lossy(&error).into_owned();
        assert!(!ok && error.contains(wanted), "{error}");
        let left: Vec<_> = fs::read_dir(&other.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, [".flynn-provider"], "{error}");
    };
    refused(&second, "send that first");
    refused(&first[..first.len() - 40], "cut short");
    refused(&first[..100_000], "cut short");
    refused(b"something else", "no snapshot");
    let mut damaged = first.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    refused(&damaged, "");
    let (ok, text) = piped(&["receive"], &second);
    assert!(!ok && String::from_utf8_lossy(&text).contains("on btrfs"));

    for (input, id) in [(&first, "first"), (&second, "second")] {
        let (ok, text) = piped(&["receive", "--provider", "other"], input);
        assert!(
            ok && text == format!("{id}\n").into_bytes(),
            "{}",
            String::from_utf8_lossy(&text)
        );
    }
    assert!(fs::read(other.data("first").join("noise")).unwrap() == noise);
    assert_eq!(
        fs::read_to_string(other.data("second").join("more")).unwrap(),
        "more"
    );
    assert!(!other.data("second").join("dir/link").exists() && !other.data("first").join("more").exists());
    let volume = host.api.volume("second").await.unwrap();
    assert_eq!(
        (volume.kind, volume.source.as_deref(), volume.limit),
        (VolumeType::Snapshot, Some("one"), Some(64 * MIB))
    );
    assert!(fs::write(other.data("second").join("more"), "x").is_err());
    host.api.fork_volume("second", &copy("one")).await.unwrap();
    assert_eq!(
        output(
            &host,
            "one",
            "cat /data/more; echo; echo mine > /data/more; cat /data/more"
        )
        .await,
        ["more", "mine"]
    );
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
