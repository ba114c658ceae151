//! How much a volume may hold, and how that changes.
//!
//! A change is written down before it begins. What a crash leaves undone of it is done when the volume is used next, or
//! by the daemon's start.

use std::fs::File;
use std::io;

use flynn_api::server::disk;
use flynn_api::volume::{MIN_LIMIT, ProviderKind, Volume};
use flynn_api::{Error, Result};
use rustix::fs::syncfs;

use super::found::{Found, find};
use super::pools::Pool;
use super::record::Form;
use super::{DATA, RESERVE, Users, Volumes, btrfs, image};
use crate::files::disk_error;

impl Volumes {
    /// Has a volume hold so many bytes from now on, whether jobs use it or not.
    pub fn resize(&self, id: &str, limit: u64, users: Users<'_>) -> Result<Volume> {
        let _lock = self.locks.lock(&[id]);
        let mut found = find(&self.pools(), id)?;
        found.resize(limit)?;
        Ok(Volume {
            used: found.used(),
            ..found.show(users)
        })
    }
}

impl Found {
    /// Has it hold so many bytes from now on.
    pub(super) fn resize(&mut self, limit: u64) -> Result<()> {
        self.is_no_snapshot()?;
        self.finish_resize()?;
        is_enough(limit)?;
        let has = self.record.limit;
        match self.record.form {
            _ if has == Some(limit) => return Ok(()),
            Form::Directory => return Err(self.has_no_limit()),
            Form::Image => self.grows(limit)?,
            Form::Subvolume | Form::Dataset => self.fits_into(limit)?,
        }
        let failed = |error| disk_error(&format!("resize the volume {}", self.id), &error);
        self.record.resizing = Some(limit);
        self.record.write(&self.dir).map_err(failed)?;
        match self.finish_resize() {
            // Nothing is done where there was no room: it is what it was.
            Err(error) if disk::is_full(&error) => {
                self.record.resizing = None;
                self.record.write(&self.dir).map_err(|error| {
                    disk_error(
                        &format!("note that the volume {} was not resized", self.id),
                        &error,
                    )
                })?;
                Err(error)
            }
            done => done,
        }
    }

    /// Gives a job's volume what its release asks for, if that is more than it has.
    pub(super) fn raise(&mut self, wanted: Option<u64>) -> Result<()> {
        if let Err(error) = self.finish_resize() {
            // As large as before or larger, it can be used.
            tracing::warn!(volume = self.id, %error, "its limit could not be changed");
        }
        match (wanted, self.record.limit) {
            (Some(wanted), Some(has)) if wanted > has => self.resize(wanted),
            (Some(wanted), None) if self.record.form != Form::Directory => match self.resize(wanted) {
                Err(error) if error.code == flynn_api::ErrorCode::Conflict => {
                    tracing::warn!(volume = self.id, %error, "it stays without a limit");
                    Ok(())
                }
                result => result,
            },
            (Some(wanted), has) if has != Some(wanted) => {
                tracing::info!(volume = self.id, wanted, ?has, "its limit stays as it is");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Does what is left to be done of a change.
    pub(super) fn finish_resize(&mut self) -> Result<()> {
        let Some(limit) = self.record.resizing else {
            return Ok(());
        };
        let resize = || -> io::Result<()> {
            match self.record.form {
                Form::Directory => Ok(()),
                Form::Image => image::grow(&self.dir, &self.mount_point(), limit),
                Form::Subvolume => btrfs::set_limit(&self.dir.join(DATA), Some(limit)),
                Form::Dataset => self.pool.zfs()?.set_limit(self.dataset()?, Some(limit)),
            }
        };
        let failed = |error| disk_error(&format!("resize the volume {}", self.id), &error);
        resize().map_err(failed)?;
        (self.record.limit, self.record.resizing) = (Some(limit), None);
        self.record.write(&self.dir).map_err(failed)
    }

    fn has_no_limit(&self) -> Error {
        Error::validation(format!(
            "volume {} is a plain directory, which can have no limit: make another one with a limit (flynn-host volume \
             create --limit SIZE), and copy what this one holds",
            self.id
        ))
    }

    fn grows(&self, limit: u64) -> Result<()> {
        let has = self.record.limit.unwrap_or(0);
        if limit < has {
            return Err(Error::validation(format!(
                "volume {} is an ext4 in a file of {} MiB, which can only be made larger: make a smaller one \
                 (flynn-host volume create --limit SIZE), and copy what this one holds",
                self.id,
                has >> 20
            )));
        }
        has_room(&self.pool, limit - has)
    }

    fn fits_into(&self, limit: u64) -> Result<()> {
        // A btrfs counts what was removed when it writes out what it has, else up to half a minute later.
        if self.record.form == Form::Subvolume {
            let _ = File::open(&self.dir).map(|dir| syncfs(&dir));
        }
        match self.used() {
            Some(used) if used > limit => Err(Error::conflict(format!(
                "volume {} holds {} MiB, more than it is to hold at most: remove some of that first",
                self.id,
                used >> 20
            ))),
            _ => Ok(()),
        }
    }
}

fn is_enough(limit: u64) -> Result<()> {
    if limit >= MIN_LIMIT {
        return Ok(());
    }
    let least = format!("a volume holds at least {} MiB", MIN_LIMIT >> 20);
    Err(Error::invalid_field("limit", least))
}

/// Whether a provider can make a volume with this limit.
pub(super) fn check_limit(pool: &Pool, limit: u64) -> Result<()> {
    is_enough(limit)?;
    match pool.kind {
        ProviderKind::Dir => has_room(pool, limit),
        ProviderKind::Btrfs | ProviderKind::Zfs => Ok(()),
    }
}

/// Whether a provider has so much room to give away at once.
fn has_room(pool: &Pool, bytes: u64) -> Result<()> {
    let (free, _) = disk::space(&pool.path).map_err(|error| disk_error("look at the disk", &error))?;
    if free >= bytes.saturating_add(RESERVE) {
        return Ok(());
    }
    Err(disk::full(format!(
        "a volume's {} MiB do not fit on the disk of {} ({} MiB left)",
        bytes >> 20,
        pool.path.display(),
        free >> 20
    )))
}
