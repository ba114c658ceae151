//! Volumes: data of this host that outlive jobs.
//!
//! A **provider** ([`pools`]) is a directory. Each of its volumes is a directory there, named by its id, with a record
//! ([`record`]) and the data in one of four forms: a plain directory, an ext4 in a file ([`image`]), a subvolume of a
//! btrfs ([`btrfs`]) or a dataset of a ZFS ([`zfs`]). Only the last two make snapshots ([`snapshots`]).
//!
//! Invariants:
//! - A volume is there whole or not at all. It is made under another name and renamed last, and renamed first when it
//!   goes: a crash leaves what [`Volumes::sweep`] removes, and nothing that is taken for a volume.
//! - A volume that cannot be had (its provider's disk is missing, its record broken) is an error. It is never made anew
//!   in the place of the one that is lost from sight.
//! - A snapshot never changes, and no job gets one.
//! - Who works on one volume does not wait for those who work on others. No program of a filesystem runs for ever.

mod btrfs;
mod found;
mod image;
mod locks;
mod metrics;
mod pools;
mod record;
mod resize;
mod snapshots;
mod stream;
mod sweep;
mod transfer;
mod zfs;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flynn_api::volume::{MIN_LIMIT, NewProvider, NewVolume, Provider, Volume, VolumeType};
use flynn_api::{Error, Meta, Result};
use jiff::Timestamp;
use uuid::Uuid;

use self::found::{Found, all, find, is_free, look, new_id};
use self::locks::Locks;
use self::pools::{Pool, Pools};
pub use self::record::is_volume_id;
use self::record::{Form, Record};
use self::resize::check_limit;
pub use self::stream::{Decoder, Encoder, Header, MAX_PIECE, Part};
pub use self::transfer::{Mover, Receiving};
use crate::files::{self, disk_error};
use crate::paths::Paths;

/// A volume's data, in its directory.
const DATA: &str = "data";

/// What will be a subvolume's data after a rollback, and then what were.
const NEXT: &str = "next";

/// How long somebody waits who only wants to know how full something is.
const QUICK: Duration = Duration::from_secs(5);

/// What the disk of a provider keeps when a volume takes all its room at once.
const RESERVE: u64 = 64 << 20;

/// A volume that a job asks for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Its id.
    pub id: String,
    /// What it may hold at least.
    pub limit: Option<u64>,
    /// Its labels, if it is made now.
    pub meta: Meta,
    /// Whose its data are, if it is made now: user and group.
    pub owner: (u32, u32),
}

/// Who says which jobs have a volume mounted.
pub type Users<'a> = &'a dyn Fn(&str) -> Vec<String>;

/// The volumes of this host.
#[derive(Debug)]
pub struct Volumes {
    /// Never held while a volume is worked on.
    table: Mutex<Pools>,
    /// Who is at which volume.
    locks: Locks,
    /// What is unfinished because somebody is at it.
    working: Mutex<BTreeSet<PathBuf>>,
}

impl Volumes {
    /// Those of this host. What a crash has left is out of the way, and goes with [`Volumes::sweep`].
    pub fn open(paths: &Paths) -> io::Result<Self> {
        let volumes = Self {
            table: Mutex::new(Pools::open(paths)?),
            locks: Locks::default(),
            working: Mutex::default(),
        };
        volumes.finish_decommissions();
        Ok(volumes)
    }

    fn table(&self) -> MutexGuard<'_, Pools> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The providers as they are now.
    fn pools(&self) -> Pools {
        self.table().clone()
    }

