//! What there is of a host of ours: whatever is more of it after many jobs than before has leaked.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::ours::Host;

/// How long a host may take to come to rest.
const REST: Duration = Duration::from_secs(15);
/// It is at rest when nothing has changed for so long.
const STILL: Duration = Duration::from_millis(500);

/// Counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Census {
    pub(super) processes: usize,
    pub(super) mounts: usize,
    pub(super) cgroups: usize,
    pub(super) interfaces: usize,
    pub(super) map_entries: u64,
    /// Those of the daemon.
    pub(super) descriptors: usize,
    pub(super) sockets: usize,
    /// What ended jobs may keep is not in it: their records and logs.
    pub(super) files: usize,
}

impl Census {
    /// Takes it, once the host is at rest.
    pub(super) fn of(host: &Host) -> Result<Self> {
        let begun = Instant::now();
        let (mut last, mut since) = (Self::now(host)?, Instant::now());
        while since.elapsed() < STILL && begun.elapsed() < REST {
            std::thread::sleep(Duration::from_millis(20));
            let now = Self::now(host)?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(last)
    }

    fn now(host: &Host) -> Result<Self> {
        let network = host.runtime.block_on(host.api.network())?;
        let interfaces = fs::read_to_string("/proc/thread-self/net/dev")?;
        let descriptors = format!("/proc/{}/fd", host.daemon_pid());
        Ok(Self {
            processes: pids(host).len(),
            mounts: fs::read_to_string("/proc/thread-self/mountinfo")?.lines().count(),
            cgroups: host.groups.iter().map(|group| below(group)).sum(),
            interfaces: interfaces.lines().filter(|line| line.contains(':')).count(),
            map_entries: network.maps.iter().map(|map| map.entries).sum(),
            descriptors: fs::read_dir(&descriptors).context(descriptors)?.count(),
            sockets: entries(Path::new("/run/flynn/jobs")),
            files: host.working_files(),
        })
    }

    /// What is more than it was, by name.
    pub(super) fn more_than(&self, before: &Self) -> Vec<(&'static str, u64)> {
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let both = [
            ("processes", count(self.processes), count(before.processes)),
            ("mounts", count(self.mounts), count(before.mounts)),
            ("cgroups", count(self.cgroups), count(before.cgroups)),
            ("interfaces", count(self.interfaces), count(before.interfaces)),
            ("map entries", self.map_entries, before.map_entries),
            (
                "descriptors of the daemon",
                count(self.descriptors),
                count(before.descriptors),
            ),
            ("sockets of jobs", count(self.sockets), count(before.sockets)),
            ("files of containers", count(self.files), count(before.files)),
        ];
        both.into_iter()
            .filter(|(_, now, then)| now > then)
            .map(|(name, now, then)| (name, now - then))
            .collect()
    }
}

/// All processes of the host: the daemon, supervisors, containers.
pub(super) fn pids(host: &Host) -> Vec<u32> {
    let mut pids: Vec<u32> = host.groups.iter().flat_map(|group| pids_below(group)).collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

fn pids_below(group: &Path) -> Vec<u32> {
    let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let own = procs.lines().filter_map(|line| line.parse().ok());
    let children = fs::read_dir(group).into_iter().flatten().flatten();
    let children = children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    own.chain(children.flat_map(|entry| pids_below(&entry.path())))
        .collect()
}

fn below(group: &Path) -> usize {
    let children = fs::read_dir(group).into_iter().flatten().flatten();
    let children = children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    children.map(|entry| 1 + below(&entry.path())).sum()
}

/// How many entries a directory has.
pub(super) fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}
