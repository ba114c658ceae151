//! What volumes were: snapshots, what is made of them, and the way back.

use std::io;

use flynn_api::volume::{Volume, VolumeType};
use flynn_api::{Error, Result};
use jiff::Timestamp;
use uuid::Uuid;

use super::found::{Found, find, is_free, new_id};
use super::record::{Form, Record};
use super::{DATA, NEXT, Users, Volumes, btrfs};
use crate::files::{self, disk_error};

impl Volumes {
    /// Makes a snapshot of a volume as it is now, whoever writes to it.
    pub fn snapshot(&self, id: &str, copy: Option<String>) -> Result<Volume> {
        self.copy(id, copy, VolumeType::Snapshot)
    }

    /// Makes a volume that begins as a copy of a snapshot, or of a volume as it is now.
    pub fn fork(&self, id: &str, copy: Option<String>) -> Result<Volume> {
        self.copy(id, copy, VolumeType::Data)
    }

    fn copy(&self, id: &str, copy: Option<String>, kind: VolumeType) -> Result<Volume> {
        let copy = new_id(copy)?;
        let _lock = self.locks.lock(&[id, &copy]);
        let pools = self.pools();
        let found = find(&pools, id)?;
        found.makes_snapshots()?;
        is_free(&pools, &copy)?;
        let record = found.record.copy(id, Timestamp::now(), kind);
        let made = if found.record.form == Form::Dataset {
            self.copy_dataset(&found, &copy, record)?
        } else {
            let limit = record.limit.filter(|_| kind == VolumeType::Data);
            self.put(&found.pool, &copy, record, &[], |dir| {
                let to = dir.join(DATA);
                btrfs::copy(&found.dir.join(DATA), &to, kind == VolumeType::Snapshot)?;
                btrfs::set_limit(&to, limit)
            })?
        };
        Ok(made.show(&|_| Vec::new()))
    }

    fn copy_dataset(&self, found: &Found, copy: &str, mut record: Record) -> Result<Found> {
        let failed = |error| disk_error(&format!("copy the volume {}", found.id), &error);
        let zfs = found.pool.zfs().map_err(failed)?;
        let from = found.dataset().map_err(failed)?;
        let is_new = !from.contains('@');
        let snapshot = if is_new {
            format!("{from}@{}", Uuid::new_v4())
        } else {
            from.to_owned()
        };
        let fork = Uuid::new_v4().to_string();
        let is_fork = record.kind == VolumeType::Data;
        record.dataset = Some(if is_fork { fork.clone() } else { snapshot.clone() });
        let limit = record.limit;
        self.put(&found.pool, copy, record, &[&snapshot, &fork], |_| {
            if is_new {
                zfs.snapshot(&snapshot)?;
            }
            if is_fork {
                zfs.clone_of(&snapshot, &fork, limit)?;
            }
            Ok(())
        })
    }

    /// Makes a volume what it was when one of its snapshots was made. What came after, and is in no snapshot, is lost.
    pub fn rollback(&self, id: &str, snapshot: &str, users: Users<'_>) -> Result<()> {
        let _lock = self.locks.lock(&[id, snapshot]);
        let pools = self.pools();
        let found = find(&pools, id)?;
        found.makes_snapshots()?;
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
        found.is_no_snapshot()?;
        found.unused(users)?;
        let failed = |error| disk_error(&format!("roll the volume {id} back"), &error);
        if found.record.form != Form::Dataset {
            return roll_subvolume(&found, &from).map_err(failed);
        }
        let next = Uuid::new_v4().to_string();
        let under_way = self.unfinished(&found.pool, &[&next])?;
        let rolled = roll_dataset(&found, &from, &next);
        drop(under_way);
        self.sweep_datasets(&found.pool);
        rolled.map_err(failed)
    }
}

fn roll_dataset(found: &Found, from: &Found, next: &str) -> io::Result<()> {
    let zfs = found.pool.zfs()?;
    zfs.clone_of(from.dataset()?, next, found.record.limit)?;
    let record = Record {
        dataset: Some(next.to_owned()),
        ..found.record.clone()
    };
    // The step: before it the volume is what it was, after it what it shall be.
    record.write(&found.dir)?;
    found.give_back();
    Ok(())
}

fn roll_subvolume(found: &Found, from: &Found) -> io::Result<()> {
    let (data, next) = (found.dir.join(DATA), found.dir.join(NEXT));
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
}
