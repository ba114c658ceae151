//! Volumes as datasets of a ZFS, by its own programs.
//!
//! A provider has a dataset that is mounted at its directory, so that records are on the same disks as data. Below it,
//! in `volumes`, each volume's data are a dataset by a name of its own, mounted in `.data/`; a snapshot is one of ZFS.
//! The volume's record says which of them is its. What no record names goes, once nothing is made of it any more:
//! ZFS keeps a dataset for as long as it has snapshots, and a snapshot for as long as it has clones.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::files;
use crate::tool::{SHORT, Tool};

/// The dataset below the provider's own in which those of volumes are.
const VOLUMES: &str = "volumes";

/// Where they are mounted, in the provider's directory.
const MOUNTS: &str = ".data";

/// The start of a stream: type, length, magic, version and kind.
const MAGIC: u64 = 0x2_f5ba_cbac;
const BEGIN: usize = 24;

/// How often what nobody needs is looked for: what goes sets free what it was made of.
const ROUNDS: usize = 8;

pub(super) const TOOL: Tool = Tool {
    program: "zfs",
    package: "zfsutils-linux",
};

const POOLS: Tool = Tool {
    program: "zpool",
    package: "zfsutils-linux",
};

fn zfs(words: &[&str]) -> io::Result<String> {
    zfs_within(words, SHORT)
}

fn zfs_within(words: &[&str], limit: Duration) -> io::Result<String> {
    let words: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
    TOOL.run(&words, limit)
}

/// Whether its programs can be run, and something answers them.
pub(super) fn is_there() -> io::Result<()> {
    zfs(&["list", "-H", "-o", "name"]).map(drop)
}

/// Whether a text can name a dataset, or a pool.
pub(super) fn is_name(text: &str) -> bool {
    let part = |part: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(fits)
    };
    text.len() <= 128 && text.split('/').all(part)
}

