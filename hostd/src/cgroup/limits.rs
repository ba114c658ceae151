//! What a job may have at most, and how each kind of hierarchy is told.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Group, Hierarchy};

/// What a job may have at most, or by which weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of swap beside it.
    #[serde(default)]
    pub swap: u64,
    /// Thousandths of a core.
    pub cpu: u64,
    /// Its share where cores are scarce, 1 to 10,000; 100 is usual.
    #[serde(default = "usual")]
    pub cpu_weight: u64,
    /// The cores that it runs on, `0-3,6`; empty for all.
    #[serde(default)]
    pub cpuset: String,
    /// Processes and threads.
    pub pids: u64,
    /// Its share where the disk is busy, 1 to 1,000; 100 is usual.
    #[serde(default = "usual")]
    pub io_weight: u64,
    /// Bytes a second that it reads from the disk of the state directory; 0 for no limit.
    #[serde(default)]
    pub io_read: u64,
    /// Bytes a second that it writes to it; 0 for no limit.
    #[serde(default)]
    pub io_write: u64,
}

fn usual() -> u64 {
    100
}

impl Group {
    /// Sets a job's limits, in place of those it has. `disk` is on the disk whose bandwidth is limited.
    pub fn limit(&self, limits: &Limits, disk: &Path) -> io::Result<()> {
        // One that uses more already would be killed by v2; v1 refuses.
        let used = self.usage().memory.unwrap_or(0);
        if used > limits.memory {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("it uses {used} bytes of memory now: give it more, or stop it"),
            ));
        }
        self.dirs
            .iter()
            .try_for_each(|(hierarchy, dir)| apply(hierarchy, dir, limits, disk))
    }
}

/// Sets the limits that this hierarchy has the controllers for.
pub(super) fn apply(hierarchy: &Hierarchy, dir: &Path, limits: &Limits, disk: &Path) -> io::Result<()> {
    const PERIOD: u64 = 100_000;
    let set = |file: &str, value: String| {
        let refused = |error: io::Error| {
            let value = value.trim();
            io::Error::new(error.kind(), format!("{file} takes no {value:?}: {error}"))
        };
        fs::write(dir.join(file), &value).map_err(refused)
    };
    // What the kernel was built without is missing: then there is nothing to limit by.
    let set_if_there = |file: &str, value: String| {
        if dir.join(file).exists() {
            set(file, value)
        } else {
            Ok(())
        }
    };
    let quota = (limits.cpu * PERIOD / 1000).max(1000);
    let bandwidth = limits.io_read > 0 || limits.io_write > 0;
    let device = device(disk);
    let has_io = hierarchy.has("blkio") || dir.join("io.max").exists();
    if bandwidth && has_io && device.is_none() {
        let disk = disk.display();
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("io_read and io_write: {disk} is on no disk whose bandwidth can be limited"),
        ));
    }
    if hierarchy.is_v2() {
        set_if_there("memory.max", limits.memory.to_string())?;
        set_if_there("memory.swap.max", limits.swap.to_string())?;
        set_if_there("cpu.max", format!("{quota} {PERIOD}"))?;
        set_if_there("cpu.weight", limits.cpu_weight.to_string())?;
        // The end of the line takes back what was set.
        set_if_there("cpuset.cpus", format!("{}\n", limits.cpuset))?;
        set_if_there("io.weight", format!("default {}", limits.io_weight))?;
        set_if_there("io.bfq.weight", format!("default {}", limits.io_weight))?;
        if let Some(device) = device.filter(|_| has_io) {
            let most = |bytes: u64| match bytes {
                0 => "max".to_owned(),
                bytes => bytes.to_string(),
            };
            let (read, written) = (most(limits.io_read), most(limits.io_write));
            // Also takes back what was set.
            optional(
                bandwidth,
                set("io.max", format!("{device} rbps={read} wbps={written}")),
            )?;
        }
        return set_if_there("pids.max", limits.pids.to_string());
    }
    if hierarchy.has("memory") {
        // The sum of memory and swap may never be below memory: it is lifted first and set last.
        let _ = set("memory.memsw.limit_in_bytes", "-1".into());
        set("memory.limit_in_bytes", limits.memory.to_string())?;
        let sum = limits.memory.saturating_add(limits.swap);
        set_if_there("memory.memsw.limit_in_bytes", sum.to_string())?;
    }
    if hierarchy.has("cpu") {
        // v1 counts in shares, of which 1,024 are usual.
        set_if_there("cpu.shares", (limits.cpu_weight * 1024 / 100).max(2).to_string())?;
        if dir.join("cpu.cfs_quota_us").exists() {
            set("cpu.cfs_period_us", PERIOD.to_string())?;
            set("cpu.cfs_quota_us", quota.to_string())?;
        }
    }
    if hierarchy.has("cpuset") {
        let all = || fs::read_to_string(dir.parent().unwrap_or(dir).join("cpuset.cpus"));
        let cores = if limits.cpuset.is_empty() {
            all()?.trim().to_owned()
        } else {
            limits.cpuset.clone()
        };
        set("cpuset.cpus", cores)?;
    }
    if hierarchy.has("blkio") {
        set_if_there("blkio.weight", limits.io_weight.max(10).to_string())?;
        set_if_there("blkio.bfq.weight", limits.io_weight.to_string())?;
        if let Some(device) = device {
            for (way, bytes) in [("read", limits.io_read), ("write", limits.io_write)] {
                let file = format!("blkio.throttle.{way}_bps_device");
                optional(bytes > 0, set_if_there(&file, format!("{device} {bytes}")))?;
            }
        }
    }
    if hierarchy.has("pids") {
        set("pids.max", limits.pids.to_string())?;
    }
    Ok(())
}

/// A disk that cannot be limited matters to who asked for it only.
fn optional(asked: bool, result: io::Result<()>) -> io::Result<()> {
    if asked { result } else { Ok(()) }
}

/// The disk that a path is on, `8:0`; none for a file system without one.
fn device(path: &Path) -> Option<String> {
    let number = fs::metadata(path).ok()?.dev();
    let at = |number: &str| Path::new("/sys/dev/block").join(number);
    let own = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    if at(&own).join("partition").exists() {
        // Limits are those of whole disks.
        let disk = fs::read_to_string(at(&own).join("../dev")).ok()?;
        return Some(disk.trim().to_owned());
    }
    at(&own).exists().then_some(own)
}

/// Whether a text names cores: `0-3,6`.
pub fn is_cpuset(text: &str) -> bool {
    let number = |text: &str| text.parse::<u16>().ok().filter(|_| !text.starts_with('+'));
    let range = |part: &str| match part.split_once('-') {
        Some((from, to)) => number(from).zip(number(to)).is_some_and(|(from, to)| from <= to),
        None => number(part).is_some(),
    };
    text.len() <= 256 && text.split(',').all(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_numbers_and_ranges() {
        for good in ["0", "0-3", "0-3,6,8-9"] {
            assert!(is_cpuset(good), "{good}");
        }
        for bad in ["", "a", "3-1", "1,", "-1", "0-", "+1", "1 2"] {
            assert!(!is_cpuset(bad), "{bad}");
        }
    }
}
