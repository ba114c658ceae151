//! A job's cgroups, in every hierarchy that is there: v1, v2, or both side by side.
//!
//! Each job gets the group `flynn/<partition>/<job id>` below the daemon's own place in each hierarchy (a systemd unit
//! at the end of that place is left out, so that the unit's end is not the jobs' end). A v2 group is made even where v2
//! has no controllers: it is what programs are attached to and what `cgroup.kill` works on.
//!
//! This is not done with a library: the ones there are choose v1 or v2 for the whole machine, and a hybrid machine has
//! its limits in the one and its kill switch in the other.

mod hierarchy;
mod limits;
mod usage;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flynn_api::host::Partition;
use flynn_dataplane::{Device, allow_devices};

pub use hierarchy::{Hierarchies, Hierarchy};
pub use limits::{Limits, is_cpuset};
pub use usage::Usage;

/// The group below which the supervisors themselves live.
const SUPERVISORS: &str = "flynn/supervisor";

/// The devices that jobs may use, by their numbers: those in a container's `/dev`, and terminals.
const DEVICES: [(u32, Option<u32>); 8] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(2)),
    (136, None),
];

/// How long processes may take to stand still: one that waits for a disk does not before it is served.
const FREEZING: Duration = Duration::from_secs(1);

const PARTITIONS: [Partition; 3] = [Partition::System, Partition::Background, Partition::User];

/// The name of a partition's group.
pub fn partition_name(partition: Partition) -> &'static str {
    match partition {
        Partition::System => "system",
        Partition::Background => "background",
        Partition::User => "user",
    }
}

/// CPU weight of a partition on v2's scale (100 is usual); builds yield to apps, apps to the platform.
fn weight(partition: Partition) -> u64 {
    match partition {
        Partition::System => 400,
        Partition::Background => 50,
        Partition::User => 100,
    }
}

/// The groups of one job.
#[derive(Clone, Debug)]
pub struct Group {
    dirs: Vec<(Hierarchy, PathBuf)>,
}

impl Group {
    /// Makes the groups of a job, with its limits; `disk` is on the disk whose bandwidth is limited.
    pub fn create(
        all: &Hierarchies,
        partition: Partition,
        id: &str,
        limits: &Limits,
        disk: &Path,
    ) -> io::Result<Self> {
        let group = Self::of(all, partition, id);
        for (hierarchy, dir) in &group.dirs {
            create_path(hierarchy, dir)?;
            if let Some(partition_dir) = dir.parent() {
                set_weight(hierarchy, partition_dir, weight(partition));
            }
            limits::apply(hierarchy, dir, limits, disk)?;
        }
        Ok(group)
    }

    /// The groups of a job, whether they are there or not.
    pub fn of(all: &Hierarchies, partition: Partition, id: &str) -> Self {
        let name = format!("flynn/{}/{id}", partition_name(partition));
        Self {
            dirs: all
                .iter()
                .map(|hierarchy| (hierarchy.clone(), hierarchy.base.join(&name)))
                .collect(),
        }
    }

    /// The group's directory where there is v2 alone: processes can be born in it. Whoever is moved into it waits until the
    /// kernel has seen all CPUs do something else.
    pub fn cradle(&self) -> Option<&Path> {
        match self.dirs.as_slice() {
            [(hierarchy, dir)] if hierarchy.is_v2() => Some(dir),
            _ => None,
        }
    }

    /// Puts a process into all of them.
    pub fn add(&self, pid: i32) -> io::Result<()> {
        self.dirs
            .iter()
            .try_for_each(|(_, dir)| write(&dir.join("cgroup.procs"), &pid.to_string()))
    }

    /// How many processes have been killed for want of memory so far.
    pub fn oom_kills(&self) -> u64 {
        let count = |file: PathBuf| {
            let text = fs::read_to_string(file).ok()?;
            text.lines()
                .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
        };
        self.dirs
            .iter()
            .filter_map(|(hierarchy, dir)| match hierarchy.is_v2() {
                true => count(dir.join("memory.events")),
                false if hierarchy.has("memory") => count(dir.join("memory.oom_control")),
                false => None,
            })
            .max()
            .unwrap_or(0)
    }

