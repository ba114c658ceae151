//! What a snapshot costs of a small volume and of a large one: on a copy-on-write filesystem the same.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flynn_api::volume::{Copy, NewProvider, NewVolume, ProviderKind};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::ours::{Host, PATIENCE};
use super::subject;
use crate::row::{Goal, Row, Subject};
use crate::samples::in_turns;
use crate::suites::Thoroughness;

const MIB: u64 = 1 << 20;
const SMALL: u64 = 100 * MIB;
const LARGE: u64 = 2048 * MIB;

/// The disk of the provider: a file without what is not written, which goes with the host's directory.
const DISK: u64 = 3072 * MIB;

/// The row of [`on_btrfs`].
pub(super) const BTRFS: [Subject; 1] = [subject(
    "snapshot of a volume of 2 GB, btrfs",
    "ms",
    Some("of 100 MB"),
    Goal::RatioWithin(0.25),
)];

/// The row of [`on_zfs`].
pub(super) const ZFS: [Subject; 1] = [subject(
    "snapshot of a volume of 2 GB, ZFS (zfs-fuse)",
    "ms",
    Some("of 100 MB"),
    Goal::RatioWithin(0.25),
)];

/// Takes the row.
pub(super) fn on_btrfs(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let (path, image) = (host.dir().join("pool"), host.dir().join("pool.btrfs"));
    fs::create_dir(&path)?;
    File::create(&image)?.set_len(DISK)?;
    run(Command::new("mkfs.btrfs").arg("-q").arg(&image))?;
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path))?;
    let _mounted = Mounted(path.clone());
    let provider = NewProvider {
        id: "pool".into(),
        kind: ProviderKind::Btrfs,
        path: path.display().to_string(),
        ..NewProvider::default()
    };
    let data = |id: &str| Ok(path.join(id).join("data"));
    measure(host, &provider, data, BTRFS[0], thoroughness)
}

/// Takes the row.
pub(super) fn on_zfs(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let (path, device) = (host.dir().join("pool"), host.dir().join("pool.zfs"));
    fs::create_dir(&path)?;
    let _daemon = ZfsFuse::start()?;
    let provider = NewProvider {
        id: "pool".into(),
        kind: ProviderKind::Zfs,
        path: path.display().to_string(),
        device: Some(device.display().to_string()),
        size: Some(DISK),
        ..NewProvider::default()
    };
    let data = |id: &str| {
        let record = fs::read(path.join(id).join("volume.json"))?;
        let record: serde_json::Value = serde_json::from_slice(&record)?;
        let dataset = record["dataset"].as_str().context("a volume has no dataset")?;
        Ok(path.join(".data").join(dataset))
    };
    measure(host, &provider, data, ZFS[0], thoroughness)
}

/// The daemon that is ZFS here. It sees the mounts of this thread, as the host does.
struct ZfsFuse(Child);

impl ZfsFuse {
    fn start() -> Result<Self> {
        fs::create_dir_all("/run/lock")?;
        mount("tmpfs", "/var/lib", "tmpfs", MountFlags::empty(), None)?;
        let daemon = Command::new("zfs-fuse")
            .args(["--no-daemon", "--no-kstat-mount"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run zfs-fuse (Debian: zfs-fuse)")?;
        let daemon = Self(daemon);
        let begun = Instant::now();
        while run(Command::new("zfs").arg("list")).is_err() {
            ensure!(begun.elapsed() < PATIENCE, "zfs-fuse does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }
}

impl Drop for ZfsFuse {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let of_zfs = mounts.lines().filter(|line| line.contains(" fuse.zfs "));
        let places: Vec<&str> = of_zfs.filter_map(|line| line.split(' ').nth(1)).collect();
        for place in places.iter().rev() {
            let _ = unmount(*place, UnmountFlags::DETACH);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A filesystem that is unmounted in the end.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn measure(
    host: &Host,
    provider: &NewProvider,
    data: impl Fn(&str) -> Result<PathBuf>,
    row: Subject,
    thoroughness: Thoroughness,
) -> Result<Vec<Row>> {
    let api = &host.api;
    let mut volumes = [("small", SMALL), ("large", LARGE)];
    host.runtime.block_on(api.add_provider(provider))?;
    for (id, size) in volumes {
        let new = NewVolume {
            id: Some(id.to_owned()),
            ..NewVolume::default()
        };
        host.runtime.block_on(api.create_volume(&provider.id, &new))?;
        fill(&data(id)?.join("data"), size)?;
    }
    let mut number = 0;
    let samples = in_turns(&mut volumes, thoroughness.pick(15, 60), |(id, _)| {
        // As a volume that is in use: what was written last is part of it.
        fs::write(data(id)?.join("last"), number.to_string())?;
        number += 1;
        let copy = Copy {
            id: Some(format!("{id}-{number}")),
        };
        host.runtime.block_on(async {
            let begun = Instant::now();
            let made = api.snapshot_volume(id, &copy).await?;
            let took = begun.elapsed();
            api.delete_volume(&made.id).await?;
            anyhow::Ok(took.as_secs_f64() * 1e3)
        })
    })?;
    Ok(vec![row.row(&samples[1], &samples[0])])
}

/// Writes a file that does not compress, and waits until it is on the disk.
fn fill(path: &Path, size: u64) -> Result<()> {
    let mut noise = File::open("/dev/urandom")?;
    let mut block = vec![0; 1 << 20];
    std::io::Read::read_exact(&mut noise, &mut block)?;
    let mut file = File::create(path)?;
    for number in 0..size / MIB {
        // No two blocks are alike.
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let output = command
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}", said.trim());
    Ok(())
}
