//! Volumes: data of this host that outlive jobs.
//!
//! A **provider** ([`pools`]) is a directory. Each of its volumes is a directory there, named by its id, with a record
//! ([`record`]) and the data in one of three forms: a plain directory, an ext4 in a file ([`image`]) or a subvolume of a
//! btrfs ([`btrfs`]). Only the last makes snapshots.
//!
//! Invariants:
//! - A volume is there whole or not at all. It is made under another name and renamed last, and renamed first when it
//!   goes: a crash leaves what [`Volumes::sweep`] removes, and nothing that is taken for a volume.
//! - A volume that cannot be had (its provider's disk is missing, its record broken) is an error. It is never made anew
//!   in the place of the one that is lost from sight.
//! - A snapshot never changes, and no job gets one.

mod btrfs;
mod image;
mod pools;
mod record;
mod stream;
mod tool;
mod transfer;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use flynn_api::server::disk;
use flynn_api::volume::{Gc, MIN_LIMIT, NewProvider, NewVolume, Provider, Volume, VolumeType};
use flynn_api::{Error, ErrorCode, Meta, Result};
use jiff::Timestamp;
use uuid::Uuid;

pub(crate) use self::btrfs::{tool_failed, tool_missing};
use self::pools::{Pool, Pools};
pub use self::record::is_volume_id;
use self::record::{Form, Record, UNFINISHED, aside};
pub use self::stream::{Decoder, Encoder, Header, MAX_PIECE, Part};
pub use self::transfer::Receiving;
use crate::files::{self, disk_error};
use crate::paths::Paths;

/// A volume's data, in its directory.
const DATA: &str = "data";

/// What will be its data after a rollback, and then what were.
const NEXT: &str = "next";

/// What the disk of a provider keeps when a volume takes all its room at once.
const RESERVE: u64 = 64 << 20;

/// A volume that a job asks for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Its id.
    pub id: String,
    /// What it may hold, if it is made now.
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
    /// Held while a volume comes or goes.
    pools: Mutex<Pools>,
    /// What is unfinished because somebody is at it.
    working: Mutex<BTreeSet<PathBuf>>,
    /// What was found when the providers' disks were looked at last.
    notices: Mutex<Vec<String>>,
}

/// A volume that is there.
struct Found {
    id: String,
    pool: Pool,
    dir: PathBuf,
    record: Record,
}

impl Found {
    /// The directory of its data, mounted where it has to be.
    fn open(&self) -> Result<PathBuf> {
        if self.record.form != Form::Image {
            return Ok(self.dir.join(DATA));
        }
        image::open(&self.dir, &Paths::volume_mount(&self.id))
            .map_err(|error| disk_error(&format!("mount the volume {}", self.id), &error))
    }

    fn close(&self) -> io::Result<()> {
        match self.record.form {
            Form::Image => image::close(&Paths::volume_mount(&self.id)),
            _ => Ok(()),
        }
    }

    fn show(&self, users: Users<'_>) -> Volume {
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

    fn used(&self) -> Option<u64> {
        match self.record.form {
            Form::Directory => None,
            Form::Image => image::used(&Paths::volume_mount(&self.id)).ok().flatten(),
            Form::Subvolume => btrfs::used(&self.dir.join(DATA)),
        }
    }

    fn unused(&self, users: Users<'_>) -> Result<()> {
        match users(&self.id).first() {
            None => Ok(()),
            Some(job) => Err(Error::conflict(format!(
                "volume {} is used by job {job}: stop it first",
                self.id
            ))),
        }
    }

    /// Only a btrfs can do this.
    fn subvolume(&self) -> Result<PathBuf> {
        if self.record.form == Form::Subvolume {
            return Ok(self.dir.join(DATA));
        }
        Err(Error::validation(format!(
            "volume {} is of the provider {}, which makes no snapshots: volumes of a provider on btrfs have them \
             (flynn-host volume add-provider ID PATH --kind btrfs)",
            self.id, self.pool.id
        )))
    }
}

/// A directory that becomes a volume or has been one. It is removed unless it was renamed.
struct Unfinished<'a> {
    path: PathBuf,
    volumes: &'a Volumes,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        discard(&self.path);
        self.volumes.working().remove(&self.path);
    }
}

