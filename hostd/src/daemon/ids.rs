//! The host's user and group ids that containers have as theirs: a range for each job in a user namespace of its own.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use flynn_api::host::{KernelFeature, UserNamespace};
use flynn_api::{Error, ErrorCode, Result};
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;
use tokio::time::timeout;

use super::exe::Executable;
use crate::container::{self, IDS};
use crate::launch::Launch;

/// What ranges are made of. Nobody else has these ids: below are those that systemd gives to machines, and far below
/// those of `/etc/subuid`; above is one range of systemd's again.
const ALL: Range<u32> = 0x7000_0000..0x7ffe_0000;

/// What says which ids users of the host may give away.
const GIVEN_AWAY: [&str; 2] = ["/etc/subuid", "/etc/subgid"];

/// How long it may take to find out what the kernel can do.
const PROBE: Duration = Duration::from_secs(10);

/// The ids of this host's containers.
#[derive(Debug)]
pub(super) struct Ids {
    /// A user namespace to try things with, or why there are none.
    probed: std::result::Result<OwnedFd, String>,
    ranges: Mutex<Ranges>,
}

impl Ids {
    /// Finds out what this host can do.
    pub(super) async fn probe(executable: &Executable) -> Self {
        let mut taken = Vec::new();
        for path in GIVEN_AWAY {
            taken.extend(given_away(&fs::read_to_string(path).unwrap_or_default()));
        }
        let probed = async {
            let mut child = executable.probe_user_namespace(ALL.start)?;
            let probed = timeout(PROBE, ask(&mut child)).await;
            let _ = child.kill().await;
            probed.map_err(io::Error::from)?
        };
        let probed = probed.await.unwrap_or_else(|error| Err(error.to_string()));
        if let Err(why) = &probed {
            tracing::warn!(why, "jobs have no user namespaces");
        }
        Self {
            probed,
            ranges: Mutex::new(Ranges::without(&taken)),
        }
    }

    /// What this comes to, for the host's status.
    pub(super) fn feature(&self) -> KernelFeature {
        KernelFeature {
            name: "user_namespaces".into(),
            present: self.probed.is_ok(),
            detail: match &self.probed {
                Ok(_) => "root in a container is nobody on the host".into(),
                Err(why) => format!("root in a container is root on the host: {why}"),
            },
        }
    }

    /// What the operator misses.
    pub(super) fn notice(&self) -> Option<String> {
        let why = self.probed.as_ref().err()?;
        Some(format!(
            "jobs have no user namespaces, and root in a container is root on the host: {why}"
        ))
    }

    /// The user namespace of a job: one of its own, unless what it is made of does not let it.
    pub(super) fn give(&self, launch: &Launch) -> Result<UserNamespace> {
        let namespace = match &self.probed {
            Ok(namespace) => namespace,
            Err(why) => return Ok(UserNamespace::Without(why.clone())),
        };
        for bind in launch.binds.iter().filter(|bind| bind.ids_of_container) {
            if let Err(error) = container::mapped_tree(namespace.as_fd(), &bind.source) {
                return Ok(UserNamespace::Without(format!(
                    "the filesystem of the volume at {} cannot map ids ({error})",
                    bind.target.display()
                )));
            }
        }
        let first = self.ranges().acquire(&launch.job_id);
        first.map(UserNamespace::FirstId).ok_or_else(|| {
            Error::new(
                ErrorCode::LimitExceeded,
                "all of this host's ranges of user ids are taken: stop a job, or start this one on another host",
            )
        })
    }

    /// Notes that a job of an earlier daemon has its range.
    pub(super) fn adopt(&self, launch: &Launch) {
        if let Some(first) = launch.first_id() {
            let before = self.ranges().taken.insert(first, launch.job_id.clone());
            if let Some(other) = before.filter(|other| *other != launch.job_id) {
                tracing::error!(
                    first,
                    job = launch.job_id,
                    other,
                    "two jobs have one range of user ids"
                );
            }
        }
    }