/// Whether a dataset is that of a provider, or where its volumes are.
pub(super) fn is_among(dataset: &str, provider: &str) -> bool {
    let below = dataset.strip_prefix(provider);
    below.is_some_and(|below| {
        let rest = below
            .strip_prefix('/')
            .and_then(|below| below.strip_prefix(VOLUMES));
        below.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// Makes a pool of a disk or a file, unless it is there.
pub(super) fn make_pool(name: &str, device: &Path) -> io::Result<()> {
    let there = ["list", "-H", "-o", "name", name].map(OsStr::new);
    if POOLS.run(&there, SHORT).is_ok() {
        return Ok(());
    }
    let make = ["create", "-m", "none", name].map(OsStr::new);
    let make = [&make[..], &[device.as_os_str()]].concat();
    POOLS.run(&make, SHORT).map(drop)
}

/// What the volumes of a provider are kept in.
#[derive(Clone, Copy)]
pub(super) struct Zfs<'a> {
    /// The provider's dataset.
    pub(super) root: &'a str,
    /// Its directory.
    pub(super) path: &'a Path,
}

impl Zfs<'_> {
    fn full(self, name: &str) -> String {
        format!("{}/{VOLUMES}/{name}", self.root)
    }

    /// Where a dataset is mounted.
    pub(super) fn mount_point(self, name: &str) -> PathBuf {
        self.path.join(MOUNTS).join(name)
    }

    /// Makes what a provider needs, where it is missing. One that is there must be mounted here.
    pub(super) fn prepare(self, is_marked: bool) -> io::Result<()> {
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let Some(path) = self.path.to_str() else {
            return refused("the path is no text".into());
        };
        let is_empty = || Ok::<_, io::Error>(fs::read_dir(self.path)?.next().is_none());
        match zfs(&["get", "-H", "-o", "value", "mountpoint", self.root]) {
            Ok(there) if there.trim() == path => {}
            Ok(there) if there.trim() == "none" && is_empty()? => {
                zfs(&["set", &format!("mountpoint={path}"), self.root])?;
            }
            Ok(there) => {
                return refused(format!(
                    "the dataset {} is mounted at {}: name that directory, or another dataset, which is then made",
                    self.root,
                    there.trim()
                ));
            }
            Err(_) if !is_empty()? => return refused(format!("{path} is not empty: name another directory")),
            Err(_) => {
                zfs(&["create", "-o", &format!("mountpoint={path}"), self.root])?;
            }
        }
        if !super::image::is_mounted(self.path)? {
            zfs(&["mount", self.root])?;
        }
        fs::set_permissions(self.path, fs::Permissions::from_mode(0o700))?;
        let volumes = format!("{}/{VOLUMES}", self.root);
        if zfs(&["list", "-H", "-o", "name", &volumes]).is_ok() {
            // What is not ours would be swept.
            if is_marked {
                return Ok(());
            }
            return refused(format!(
                "there is a dataset {volumes} of somebody else's: name another one"
            ));
        }
        files::private_dir(&self.path.join(MOUNTS))?;
        let mountpoint = format!("mountpoint={path}/{MOUNTS}");
        let harmless = ["-o", "canmount=off", "-o", "devices=off", "-o", "setuid=off"];
        let words = [&["create", "-o", &mountpoint], &harmless[..], &[&volumes]].concat();
        zfs(&words).map(drop)
    }

    /// Makes an empty one.
    pub(super) fn make(self, name: &str, limit: Option<u64>, (uid, gid): (u32, u32)) -> io::Result<()> {
        zfs(&["create", &self.full(name)])?;
        self.set_limit(name, limit)?;
        let data = self.open(name)?;
        fs::set_permissions(&data, fs::Permissions::from_mode(0o755))?;
        chown(&data, Some(uid), Some(gid))?;
        files::sync_dir(&data)
    }

    /// Limits what it may hold, without its snapshots.
    pub(super) fn set_limit(self, name: &str, limit: Option<u64>) -> io::Result<()> {
        match limit {
            Some(limit) => zfs(&["set", &format!("refquota={limit}"), &self.full(name)]).map(drop),
            None => Ok(()),
        }
    }

    /// The directory of its data, mounted.
    pub(super) fn open(self, name: &str) -> io::Result<PathBuf> {
        let path = self.mount_point(name);
        if !super::image::is_mounted(&path)? {
            zfs(&["mount", &self.full(name)])?;
        }
        Ok(path)
    }

    /// Keeps what `name`, `dataset@snapshot`, is now.
    pub(super) fn snapshot(self, name: &str) -> io::Result<()> {
        zfs(&["snapshot", &self.full(name)]).map(drop)
    }

    /// Makes a dataset that begins as a copy of a snapshot.
    pub(super) fn clone_of(self, snapshot: &str, name: &str, limit: Option<u64>) -> io::Result<()> {
        zfs(&["clone", &self.full(snapshot), &self.full(name)])?;
        self.set_limit(name, limit)?;
        self.open(name).map(drop)
    }

    /// How many bytes it refers to.
    pub(super) fn used(self, name: &str) -> Option<u64> {
        let words = ["get", "-Hp", "-o", "value", "referenced", &self.full(name)];
        zfs_within(&words, super::QUICK).ok()?.trim().parse().ok()
    }

    /// What writes a snapshot's bytes, or what differs from an earlier one.
    pub(super) fn send(self, snapshot: &str, from: Option<&str>) -> Command {
        let mut command = Command::new(TOOL.program);
        command.arg("send");
        if let Some(from) = from {
            command.arg("-i").arg(self.full(from));
        }
        command.arg(self.full(snapshot));
        command
    }

    /// What reads them. Nothing of it is mounted.
    pub(super) fn receive(self, snapshot: &str) -> Command {
        let mut command = Command::new(TOOL.program);
        command.args(["receive", "-u"]).arg(self.full(snapshot));
        command
    }

    /// Sees to it that a snapshot has arrived, and that its dataset stays as it is.
    pub(super) fn has_arrived(self, snapshot: &str) -> io::Result<()> {
        zfs(&["list", "-H", "-t", "snapshot", "-o", "name", &self.full(snapshot)])?;
        let dataset = snapshot.split_once('@').map_or(snapshot, |(dataset, _)| dataset);
        if super::image::is_mounted(&self.mount_point(dataset))? {
            return Ok(());
        }
        zfs(&["set", "canmount=noauto", &self.full(dataset)]).map(drop)
    }

    /// Removes what is not `needed`, of the datasets and snapshots there were when that was asked for. What something
    /// is made of stays.
    pub(super) fn sweep(self, needed: impl Fn(&[String]) -> io::Result<BTreeSet<String>>) -> io::Result<()> {
        let prefix = format!("{}/{VOLUMES}/", self.root);
        for _ in 0..ROUNDS {
            let words = ["list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name"];
            let shown = zfs(&[&words[..], &[prefix.trim_end_matches('/')]].concat())?;
            let names = shown.lines().filter_map(|line| line.strip_prefix(&prefix));
            // Ours have nothing below them.
            let names = names.filter(|name| !name.contains('/'));
            let names: Vec<String> = names.map(str::to_owned).collect();
            let needed = needed(&names)?;
            let mut gone = false;
            // What is below goes first, and snapshots before their datasets.
            for name in names.iter().rev().filter(|name| !needed.contains(*name)) {
                let has_snapshots = !name.contains('@')
                    && needed
                        .iter()
                        .any(|other| other.split('@').next() == Some(name.as_str()));
                if !has_snapshots {
                    // Nobody uses it; it is mounted all the same.
                    gone |= zfs(&["destroy", "-f", &self.full(name)]).is_ok();
                }
            }
            if !gone {
                break;
            }
        }
        Ok(())
    }

    /// Gives back what a dataset that is nobody's holds beyond the last of its snapshots.
    pub(super) fn give_back(self, name: &str) {
        let full = self.full(name);
        let words = [
            "list", "-H", "-r", "-t", "snapshot", "-o", "name", "-s", "creation", &full,
        ];
        let last = zfs(&words).unwrap_or_default().lines().last().map(str::to_owned);
        if let Some(last) = last
            && let Err(error) = zfs(&["rollback", &last])
        {
            tracing::warn!(dataset = full, %error, "what it holds stays until its snapshots go");
        }
    }
}

/// Refuses a stream that holds more than one snapshot of one dataset: others carry properties, such as where something
/// is to be mounted, and can remove what is there.
pub(super) fn check_stream(start: &[u8]) -> Result<(), &'static str> {
    let number = |at: usize| {
        let bytes = start.get(at..at + 8)?;
        bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    };
    let (Some(magic), Some(kind)) = (number(8), number(16)) else {
        return Err("it is too short");
    };
    let kind = match magic {
        MAGIC => kind,
        swapped if swapped.swap_bytes() == MAGIC => kind.swap_bytes(),
        _ => return Err("it is none of ZFS"),
    };
    // 1 is a stream of one snapshot, 2 one of several.
    if start.len() < BEGIN || kind & 3 != 1 {
        return Err("it holds more than a snapshot");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_no_options_and_no_ways_out() {
        for good in ["tank", "tank/flynn", "a-b.c:d_e/1"] {
            assert!(is_name(good), "{good}");
        }
        for bad in [
            "",
            "-f",
            "tank/",
            "/tank",
            "tank//a",
            "tank/-r",
            "a@b",
            "a b",
            "tank/../x",
        ] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn only_a_stream_of_one_snapshot_is_taken() {
        let stream = |kind: u64, swapped: bool| {
            let mut bytes = vec![0; 8];
            for number in [MAGIC, kind] {
                let number = if swapped { number.swap_bytes() } else { number };
                bytes.extend(number.to_le_bytes());
            }
            bytes
        };
        for swapped in [false, true] {
            assert_eq!(check_stream(&stream(1 | (4 << 2), swapped)), Ok(()));
            assert!(check_stream(&stream(2 | (4 << 2), swapped)).is_err());
            assert!(check_stream(&stream(0, swapped)).is_err());
        }
        assert!(check_stream(&stream(1, false)[..23]).is_err() && check_stream(&[7; 64]).is_err());
    }
}