    /// Has every process in the groups stand still, or go on; waits until they do.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let v2 = self.dirs.iter().find(|(hierarchy, _)| hierarchy.is_v2());
        let v2 = v2
            .map(|(_, dir)| dir)
            .filter(|dir| dir.join("cgroup.freeze").exists());
        let v1 = self.dirs.iter().find(|(hierarchy, _)| hierarchy.has("freezer"));
        let deadline = Instant::now() + FREEZING;
        let is_done: Box<dyn Fn() -> io::Result<bool>> = if let Some(dir) = v2 {
            write(&dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
            let wanted = if frozen { "frozen 1" } else { "frozen 0" };
            let events = dir.join("cgroup.events");
            Box::new(move || Ok(fs::read_to_string(&events)?.lines().any(|line| line == wanted)))
        } else if let Some((_, dir)) = v1 {
            let wanted = if frozen { "FROZEN" } else { "THAWED" };
            let state = dir.join("freezer.state");
            write(&state, wanted)?;
            Box::new(move || Ok(fs::read_to_string(&state)?.trim() == wanted))
        } else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this host has no cgroup that can have processes stand still",
            ));
        };
        while !is_done()? {
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Kills every process in the groups, those that fork while it happens included.
    pub fn kill(&self) -> io::Result<()> {
        let v2 = self
            .dirs
            .iter()
            .find(|(hierarchy, dir)| hierarchy.is_v2() && dir.join("cgroup.kill").exists());
        if let Some((_, dir)) = v2 {
            return write(&dir.join("cgroup.kill"), "1");
        }
        // Older kernels: what is frozen cannot fork.
        let freezer = self.dirs.iter().find(|(hierarchy, _)| hierarchy.has("freezer"));
        if let Some((_, dir)) = freezer {
            let _ = write(&dir.join("freezer.state"), "FROZEN");
        }
        for _ in 0..100 {
            let pids = self.pids();
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                let _ = crate::sys::kill(pid, libc::SIGKILL);
            }
            if let Some((_, dir)) = freezer {
                let _ = write(&dir.join("freezer.state"), "THAWED");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The processes in the groups.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids: Vec<i32> = self
            .dirs
            .iter()
            .filter_map(|(_, dir)| fs::read_to_string(dir.join("cgroup.procs")).ok())
            .flat_map(|text| {
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .collect::<Vec<_>>()
            })
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Removes the groups. The kernel needs a moment after the last process is gone; `patience` bounds the wait.
    pub fn remove(&self, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        let mut result = Ok(());
        for (_, dir) in &self.dirs {
            loop {
                match fs::remove_dir(dir) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        result = Err(describe(dir, &error));
                        break;
                    }
                    _ => break,
                }
            }
        }
        result
    }

    /// The v2 group, to which programs are attached.
    pub fn v2_path(&self) -> Option<&Path> {
        self.dirs
            .iter()
            .find(|(hierarchy, _)| hierarchy.is_v2())
            .map(|(_, dir)| dir.as_path())
    }
}

/// The v2 group that the groups of all jobs are in, to which programs for all of them are attached.
pub fn jobs_v2(all: &Hierarchies) -> Option<PathBuf> {
    let v2 = all.iter().find(|hierarchy| hierarchy.is_v2())?;
    Some(v2.base.join("flynn"))
}

/// Whether jobs may use the device that this is of.
pub fn allows_device(file: &fs::Metadata) -> bool {
    let (major, minor) = (rustix::fs::major(file.rdev()), rustix::fs::minor(file.rdev()));
    let listed =
        |(known, number): &(u32, Option<u32>)| *known == major && number.is_none_or(|number| number == minor);
    file.file_type().is_char_device() && DEVICES.iter().any(listed)
}

/// Makes the group that all others are in, and limits the devices of jobs. Done by the daemon, before there are supervisors,
/// which make disks for jobs.
pub fn prepare(all: &Hierarchies) -> io::Result<()> {
    all.iter()
        .try_for_each(|hierarchy| create_path(hierarchy, &hierarchy.base.join("flynn")))?;
    // The second wall: a container cannot make devices, unless a job of the platform asks for that.
    let devices = DEVICES.map(|(major, minor)| Device { major, minor });
    let v2 = all.iter().find(|hierarchy| hierarchy.is_v2());
    for (hierarchy, partition) in v2.into_iter().flat_map(|v2| PARTITIONS.map(|one| (v2, one))) {
        let dir = hierarchy.base.join("flynn").join(partition_name(partition));
        create_path(hierarchy, &dir)?;
        if let Err(error) = allow_devices(&dir, &devices) {
            tracing::warn!(%error, dir = %dir.display(), "which devices jobs may use is not limited");
        }
    }
    Ok(())
}

