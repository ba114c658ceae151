//! Which jobs there are, and which have logged something.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, ReadFlags, WatchFlags};

use super::window::Job;
use crate::sys::{Polled, polled};

/// What is said of the directory of all jobs.
const OF_JOBS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO);

/// Watches the directories of all jobs.
#[derive(Debug)]
pub(super) struct Watch {
    fd: Polled,
    jobs: PathBuf,
    logs: HashMap<i32, Job>,
}

/// What has happened.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Jobs have come or gone.
    pub(super) jobs: bool,
    /// More has happened than can be told.
    pub(super) lost: bool,
    /// These have logged something.
    pub(super) logs: Vec<Job>,
}

impl Watch {
    /// Watches the jobs in this directory. Needs a runtime with I/O.
    pub(super) fn new(jobs: &Path) -> io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&fd, jobs, OF_JOBS)?;
        Ok(Self {
            fd: polled(fd)?,
            jobs: jobs.to_owned(),
            logs: HashMap::new(),
        })
    }

    /// The ids of the jobs that there are.
    pub(super) fn ids(&self) -> io::Result<Vec<Job>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.jobs)? {
            let name = entry?.file_name();
            // Others are not jobs, or not yet.
            ids.extend(name.to_str().filter(|name| !name.starts_with('.')).map(Job::from));
        }
        Ok(ids)
    }

    /// Watches a job's log.
    pub(super) fn add(&mut self, job: &Job, log: &Path) -> io::Result<()> {
        let watch = inotify::add_watch(self.fd.get_ref(), log, WatchFlags::MODIFY | WatchFlags::CREATE)?;
        self.logs.insert(watch, Job::clone(job));
        Ok(())
    }

    /// Waits until something happens.
    pub(super) async fn changes(&mut self) -> io::Result<Changes> {
        let mut guard = self.fd.readable().await?;
        let mut room = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(self.fd.get_ref(), &mut room);
        let mut changes = Changes::default();
        loop {
            match reader.next() {
                Ok(event) if event.events().contains(ReadFlags::IGNORED) => {
                    self.logs.remove(&event.wd());
                }
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => changes.lost = true,
                Ok(event) => match self.logs.get(&event.wd()) {
                    Some(job) => {
                        if changes.logs.last() != Some(job) {
                            changes.logs.push(Job::clone(job));
                        }
                    }
                    None => changes.jobs = true,
                },
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
            if changes.logs.len() > 4096 {
                return Ok(changes);
            }
        }
        guard.clear_ready();
        Ok(changes)
    }
}
