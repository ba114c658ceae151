//! What is no volume, yet or any more: what is under way, what a crash has left, what was set aside.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use flynn_api::volume::{Gc, Volume};
use flynn_api::{Error, ErrorCode, Result};
use jiff::Timestamp;
use uuid::Uuid;

use super::found::{Found, all, find};
use super::pools::Pool;
use super::record::{Record, UNFINISHED, aside};
use super::{NEXT, Users, Volumes, btrfs};
use crate::files::{self, disk_error};

/// A directory that becomes a volume or has been one, and datasets that become its own. They are removed unless it was
/// renamed.
pub(super) struct Unfinished<'a> {
    pub(super) path: PathBuf,
    pool: Pool,
    /// Where its datasets are mounted.
    datasets: Vec<PathBuf>,
    pub(super) volumes: &'a Volumes,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let is_no_volume = self.path.exists();
        discard(&self.path);
        {
            let mut working = self.volumes.working();
            working.remove(&self.path);
            for dataset in &self.datasets {
                working.remove(dataset);
            }
        }
        if is_no_volume {
            self.volumes.sweep_datasets(&self.pool);
        }
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
        btrfs::settle(path)?;
        files::remove_all(path)
    };
    if let Err(error) = remove() {
        tracing::warn!(path = %path.display(), %error, "cannot remove what is left of a volume");
    }
}

impl Volumes {
    /// A name for what is under way, and for datasets, at a provider that stays until it is done.
    pub(super) fn unfinished(&self, pool: &Pool, datasets: &[&str]) -> Result<Unfinished<'_>> {
        let pools = self.table();
        pools.get(&pool.id)?;
        let path = pool.path.join(format!("{UNFINISHED}{}", Uuid::new_v4()));
        let datasets = pool.zfs().map_or_else(
            |_| Vec::new(),
            |zfs| datasets.iter().map(|name| zfs.mount_point(name)).collect(),
        );
        let mut working = self.working();
        working.insert(path.clone());
        working.extend(datasets.iter().cloned());
        Ok(Unfinished {
            path,
            pool: pool.clone(),
            datasets,
            volumes: self,
        })
    }

    /// Removes datasets that are no volume's. What something is made of stays.
    pub(super) fn sweep_datasets(&self, pool: &Pool) {
        let Ok(zfs) = pool.zfs() else { return };
        let needed = |names: &[String]| {
            // Held: no volume gets its record, or another id, while the records are looked through.
            let working = self.working();
            let of_volumes = pool.datasets()?;
            // Without its disk there would seem to be none.
            pool.check().map_err(io::Error::other)?;
            let names = names
                .iter()
                .filter(|name| of_volumes.contains(*name) || working.contains(&zfs.mount_point(name)));
            Ok(names.cloned().collect())
        };
        if let Err(error) = zfs.sweep(needed) {
            tracing::warn!(provider = pool.id, %error, "what is no volume's stays in its datasets");
        }
    }

    /// Sets a volume aside: its id is free for a new one, and [`Volumes::gc`] takes it. Gives it by its other id.
    pub fn decommission(&self, id: &str, users: Users<'_>) -> Result<Volume> {
        let _lock = self.locks.lock(&[id]);
        let mut found = find(&self.pools(), id)?;
        found.unused(users)?;
        let at = *found.record.decommissioned_at.get_or_insert_with(Timestamp::now);
        let failed = |error| disk_error(&format!("decommission the volume {id}"), &error);
        found.close().map_err(failed)?;
        // Whoever is stopped between the two is helped by the next start.
        found.record.write(&found.dir).map_err(failed)?;
        let working = self.working();
        set_aside(&mut found, at).map_err(failed)?;
        drop(working);
        Ok(found.show(users))
    }

    /// Does what a crash has left undone of a decommission.
    pub(super) fn finish_decommissions(&self) {
        for mut found in all(&self.pools()).flatten() {
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
        if gc.dry_run {
            return Ok(volumes.into_iter().map(|volume| volume.id).collect());
        }
        let mut kept = Vec::new();
        volumes.retain(|volume| {
            // Another may have come by its name since.
            let is_meant = |record: &Record| record.decommissioned_at == volume.decommissioned_at;
            match self.remove_if(&volume.id, users, is_meant) {
                Ok(removed) => removed,
                Err(error) if error.code == ErrorCode::NotFound => false,
                Err(error) => {
                    kept.push(error.message);
                    false
                }
            }
        });
        let ids: Vec<String> = volumes.into_iter().map(|volume| volume.id).collect();
        self.sweep();
        if kept.is_empty() {
            return Ok(ids);
        }
        Err(Error::internal(format!(
            "{} volumes were removed, but not all that were decommissioned: {}",
            ids.len(),
            kept.join("; ")
        )))
    }

    /// Removes what a crash has left, and nobody is at.
    pub fn sweep(&self) {
        let pools = self.pools();
        for pool in pools.iter().filter(|pool| pool.check().is_ok()) {
            for name in pool.names(true).unwrap_or_default() {
                let path = pool.path.join(name);
                if !self.working().contains(&path) {
                    discard(&path);
                }
            }
            self.sweep_datasets(pool);
        }
        for found in all(&pools).flatten() {
            let next = found.dir.join(NEXT);
            if found.record.resizing.is_none() && !next.exists() {
                continue;
            }
            let _lock = self.locks.lock(&[&found.id]);
            if next.exists()
                && let Err(error) = btrfs::remove(&next)
            {
                tracing::warn!(volume = found.id, %error, "cannot remove what was rolled back");
            }
            if let Ok(mut found) = find(&pools, &found.id)
                && let Err(error) = found.finish_resize()
            {
                tracing::warn!(volume = found.id, %error, "its limit could not be changed");
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
