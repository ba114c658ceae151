//! Volumes on real filesystems: an ext4 in a file, and a btrfs of each test's own.

pub(crate) mod crashes;
pub(crate) mod destroy;
pub(crate) mod limits;
pub(crate) mod power;
pub(crate) mod snapshots;
pub(crate) mod transfer;
pub(crate) mod zfs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flynn_api::host::{Job, VolumeBinding};
use flynn_api::volume::{Copy, NewProvider, NewVolume, ProviderKind};
use rustix::mount::{UnmountFlags, unmount};

use crate::host::Host;

const MIB: u64 = 1 << 20;

/// What the machine lacks for tests on such a filesystem.
pub(crate) fn lacks(filesystem: &str, package: &str) -> Option<String> {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.split_whitespace().any(|name| name == filesystem) {
        return Some(format!("the kernel has no {filesystem}"));
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("no loop devices".into());
    }
    let program = format!("mkfs.{filesystem}");
    let there = Command::new(&program)
        .arg("-V")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    there
        .is_err()
        .then(|| format!("no {program} (Debian: {package})"))
}

/// Why an ext4 in use cannot be made larger here.
pub(crate) fn cannot_grow() -> Option<String> {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let has = line.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    let may = has.is_some_and(|set| set & (1 << CAP_SYS_RESOURCE) != 0);
    (!may).then(|| "root lacks CAP_SYS_RESOURCE".into())
}

/// A btrfs, mounted for as long as this lives. It goes before its host does.
pub(crate) struct Btrfs(PathBuf);

impl Btrfs {
    /// Makes one and gives it to the host as the provider `fast`.
    pub(crate) async fn of(host: &Host) -> Self {
        Self::provide(host, "fast").await
    }

    /// The same under another name.
    pub(crate) async fn provide(host: &Host, id: &str) -> Self {
        let pool = Self::mount(&host.state.with_file_name(id));
        let new = NewProvider {
            id: id.into(),
            kind: ProviderKind::Btrfs,
            path: pool.0.display().to_string(),
            ..NewProvider::default()
        };
        host.api.add_provider(&new).await.unwrap();
        pool
    }

    /// Sees to it that no volume is there, nor anything that was to become one.
    fn is_empty(&self) {
        let names = fs::read_dir(&self.0).unwrap();
        let left: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".flynn-provider"]);
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
        limit: None,
    }];
    job
}

async fn output(host: &Host, volume: &str, script: &str) -> Vec<String> {
    host.finish(&job_with(host, volume, script)).await.1
}

/// `flynn-host volume …`, as an operator would.
fn cli(args: &[&str]) -> (bool, String) {
    flynn_host(&[&["volume"][..], args].concat())
}

fn flynn_host(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}
