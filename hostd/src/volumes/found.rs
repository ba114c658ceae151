//! A volume that is there, and how it is found.

use std::io;
use std::path::PathBuf;

use flynn_api::volume::{Volume, VolumeType};
use flynn_api::{Error, ErrorCode, Result};
use uuid::Uuid;

use super::pools::{Pool, Pools};
use super::record::{Form, Record, is_volume_id};
use super::{DATA, Users, btrfs, image};
use crate::files::disk_error;
use crate::paths::Paths;

/// A volume that is there.
pub(super) struct Found {
    pub(super) id: String,
    pub(super) pool: Pool,
    pub(super) dir: PathBuf,
    pub(super) record: Record,
}

impl Found {
    /// Where it is mounted, if it has to be.
    pub(super) fn mount_point(&self) -> PathBuf {
        Paths::volume_mount(&self.pool.id, &self.id)
    }

    /// The directory of its data, mounted where it has to be.
    pub(super) fn open(&self) -> Result<PathBuf> {
        let opened = match self.record.form {
            Form::Directory | Form::Subvolume => return Ok(self.dir.join(DATA)),
            Form::Image => image::open(&self.dir, &self.mount_point()),
            Form::Dataset => self.dataset().and_then(|name| self.pool.zfs()?.open(name)),
        };
        opened.map_err(|error| disk_error(&format!("mount the volume {}", self.id), &error))
    }

    pub(super) fn close(&self) -> io::Result<()> {
        match self.record.form {
            Form::Image => image::close(&self.mount_point()),
            _ => Ok(()),
        }
    }

    pub(super) fn show(&self, users: Users<'_>) -> Volume {
        let record = self.record.clone();
        Volume {
            id: self.id.clone(),
            kind: record.kind,
            meta: record.meta,
            provider: self.pool.id.clone(),
            limit: record.limit,
            used: None,
            source: record.source,
            created_at: record.created_at,
            decommissioned_at: record.decommissioned_at,
            jobs: users(&self.id),
        }
    }

    /// How many bytes it holds, where that is known without reading all of it.
    pub(super) fn used(&self) -> Option<u64> {
        match self.record.form {
            Form::Directory => None,
            Form::Image => image::used(&self.mount_point()).ok().flatten(),
            Form::Subvolume => btrfs::used(&self.dir.join(DATA)),
            Form::Dataset => self.pool.zfs().ok()?.used(self.dataset().ok()?),
        }
    }

    pub(super) fn unused(&self, users: Users<'_>) -> Result<()> {
        match users(&self.id).first() {
            None => Ok(()),
            Some(job) => Err(Error::conflict(format!(
                "volume {} is used by job {job}: stop it first",
                self.id
            ))),
        }
    }

    /// Refuses to change what never changes.
    pub(super) fn is_no_snapshot(&self) -> Result<()> {
        match self.record.kind {
            VolumeType::Data => Ok(()),
            VolumeType::Snapshot => Err(Error::validation(format!(
                "{} is a snapshot, which never changes",
                self.id
            ))),
        }
    }

    /// Only some filesystems can do this.
    pub(super) fn makes_snapshots(&self) -> Result<()> {
        if matches!(self.record.form, Form::Subvolume | Form::Dataset) {
            return Ok(());
        }
        Err(Error::validation(format!(
            "volume {} is of the provider {}, which makes no snapshots: volumes of a provider on btrfs or ZFS have them \
             (flynn-host volume add-provider ID PATH --kind btrfs|zfs)",
            self.id, self.pool.id
        )))
    }

    /// Its dataset, or its snapshot of one.
    pub(super) fn dataset(&self) -> io::Result<&str> {
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "its record names no dataset");
        self.record.dataset.as_deref().ok_or_else(missing)
    }

    /// Gives back what it holds beyond its snapshots, once it is no volume any more.
    pub(super) fn give_back(&self) {
        if let (Ok(zfs), Ok(name)) = (self.pool.zfs(), self.dataset())
            && !name.contains('@')
        {
            zfs.give_back(name);
        }
    }
}

/// All volumes that can be read.
pub(super) fn all(pools: &Pools) -> impl Iterator<Item = Result<Found>> {
    let there = pools.iter().filter(|pool| pool.check().is_ok());
    there.flat_map(|pool| {
        let (names, failed) = match pool.names(false) {
            Ok(names) => (names, None),
            Err(error) => {
                let what = format!("list the volumes of the provider {}", pool.id);
                (Vec::new(), Some(Err(disk_error(&what, &error))))
            }
        };
        let read = |id: String| {
            let dir = pool.path.join(&id);
            let record = Record::read(&dir).ok().flatten()?;
            Some(Ok(Found {
                id,
                pool: pool.clone(),
                dir,
                record,
            }))
        };
        names
            .into_iter()
            .filter_map(read)
            .chain(failed)
            .collect::<Vec<_>>()
    })
}

/// A volume, or that there is none.
pub(super) fn find(pools: &Pools, id: &str) -> Result<Found> {
    look(pools, id)?.ok_or_else(|| Error::not_found("volume", id))
}

/// A volume, or that there is surely none.
pub(super) fn look(pools: &Pools, id: &str) -> Result<Option<Found>> {
    if !is_volume_id(id) {
        return Ok(None);
    }
    let mut missing = Ok(None);
    for pool in pools.iter() {
        if let Err(why) = pool.check() {
            missing = Err(why);
            continue;
        }
        let dir = pool.path.join(id);
        let broken = |why: &dyn std::fmt::Display| {
            Err(Error::internal(format!(
                "the record of volume {id} in {} cannot be read ({why}): look at it, then repair it or move the \
                 directory away",
                dir.display()
            )))
        };
        let read = match Record::read(&dir) {
            Ok(None) if !dir.exists() => continue,
            // It may have been made this moment.
            Ok(None) => Record::read(&dir),
            read => read,
        };
        match read {
            Ok(None) => return broken(&"it is not there"),
            Err(error) => return broken(&error),
            Ok(Some(record)) => {
                return Ok(Some(Found {
                    id: id.to_owned(),
                    pool: pool.clone(),
                    dir,
                    record,
                }));
            }
        }
    }
    missing
}

/// The id that is wanted for something new, or one that is made up.
pub(super) fn new_id(id: Option<String>) -> Result<String> {
    let id = id.unwrap_or_else(|| Uuid::new_v4().to_string());
    if is_volume_id(&id) {
        return Ok(id);
    }
    let rule = "1 to 100 letters, digits, dashes, underscores and dots, no dot in front";
    Err(Error::invalid_field("id", rule))
}

/// Refuses an id that a volume has.
pub(super) fn is_free(pools: &Pools, id: &str) -> Result<()> {
    match look(pools, id)? {
        None => Ok(()),
        Some(_) => Err(Error::new(
            ErrorCode::ObjectExists,
            format!("there is a volume {id}: choose another id"),
        )),
    }
}