/// Removes what is no volume. What cannot be removed now is tried again by the next sweep.
fn discard(path: &Path) {
    let remove = || -> io::Result<()> {
        let entries = match fs::read_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?.path();
            if btrfs::is_subvolume(&entry) {
                btrfs::remove(&entry)?;
            }
        }
        files::remove_all(path)
    };
    if let Err(error) = remove() {
        tracing::warn!(path = %path.display(), %error, "cannot remove what is left of a volume");
    }
}

impl Volumes {
    /// Those of this host. What a crash has left is out of the way, and goes with [`Volumes::sweep`].
    pub fn open(paths: &Paths) -> io::Result<Self> {
        let volumes = Self {
            pools: Mutex::new(Pools::open(paths)?),
            working: Mutex::default(),
            notices: Mutex::default(),
        };
        volumes.finish_decommissions();
        Ok(volumes)
    }

    fn lock(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn working(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.working.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unfinished(&self, pool: &Pool) -> Unfinished<'_> {
        let path = pool.path.join(format!("{UNFINISHED}{}", Uuid::new_v4()));
        self.working().insert(path.clone());
        Unfinished { path, volumes: self }
    }

    /// Where volumes are kept.
    pub fn providers(&self) -> Vec<Provider> {
        self.lock().show()
    }

    /// Adds a provider. Repeated it does nothing.
    pub fn add_provider(&self, new: &NewProvider) -> Result<()> {
        self.lock().add(new)
    }

    /// Takes a provider off the list: one without volumes, or whose disk is gone.
    pub fn remove_provider(&self, id: &str) -> Result<()> {
        self.lock().remove(id)
    }

    /// What an operator should know; as it was a moment ago, while a volume comes or goes, which may take minutes.
    pub fn notices(&self) -> Vec<String> {
        let found = self.pools.try_lock().ok().map(|pools| {
            let missing = pools.iter().filter_map(|pool| pool.check().err());
            missing.map(|error| error.message).collect()
        });
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = found {
            *notices = found;
        }
        notices.clone()
    }

    /// All volumes, by id.
    pub fn list(&self, users: Users<'_>) -> Result<Vec<Volume>> {
        let pools = self.lock();
        let mut volumes = Vec::new();
        for found in all(&pools) {
            volumes.push(found?.show(users));
        }
        volumes.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(volumes)
    }

    /// One volume, and how full it is.
    pub fn get(&self, id: &str, users: Users<'_>) -> Result<Volume> {
        let found = find(&self.lock(), id)?;
        Ok(Volume {
            used: found.used(),
            ..found.show(users)
        })
    }

    /// Sees to it that a volume is there, for a job. Gives the directory of its data.
    pub fn ensure(&self, wanted: &Wanted) -> Result<PathBuf> {
        let pools = self.lock();
        let id = &wanted.id;
        let found = match look(&pools, id)? {
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
        found.open()
    }

    /// Makes a volume at a provider.
    pub fn create(&self, provider: &str, new: NewVolume) -> Result<Volume> {
        let pools = self.lock();
        let pool = pools.get(provider)?;
        pool.check()?;
        let wanted = Wanted {
            id: free_id(&pools, new.id)?,
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
        let record = Record::new(Timestamp::now(), form, wanted.limit, wanted.meta.clone());
        self.put(pool, &wanted.id, record, |dir| match form {
            Form::Directory => make_directory(&dir.join(DATA), wanted.owner),
            // Its limit can be enforced only by taking the room now.
            Form::Image => image::make(dir, wanted.limit.unwrap_or(MIN_LIMIT), wanted.owner),
            Form::Subvolume => btrfs::make(&dir.join(DATA), wanted.limit, wanted.owner),
        })
    }

    /// Has `fill` make a volume's data in a directory that then becomes the volume.
    fn put(
        &self,
        pool: &Pool,
        id: &str,
        record: Record,
        fill: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Found> {
        let new = self.unfinished(pool);
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
        let pools = self.lock();
        let found = find(&pools, id)?;
        found.unused(users)?;
        let failed = |error| disk_error(&format!("remove the volume {id}"), &error);
        found.close().map_err(failed)?;
        let old = self.unfinished(&found.pool);
        fs::rename(&found.dir, &old.path)
            .and_then(|()| files::sync_dir(&found.pool.path))
            .map_err(failed)?;
        // What it held can take a while, and is nobody's any more.
        drop(pools);
        drop(old);
        Ok(())
    }

    /// Makes a snapshot of a volume as it is now, whoever writes to it.
    pub fn snapshot(&self, id: &str, copy: Option<String>) -> Result<Volume> {
        self.copy(id, copy, VolumeType::Snapshot)
    }

    /// Makes a volume that begins as a copy of a snapshot, or of a volume as it is now.
    pub fn fork(&self, id: &str, copy: Option<String>) -> Result<Volume> {
        self.copy(id, copy, VolumeType::Data)
    }

    fn copy(&self, id: &str, copy: Option<String>, kind: VolumeType) -> Result<Volume> {
        let pools = self.lock();
        let found = find(&pools, id)?;
        let from = found.subvolume()?;
        let copy = free_id(&pools, copy)?;
        let record = found.record.copy(id, Timestamp::now(), kind);
        let limit = record.limit.filter(|_| kind == VolumeType::Data);
        let made = self.put(&found.pool, &copy, record, |dir| {
            let to = dir.join(DATA);
            btrfs::copy(&from, &to, kind == VolumeType::Snapshot)?;
            btrfs::set_limit(&to, limit)
        })?;
        Ok(made.show(&|_| Vec::new()))
    }

    /// Makes a volume what it was when one of its snapshots was made. What came after, and is in no snapshot, is lost.
    pub fn rollback(&self, id: &str, snapshot: &str, users: Users<'_>) -> Result<()> {
        let pools = self.lock();
        let found = find(&pools, id)?;
        let data = found.subvolume()?;
        let from = find(&pools, snapshot)?;
        if from.record.kind != VolumeType::Snapshot
            || from.record.source.as_deref() != Some(id)
            || from.pool != found.pool
        {
            return Err(Error::invalid_field(
                "snapshot",
                format!(
                    "{snapshot} is no snapshot of volume {id} at its provider: flynn-host volume list shows the \
                     source of each. What another volume was can be had as a fork"
                ),
            ));
        }
        if found.record.kind == VolumeType::Snapshot {
            return Err(Error::validation(format!(
                "{id} is a snapshot, which never changes"
            )));
        }
        found.unused(users)?;
        let next = found.dir.join(NEXT);
        let roll = || -> io::Result<()> {
            if next.exists() {
                btrfs::remove(&next)?;
            }
            btrfs::copy(&from.dir.join(DATA), &next, false)?;
            btrfs::set_limit(&next, found.record.limit)?;
            // The step: before it the volume is what it was, after it what it shall be.
            let here = rustix::fs::CWD;
            rustix::fs::renameat_with(here, &next, here, &data, rustix::fs::RenameFlags::EXCHANGE)?;
            files::sync_dir(&found.dir)?;
            btrfs::remove(&next)
        };
        roll().map_err(|error| disk_error(&format!("roll the volume {id} back"), &error))
    }

    /// Sets a volume aside: its id is free for a new one, and [`Volumes::gc`] takes it. Gives it by its other id.
    pub fn decommission(&self, id: &str, users: Users<'_>) -> Result<Volume> {
        let pools = self.lock();
        let mut found = find(&pools, id)?;
        found.unused(users)?;
        let at = *found.record.decommissioned_at.get_or_insert_with(Timestamp::now);
        let failed = |error| disk_error(&format!("decommission the volume {id}"), &error);
        found.close().map_err(failed)?;
        // Whoever is stopped between the two is helped by the next start.
        found.record.write(&found.dir).map_err(failed)?;
        set_aside(&mut found, at).map_err(failed)?;
        Ok(found.show(users))
    }

    /// Does what a crash has left undone of a decommission.
    fn finish_decommissions(&self) {
        for mut found in all(&self.lock()).flatten() {
            if let Some(at) = found.record.decommissioned_at
                && let Err(error) = set_aside(&mut found, at)
            {
                tracing::warn!(volume = found.id, %error, "cannot be set aside");
            }
        }
    }

    /// Removes what was decommissioned long enough ago, and what a crash has left. Gives the ids of the volumes.
    pub fn gc(&self, gc: &Gc, users: Users<'_>) -> Result<Vec<String>> {
        let now = Timestamp::now().as_second();
        let old = |volume: &Volume| {
            let since = volume
                .decommissioned_at
                .map(|at| now.saturating_sub(at.as_second()));
            since.is_some_and(|seconds| u64::try_from(seconds).unwrap_or(0) >= gc.older_than)
        };
        let mut volumes = self.list(users)?;
        volumes.retain(|volume| old(volume) && volume.jobs.is_empty());
        let ids: Vec<String> = volumes.into_iter().map(|volume| volume.id).collect();
        if !gc.dry_run {
            for id in &ids {
                self.remove(id, users)?;
            }
            self.sweep();
        }
        Ok(ids)
    }

    /// Removes what a crash has left, and nobody is at.
    pub fn sweep(&self) {
        let pools: Vec<Pool> = self.lock().iter().cloned().collect();
        for pool in pools.iter().filter(|pool| pool.check().is_ok()) {
            for name in pool.names(true).unwrap_or_default() {
                let path = pool.path.join(name);
                if !self.working().contains(&path) {
                    discard(&path);
                }
            }
        }
        let pools = self.lock();
        for found in all(&pools).flatten() {
            let next = found.dir.join(NEXT);
            if next.exists()
                && let Err(error) = btrfs::remove(&next)
            {
                tracing::warn!(volume = found.id, %error, "cannot remove what was rolled back");
            }
        }
    }
}

fn set_aside(found: &mut Found, at: Timestamp) -> io::Result<()> {
    let id = aside(&found.id, at);
    if id != found.id {
        let dir = found.pool.path.join(&id);
        fs::rename(&found.dir, &dir)?;
        files::sync_dir(&found.pool.path)?;
        (found.id, found.dir) = (id, dir);
    }
    Ok(())
}

/// All volumes that can be read.
fn all(pools: &Pools) -> impl Iterator<Item = Result<Found>> {
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

fn find(pools: &Pools, id: &str) -> Result<Found> {
    look(pools, id)?.ok_or_else(|| Error::not_found("volume", id))
}

/// A volume, or that there is surely none.
fn look(pools: &Pools, id: &str) -> Result<Option<Found>> {
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
        match Record::read(&dir) {
            Ok(None) if !dir.exists() => {}
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
fn free_id(pools: &Pools, id: Option<String>) -> Result<String> {
    let id = id.unwrap_or_else(|| Uuid::new_v4().to_string());
    if !is_volume_id(&id) {
        let rule = "1 to 100 letters, digits, dashes, underscores and dots, no dot in front";
        return Err(Error::invalid_field("id", rule));
    }
    match look(pools, &id)? {
        None => Ok(id),
        Some(_) => Err(Error::new(
            ErrorCode::ObjectExists,
            format!("there is a volume {id}: choose another id"),
        )),
    }
}

fn check_limit(pool: &Pool, limit: u64) -> Result<()> {
    if limit < MIN_LIMIT {
        let least = format!("a volume holds at least {} MiB", MIN_LIMIT >> 20);
        return Err(Error::invalid_field("limit", least));
    }
    let (free, _) = disk::space(&pool.path).map_err(|error| disk_error("look at the disk", &error))?;
    if pool.form(Some(limit)) == Form::Image && free < limit.saturating_add(RESERVE) {
        return Err(disk::full(format!(
            "a volume of {} MiB does not fit on the disk of {} ({} MiB left)",
            limit >> 20,
            pool.path.display(),
            free >> 20
        )));
    }
    Ok(())
}

fn make_directory(data: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    files::private_dir(data)?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o755))?;
    chown(data, Some(uid), Some(gid))?;
    files::sync_dir(data)
}

#[cfg(test)]
mod tests;