    /// Notes that a job is over.
    pub(super) fn release(&self, job: &str) {
        self.ranges().taken.retain(|_, owner| owner != job);
    }

    fn ranges(&self) -> std::sync::MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes what the probing process has found: a namespace, or why there is none.
async fn ask(child: &mut Child) -> io::Result<std::result::Result<OwnedFd, String>> {
    let (Some(pid), Some(output)) = (child.id(), child.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let mut word = String::new();
    BufReader::new(output).read_line(&mut word).await?;
    let word = word.trim();
    let Ok(descriptor) = word.parse::<u32>() else {
        let why = if word.is_empty() {
            "it could not be tried"
        } else {
            word
        };
        return Ok(Err(why.into()));
    };
    let path = format!("/proc/{pid}/fd/{descriptor}");
    Ok(Ok(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?))
}

/// Which ranges there are, and whose.
#[derive(Debug)]
struct Ranges {
    /// The first ids of those that nobody else has a claim to.
    usable: Vec<u32>,
    /// The jobs that have one, by its first id.
    taken: BTreeMap<u32, String>,
    /// From where the next is looked for: one that was free for long is better than one just left.
    next: usize,
}

impl Ranges {
    fn without(others: &[Range<u64>]) -> Self {
        let step = IDS as usize;
        let is_free = |first: &u32| {
            let own = u64::from(*first)..u64::from(*first) + u64::from(IDS);
            others
                .iter()
                .all(|other| other.end <= own.start || other.start >= own.end)
        };
        Self {
            usable: ALL.step_by(step).filter(is_free).collect(),
            taken: BTreeMap::new(),
            next: 0,
        }
    }

    /// The job's range, or a free one that is its from now on. None when there is none.
    fn acquire(&mut self, job: &str) -> Option<u32> {
        if let Some((first, _)) = self.taken.iter().find(|(_, owner)| *owner == job) {
            return Some(*first);
        }
        let count = self.usable.len();
        let at = (0..count)
            .map(|offset| (self.next + offset) % count)
            .find(|at| !self.taken.contains_key(&self.usable[*at]))?;
        self.next = at + 1;
        let first = self.usable[at];
        self.taken.insert(first, job.to_owned());
        Some(first)
    }
}

/// The ranges in a file such as `/etc/subuid`: lines of `user:first:count`.
fn given_away(text: &str) -> Vec<Range<u64>> {
    let line = |line: &str| -> Option<Range<u64>> {
        let mut fields = line.split(':').skip(1);
        let first: u64 = fields.next()?.trim().parse().ok()?;
        let count: u64 = fields.next()?.trim().parse().ok()?;
        Some(first..first.saturating_add(count))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_one_jobs_at_a_time() {
        let mut ranges = Ranges::without(&[]);
        assert_eq!(ranges.usable.len(), 4094);
        let one = ranges.acquire("one").unwrap();
        assert_eq!((one, ranges.acquire("one")), (ALL.start, Some(one)));
        let two = ranges.acquire("two").unwrap();
        assert_eq!(two, one + IDS);
        // What was just left comes last.
        ranges.taken.remove(&one);
        assert_eq!(ranges.acquire("three"), Some(two + IDS));
        for job in 0..4092 {
            assert!(ranges.acquire(&format!("job {job}")).is_some());
        }
        assert_eq!(ranges.taken.len(), 4094);
        assert_eq!(ranges.acquire("more"), None);
        ranges.taken.remove(&two);
        assert_eq!(ranges.acquire("more"), Some(two));
    }

    #[test]
    fn what_others_give_away_is_left_to_them() {
        let text = "# none\nuser:100000:65536\nbroken\nother:1879048200:1\nthird:1879113727:2\n";
        let ranges = Ranges::without(&given_away(text));
        // Of the first range its ninth id, of the second its first.
        assert_eq!(ranges.usable[0], ALL.start + 2 * IDS);
        assert_eq!(ranges.usable.len(), 4092);
        let none = Ranges::without(&given_away("all:0:4294967295")).acquire("one");
        assert_eq!(none, None);
    }
}
