//! What a job has used, as each kind of hierarchy counts it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::{Group, Hierarchy};

/// What a job uses now and has used so far. None where no hierarchy counts it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Time on cores.
    pub cpu: Option<Duration>,
    /// Time that it was kept from cores by its quota.
    pub throttled: Option<Duration>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// The most that it has been.
    pub memory_peak: Option<u64>,
    /// Processes that were killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Time that processes waited for memory.
    pub memory_waits: Option<Duration>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Bytes read from disks.
    pub io_read: Option<u64>,
    /// Bytes written to disks.
    pub io_written: Option<u64>,
}

impl Group {
    /// What the job uses and has used.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for (hierarchy, dir) in &self.dirs {
            let found = if hierarchy.is_v2() {
                v2(dir)
            } else {
                v1(hierarchy, dir)
            };
            usage.fill(&found);
        }
        usage
    }
}

impl Usage {
    /// Takes over what is not known yet.
    fn fill(&mut self, other: &Self) {
        fn fill<T: Copy>(known: &mut Option<T>, other: Option<T>) {
            if known.is_none() {
                *known = other;
            }
        }
        fill(&mut self.cpu, other.cpu);
        fill(&mut self.throttled, other.throttled);
        fill(&mut self.memory, other.memory);
        fill(&mut self.memory_peak, other.memory_peak);
        fill(&mut self.oom_kills, other.oom_kills);
        fill(&mut self.memory_waits, other.memory_waits);
        fill(&mut self.pids, other.pids);
        fill(&mut self.io_read, other.io_read);
        fill(&mut self.io_written, other.io_written);
    }
}

fn v2(dir: &Path) -> Usage {
    let cpu = read(dir, "cpu.stat");
    let io = read(dir, "io.stat");
    let bytes = |name: &str| Some(sum(io.as_deref()?, name));
    Usage {
        cpu: value(cpu.as_deref(), "usage_usec ").map(Duration::from_micros),
        throttled: value(cpu.as_deref(), "throttled_usec ").map(Duration::from_micros),
        memory: number(dir, "memory.current"),
        memory_peak: number(dir, "memory.peak"),
        oom_kills: value(read(dir, "memory.events").as_deref(), "oom_kill "),
        memory_waits: read(dir, "memory.pressure").and_then(|text| waits(&text)),
        pids: number(dir, "pids.current"),
        io_read: bytes("rbytes="),
        io_written: bytes("wbytes="),
    }
}

fn v1(hierarchy: &Hierarchy, dir: &Path) -> Usage {
    let mut usage = Usage::default();
    if hierarchy.has("cpuacct") {
        usage.cpu = number(dir, "cpuacct.usage").map(Duration::from_nanos);
    }
    if hierarchy.has("cpu") {
        let stat = read(dir, "cpu.stat");
        usage.throttled = value(stat.as_deref(), "throttled_time ").map(Duration::from_nanos);
    }
    if hierarchy.has("memory") {
        usage.memory = number(dir, "memory.usage_in_bytes");
        usage.memory_peak = number(dir, "memory.max_usage_in_bytes");
        usage.oom_kills = value(read(dir, "memory.oom_control").as_deref(), "oom_kill ");
    }
    if hierarchy.has("pids") {
        usage.pids = number(dir, "pids.current");
    }
    if hierarchy.has("blkio") {
        let io = read(dir, "blkio.throttle.io_service_bytes_recursive");
        let bytes = |way: &str| {
            let lines = io.as_deref()?.lines();
            let counts = lines.filter_map(|line| line.split_once(way)?.1.trim().parse::<u64>().ok());
            Some(counts.sum())
        };
        usage.io_read = bytes(" Read ");
        usage.io_written = bytes(" Write ");
    }
    usage
}

fn read(dir: &Path, file: &str) -> Option<String> {
    fs::read_to_string(dir.join(file)).ok()
}

fn number(dir: &Path, file: &str) -> Option<u64> {
    read(dir, file)?.trim().parse().ok()
}

/// The number behind a name at the start of a line.
fn value(text: Option<&str>, name: &str) -> Option<u64> {
    text?
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// The sum of the numbers behind a name, over all lines.
fn sum(text: &str, name: &str) -> u64 {
    let words = text.split_whitespace().filter_map(|word| word.strip_prefix(name));
    words.filter_map(|number| number.parse::<u64>().ok()).sum()
}

/// How long some process has waited, by a pressure file.
fn waits(text: &str) -> Option<Duration> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    let total = some.split(' ').find_map(|word| word.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v2_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1\nnr_throttled 2\nthrottled_usec 70\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.peak", "8192\n"),
            ("memory.events", "low 0\noom 2\noom_kill 1\noom_group_kill 0\n"),
            (
                "memory.pressure",
                "some avg10=0.00 avg60=0.00 avg300=0.00 total=33\nfull avg10=0.00 total=7\n",
            ),
            ("pids.current", "3\n"),
            (
                "io.stat",
                "8:0 rbytes=10 wbytes=20 rios=1\n254:0 rbytes=5 wbytes=0 rios=1\n",
            ),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let wanted = Usage {
            cpu: Some(Duration::from_micros(1500)),
            throttled: Some(Duration::from_micros(70)),
            memory: Some(4096),
            memory_peak: Some(8192),
            oom_kills: Some(1),
            memory_waits: Some(Duration::from_micros(33)),
            pids: Some(3),
            io_read: Some(15),
            io_written: Some(20),
        };
        assert_eq!(v2(dir.path()), wanted);
    }

    #[test]
    fn what_is_missing_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(v2(dir.path()), Usage::default());
    }
}