/// Has the kernel get ready to move processes between v1's groups, which takes it some milliseconds unless it has done so
/// just before: by a move of this process to where it is. To be called when somebody else is about to be moved.
pub fn warm_up(all: &Hierarchies) {
    let v1 = all.iter().find(|hierarchy| !hierarchy.is_v2());
    if let Some(own) = v1.and_then(Hierarchy::own) {
        let _ = write(&own.join("cgroup.procs"), &std::process::id().to_string());
    }
}

/// Moves this process, a supervisor, out of the daemon's groups: what is done to the daemon's unit is not done to it.
pub fn enter_supervisors_group(all: &Hierarchies) -> io::Result<()> {
    let pid = std::process::id().to_string();
    all.iter().try_for_each(|hierarchy| {
        let dir = hierarchy.base.join(SUPERVISORS);
        create_path(hierarchy, &dir)?;
        write(&dir.join("cgroup.procs"), &pid)
    })
}

/// Makes `dir` and the groups between it and the hierarchy's base, each with what v1's cpusets and v2's controllers
/// want from a parent.
fn create_path(hierarchy: &Hierarchy, dir: &Path) -> io::Result<()> {
    let parent = dir.parent().filter(|parent| parent.starts_with(&hierarchy.base));
    // The base is there.
    let Some(parent) = parent else { return Ok(()) };
    // A parent that is there may not be ready yet: another one makes it at this moment, or died over it.
    if hierarchy.is_v2() || hierarchy.has("cpuset") {
        create_path(hierarchy, parent)?;
    }
    if hierarchy.is_v2() {
        enable_controllers(hierarchy, parent);
    }
    let made = match fs::create_dir(dir) {
        // The first of its partition.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create_path(hierarchy, parent)?;
            fs::create_dir(dir)
        }
        made => made,
    };
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(describe(dir, &error)),
        _ => {}
    }
    if hierarchy.has("cpuset") {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if fs::read_to_string(dir.join(file)).is_ok_and(|own| own.trim().is_empty()) {
                write(&dir.join(file), fs::read_to_string(parent.join(file))?.trim())?;
            }
        }
    }
    Ok(())
}

/// Hands the controllers that limits need down to the children of a v2 group. A group that has processes of its own
/// cannot do that: then those, the daemon's own, move to a leaf.
fn enable_controllers(hierarchy: &Hierarchy, dir: &Path) {
    let file = dir.join("cgroup.subtree_control");
    let listed = |file: &Path| fs::read_to_string(file).unwrap_or_default();
    let (available, enabled) = (listed(&dir.join("cgroup.controllers")), listed(&file));
    let has = |list: &str, wanted: &str| list.split_whitespace().any(|name| name == wanted);
    let wanted: Vec<String> = ["cpu", "cpuset", "io", "memory", "pids"]
        .into_iter()
        .filter(|controller| has(&available, controller) && !has(&enabled, controller))
        .map(|controller| format!("+{controller}"))
        .collect();
    if wanted.is_empty() {
        return;
    }
    // At once: with processes of its own a group can hand some of them down alone, but is the root of a threaded subtree
    // from then on, in which there are no others.
    let enable = || write(&file, &wanted.join(" "));
    if enable().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) && dir == hierarchy.base {
        let leaf = dir.join(hierarchy::DAEMON_LEAF);
        let _ = fs::create_dir(&leaf);
        let there = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in there.lines() {
            let _ = write(&leaf.join("cgroup.procs"), pid);
        }
        let _ = enable();
    }
}

fn set_weight(hierarchy: &Hierarchy, dir: &Path, weight: u64) {
    if hierarchy.is_v2() {
        let _ = write(&dir.join("cpu.weight"), &weight.to_string());
    } else if hierarchy.has("cpu") {
        let _ = write(&dir.join("cpu.shares"), &(weight * 1024 / 100).to_string());
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::write(path, value).map_err(|error| describe(path, &error))
}

/// Keeps the OS error, which callers look at, unless there is none; the path goes into the log.
fn describe(path: &Path, error: &io::Error) -> io::Error {
    tracing::debug!(path = %path.display(), %error, "cgroup");
    error.raw_os_error().map_or_else(
        || io::Error::new(error.kind(), format!("{}: {error}", path.display())),
        io::Error::from_raw_os_error,
    )
}