    fn working(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.working.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where volumes are kept.
    pub fn providers(&self) -> Vec<Provider> {
        self.pools().show()
    }

    /// Adds a provider. Repeated it does nothing.
    pub fn add_provider(&self, new: &NewProvider) -> Result<()> {
        let pool = Pool::plan(new)?;
        self.pools().place(&pool)?;
        pool.prepare(new)?;
        self.table().add(pool, new.default)
    }

    /// Takes a provider off the list: one without volumes, or whose disk is gone.
    pub fn remove_provider(&self, id: &str) -> Result<()> {
        let mut pools = self.table();
        let path = &pools.get(id)?.path;
        if self
            .working()
            .iter()
            .any(|unfinished| unfinished.starts_with(path))
        {
            return Err(Error::conflict(format!(
                "a volume is being made or removed at the provider {id}: try again when that is done"
            )));
        }
        pools.remove(id)
    }

    /// What an operator should know.
    pub fn notices(&self) -> Vec<String> {
        let pools = self.pools();
        let missing = pools.iter().filter_map(|pool| pool.check().err());
        missing.map(|error| error.message).collect()
    }

    /// All volumes, by id.
    pub fn list(&self, users: Users<'_>) -> Result<Vec<Volume>> {
        let mut volumes = Vec::new();
        for found in all(&self.pools()) {
            volumes.push(found?.show(users));
        }
        volumes.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(volumes)
    }

    /// One volume, and how full it is.
    pub fn get(&self, id: &str, users: Users<'_>) -> Result<Volume> {
        let found = find(&self.pools(), id)?;
        Ok(Volume {
            used: found.used(),
            ..found.show(users)
        })
    }

    /// Sees to it that a volume is there, for a job. Gives the directory of its data.
    pub fn ensure(&self, wanted: &Wanted) -> Result<PathBuf> {
        let id = &wanted.id;
        let _lock = self.locks.lock(&[id]);
        let pools = self.pools();
        let mut found = match look(&pools, id)? {
            Some(found) => found,
            None => self.make(pools.default()?, wanted)?,
        };
        if found.record.kind == VolumeType::Snapshot {
            return Err(Error::conflict(format!(
                "volume {id} is a snapshot, which never changes: give the job a copy (flynn-host volume fork {id})"
            )));
        }
        if found.record.decommissioned_at.is_some() {
            return Err(Error::conflict(format!(
                "volume {id} is decommissioned: give the job another one"
            )));
        }
        found.raise(wanted.limit)?;
        found.open()
    }

    /// Makes a volume at a provider.
    pub fn create(&self, provider: &str, new: NewVolume) -> Result<Volume> {
        let id = new_id(new.id)?;
        let _lock = self.locks.lock(&[&id]);
        let pools = self.pools();
        let pool = pools.get(provider)?;
        pool.check()?;
        is_free(&pools, &id)?;
        let wanted = Wanted {
            id,
            limit: new.limit,
            meta: new.meta,
            owner: (0, 0),
        };
        Ok(self.make(pool, &wanted)?.show(&|_| Vec::new()))
    }

    fn make(&self, pool: &Pool, wanted: &Wanted) -> Result<Found> {
        if let Some(limit) = wanted.limit {
            check_limit(pool, limit)?;
        }
        let form = pool.form(wanted.limit);
        let mut record = Record::new(Timestamp::now(), form, wanted.limit, wanted.meta.clone());
        let dataset = Uuid::new_v4().to_string();
        record.dataset = Some(dataset.clone()).filter(|_| form == Form::Dataset);
        self.put(pool, &wanted.id, record, &[&dataset], |dir| match form {
            Form::Directory => make_directory(&dir.join(DATA), wanted.owner),
            // Its limit can be enforced only by taking the room now.
            Form::Image => image::make(dir, wanted.limit.unwrap_or(MIN_LIMIT), wanted.owner),
            Form::Subvolume => btrfs::make(&dir.join(DATA), wanted.limit, wanted.owner),
            Form::Dataset => pool.zfs()?.make(&dataset, wanted.limit, wanted.owner),
        })
    }

    /// Has `fill` make a volume's data, in a directory that then becomes the volume, and in these datasets.
    fn put(
        &self,
        pool: &Pool,
        id: &str,
        record: Record,
        datasets: &[&str],
        fill: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Found> {
        let new = self.unfinished(pool, datasets)?;
        let dir = pool.path.join(id);
        let made = files::private_dir(&new.path)
            .and_then(|()| fill(&new.path))
            .and_then(|()| record.write(&new.path))
            .and_then(|()| fs::rename(&new.path, &dir))
            .and_then(|()| files::sync_dir(&pool.path));
        made.map_err(|error| disk_error(&format!("make the volume {id}"), &error))?;
        Ok(Found {
            id: id.to_owned(),
            pool: pool.clone(),
            dir,
            record,
        })
    }

    /// Removes a volume and its data.
    pub fn remove(&self, id: &str, users: Users<'_>) -> Result<()> {
        self.remove_if(id, users, |_| true).map(drop)
    }

    /// The same, if it is still what it is to be; whether it was.
    fn remove_if(&self, id: &str, users: Users<'_>, is_meant: impl FnOnce(&Record) -> bool) -> Result<bool> {
        let lock = self.locks.lock(&[id]);
        let found = find(&self.pools(), id)?;
        if !is_meant(&found.record) {
            return Ok(false);
        }
        found.unused(users)?;
        let failed = |error| disk_error(&format!("remove the volume {id}"), &error);
        found.close().map_err(failed)?;
        let old = self.unfinished(&found.pool, &[])?;
        fs::rename(&found.dir, &old.path)
            .and_then(|()| files::sync_dir(&found.pool.path))
            .map_err(failed)?;
        // What it held can take a while, and is nobody's any more.
        drop(lock);
        found.give_back();
        drop(old);
        Ok(true)
    }
}

fn make_directory(data: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    files::private_dir(data)?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o755))?;
    chown(data, Some(uid), Some(gid))?;
    files::sync_dir(data)
}

#[cfg(test)]
mod tests;
