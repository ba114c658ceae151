//! How far sinks have read, on the disk: one file per sink.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::window::Job;
use crate::files;
use crate::logs::segment::Position;

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    jobs: BTreeMap<String, Position>,
}

/// A sink's file.
#[derive(Clone, Debug)]
pub(super) struct Cursors(PathBuf);

impl Cursors {
    /// In this directory.
    pub(super) fn of(dir: &Path, sink: &str) -> Self {
        Self(dir.join(format!("{sink}.json")))
    }

    /// Reads it. What cannot be read counts as nothing: lines then come again, and none is missing.
    pub(super) fn read(&self) -> BTreeMap<Job, Position> {
        let stored: io::Result<Option<Stored>> = files::read_json(&self.0);
        match stored {
            Ok(Some(stored)) if stored.version == VERSION => {
                let jobs = stored.jobs.into_iter();
                return jobs.map(|(job, position)| (Job::from(job), position)).collect();
            }
            Ok(None) => {}
            Ok(Some(stored)) => {
                tracing::warn!(path = %self.0.display(), version = stored.version, "of another version: all is sent again");
            }
            Err(error) => tracing::warn!(%error, "all is sent again"),
        }
        BTreeMap::new()
    }

    /// Writes it.
    pub(super) fn write(&self, jobs: BTreeMap<Job, Position>) -> io::Result<()> {
        let stored = Stored {
            version: VERSION,
            jobs: jobs
                .into_iter()
                .map(|(job, position)| (job.to_string(), position))
                .collect(),
        };
        files::write_json(&self.0, &stored)
    }

    /// Forgets it.
    pub(super) fn remove(&self) -> io::Result<()> {
        files::remove_all(&self.0)
    }
}
