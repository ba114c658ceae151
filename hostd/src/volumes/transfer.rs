//! Snapshots to and from other hosts.

use std::process::Command;

use flynn_api::volume::{ProviderKind, Volume, VolumeType};
use flynn_api::{Error, Result};

use super::pools::Pool;
use super::record::{Form, Record};
use super::stream::Header;
use super::{DATA, Found, Unfinished, Volumes, btrfs, find, free_id};
use crate::files::{self, disk_error};

/// A snapshot that is arriving.
#[must_use]
pub struct Receiving<'a> {
    new: Unfinished<'a>,
    pool: Pool,
    id: String,
    record: Record,
}

impl Volumes {
    /// What is sent of a snapshot, all or what differs from an earlier one, and the program that writes its bytes.
    pub fn send(&self, id: &str, from: Option<&str>) -> Result<(Header, Command)> {
        let pools = self.lock();
        let found = find(&pools, id)?;
        let data = found.subvolume()?;
        if found.record.kind != VolumeType::Snapshot {
            return Err(Error::validation(format!(
                "volume {id} changes while it is sent: make a snapshot of it (flynn-host volume snapshot {id}), and \
                 send that"
            )));
        }
        let mut command = Command::new(btrfs::PROGRAM);
        command.args(["send", "-q"]);
        if let Some(from) = from {
            let parent = find(&pools, from)?;
            if parent.record.kind != VolumeType::Snapshot || parent.pool != found.pool {
                let why = format!("{from} is no snapshot at the provider {}", found.pool.id);
                return Err(Error::invalid_field("from", why));
            }
            command.arg("-p").arg(parent.subvolume()?);
        }
        command.arg("--").arg(data);
        let header = Header {
            id: found.id,
            record: found.record,
            from: from.map(str::to_owned),
        };
        Ok((header, command))
    }

    /// Begins to take a snapshot in, at a provider. What is given is dropped when it does not arrive.
    pub fn receive(&self, provider: &str, header: &Header) -> Result<Receiving<'_>> {
        let pools = self.lock();
        let pool = pools.get(provider)?;
        pool.check()?;
        if pool.kind != ProviderKind::Btrfs {
            return Err(Error::validation(format!(
                "the provider {provider} keeps no snapshots: name one on btrfs (flynn-host volume providers lists them)"
            )));
        }
        let id = free_id(&pools, Some(header.id.clone()))?;
        if let Some(from) = &header.from {
            let parent = find(&pools, from).ok();
            if parent.is_none_or(|parent| parent.pool != *pool) {
                return Err(Error::validation(format!(
                    "only what differs from the snapshot {from} was sent, which is not at the provider {provider}: \
                     send that first, or all of {id} (without --from)"
                )));
            }
        }
        let new = self.unfinished(pool);
        files::private_dir(&new.path).map_err(|error| disk_error("receive the snapshot", &error))?;
        Ok(Receiving {
            new,
            pool: pool.clone(),
            id,
            record: Record {
                kind: VolumeType::Snapshot,
                source: header.record.source.clone(),
                ..Record::new(
                    header.record.created_at,
                    Form::Subvolume,
                    header.record.limit,
                    header.record.meta.clone(),
                )
            },
        })
    }
}

impl Receiving<'_> {
    /// The program that reads the snapshot's bytes.
    pub fn program(&self) -> Command {
        let mut command = Command::new(btrfs::PROGRAM);
        command.args(["-q", "receive", "--"]).arg(&self.new.path);
        command
    }

    /// All has arrived, undamaged: now it is a volume.
    pub fn finish(self) -> Result<Volume> {
        let volumes = self.new.volumes;
        let pools = volumes.lock();
        // Another may have come by this name meanwhile.
        free_id(&pools, Some(self.id.clone()))?;
        if !btrfs::is_subvolume(&self.new.path.join(DATA)) {
            return Err(Error::validation("what was sent is no snapshot of a volume"));
        }
        let dir = self.pool.path.join(&self.id);
        let stored = self
            .record
            .write(&self.new.path)
            .and_then(|()| std::fs::rename(&self.new.path, &dir))
            .and_then(|()| files::sync_dir(&self.pool.path));
        stored.map_err(|error| disk_error("keep the snapshot", &error))?;
        let found = Found {
            id: self.id,
            pool: self.pool,
            dir,
            record: self.record,
        };
        Ok(found.show(&|_| Vec::new()))
    }
}
