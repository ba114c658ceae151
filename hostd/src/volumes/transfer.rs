//! Snapshots to and from other hosts.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::process::Command;

use flynn_api::server::disk;
use flynn_api::volume::{ProviderKind, Volume, VolumeType};
use flynn_api::{Error, Result};
use uuid::Uuid;

use super::found::{Found, find, is_free, new_id};
use super::pools::Pool;
use super::record::{Form, Record};
use super::stream::Header;
use super::sweep::Unfinished;
use super::{DATA, Volumes, btrfs, zfs};
use crate::confine;
use crate::files::{self, disk_error};
use crate::tool::Tool;

/// A program that writes or reads a snapshot's bytes.
pub struct Mover {
    /// What is to be started.
    pub command: Command,
    tool: &'static Tool,
}

impl Mover {
    /// The error when it could not be started.
    pub fn missing(&self, error: &io::Error) -> io::Error {
        self.tool.missing(error)
    }

    /// The error when it has failed, of what it said.
    pub fn failed(&self, stderr: &[u8]) -> io::Error {
        self.tool.failed(stderr)
    }
}

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
    pub fn send(&self, id: &str, from: Option<&str>) -> Result<(Header, Mover)> {
        let pools = self.pools();
        let found = find(&pools, id)?;
        found.makes_snapshots()?;
        if found.record.kind != VolumeType::Snapshot {
            return Err(Error::validation(format!(
                "volume {id} changes while it is sent: make a snapshot of it (flynn-host volume snapshot {id}), and \
                 send that"
            )));
        }
        let parent = from.map(|from| find(&pools, from)).transpose()?;
        if let Some(parent) = &parent
            && (parent.record.kind != VolumeType::Snapshot || parent.pool != found.pool)
        {
            let why = format!("{} is no snapshot at the provider {}", parent.id, found.pool.id);
            return Err(Error::invalid_field("from", why));
        }
        let mover = sender(&found, parent.as_ref());
        let mover = mover.map_err(|error| disk_error(&format!("send the snapshot {id}"), &error))?;
        let header = Header {
            id: found.id,
            record: found.record,
            from: from.map(str::to_owned),
        };
        Ok((header, mover))
    }

    /// Begins to take a snapshot in, at a provider. What is given is dropped when it does not arrive.
    pub fn receive(&self, provider: &str, header: &Header) -> Result<Receiving<'_>> {
        let pools = self.pools();
        let pool = pools.get(provider)?;
        pool.check()?;
        let form = pool.form(None);
        if !matches!(form, Form::Subvolume | Form::Dataset) {
            return Err(Error::validation(format!(
                "the provider {provider} keeps no snapshots: name one on btrfs or ZFS (flynn-host volume providers lists \
                 them)"
            )));
        }
        if header.record.form != form {
            return Err(Error::validation(format!(
                "the snapshot was sent by a provider of another kind than {provider}, which is {}: name one of the same \
                 kind (flynn-host volume providers lists them)",
                pool.kind.name()
            )));
        }
        let id = new_id(Some(header.id.clone()))?;
        is_free(&pools, &id)?;
        let mut parent = None;
        if let Some(from) = &header.from {
            parent = find(&pools, from).ok().filter(|parent| parent.pool == *pool);
            if parent.is_none() {
                return Err(Error::validation(format!(
                    "only what differs from the snapshot {from} was sent, which is not at the provider {provider}: \
                     send that first, or all of {id} (without --from)"
                )));
            }
        }
        let mut record = Record::new(
            header.record.created_at,
            form,
            header.record.limit,
            header.record.meta.clone(),
        );
        record.kind = VolumeType::Snapshot;
        record.source.clone_from(&header.record.source);
        let mut datasets = Vec::new();
        if form == Form::Dataset {
            // What differs from a snapshot can only be added to the dataset that has it.
            let of_parent = parent
                .as_ref()
                .and_then(|parent| parent.record.dataset.as_deref());
            let dataset = if let Some((dataset, _)) = of_parent.and_then(|name| name.split_once('@')) {
                let used = pool
                    .datasets()
                    .map_err(|error| disk_error("look at the provider's volumes", &error))?;
                if used.contains(dataset) {
                    return Err(Error::validation(format!(
                        "only what differs from the snapshot {} was sent, which is of a volume here that it would change: \
                         send all of {id} (without --from)",
                        header.from.as_deref().unwrap_or_default()
                    )));
                }
                dataset.to_owned()
            } else {
                let dataset = Uuid::new_v4().to_string();
                datasets.push(dataset.clone());
                dataset
            };
            let snapshot = format!("{dataset}@{}", Uuid::new_v4());
            datasets.push(snapshot.clone());
            record.dataset = Some(snapshot);
        }
        let datasets: Vec<&str> = datasets.iter().map(String::as_str).collect();
        let new = self.unfinished(pool, &datasets)?;
        files::private_dir(&new.path).map_err(|error| disk_error("receive the snapshot", &error))?;
        Ok(Receiving {
            new,
            pool: pool.clone(),
            id,
            record,
        })
    }
}

fn sender(found: &Found, parent: Option<&Found>) -> io::Result<Mover> {
    if found.pool.kind == ProviderKind::Zfs {
        let parent = parent.map(Found::dataset).transpose()?;
        return Ok(Mover {
            command: found.pool.zfs()?.send(found.dataset()?, parent),
            tool: &zfs::TOOL,
        });
    }
    let mut command = Command::new(btrfs::TOOL.program);
    command.args(["send", "-q"]);
    if let Some(parent) = parent {
        command.arg("-p").arg(parent.dir.join(DATA));
    }
    command.arg("--").arg(found.dir.join(DATA));
    Ok(Mover {
        command,
        tool: &btrfs::TOOL,
    })
}

impl Receiving<'_> {
    /// The program that reads the snapshot's bytes. Whatever they say, it writes nothing but this snapshot.
    pub fn mover(&self) -> Result<Mover> {
        let failed = |error| disk_error("receive the snapshot", &error);
        if self.pool.kind == ProviderKind::Zfs {
            let zfs = self.pool.zfs().map_err(failed)?;
            let snapshot = self.record.dataset.as_deref().unwrap_or_default();
            return Ok(Mover {
                command: zfs.receive(snapshot),
                tool: &zfs::TOOL,
            });
        }
        let mount = btrfs::mount_point(&self.pool.path).map_err(failed)?;
        let mut command = confine::command(&self.new.path, OsStr::new(btrfs::TOOL.program));
        command.args(["-q", "receive", "-m"]).arg(mount);
        command.arg("--").arg(&self.new.path);
        Ok(Mover {
            command,
            tool: &btrfs::TOOL,
        })
    }

    /// Refuses a snapshot by its first bytes, if they say that it would do more than be one.
    pub fn check_start(&self, start: &[u8]) -> Result<()> {
        if self.pool.kind != ProviderKind::Zfs {
            return Ok(());
        }
        zfs::check_stream(start)
            .map_err(|why| Error::validation(format!("what was sent is no snapshot of a volume: {why}")))
    }

    /// Refuses to go on where there is no room left.
    pub fn check_room(&self) -> Result<()> {
        disk::check(&self.pool.path)
    }

    /// All has arrived, undamaged: now it is a volume.
    pub fn finish(self) -> Result<Volume> {
        let volumes = self.new.volumes;
        let _lock = volumes.locks.lock(&[&self.id]);
        // Another may have come by this name meanwhile.
        is_free(&volumes.pools(), &self.id)?;
        let failed = |error| disk_error("keep the snapshot", &error);
        if let (Ok(zfs), Some(snapshot)) = (self.pool.zfs(), self.record.dataset.as_deref()) {
            zfs.has_arrived(snapshot).map_err(failed)?;
        } else {
            let data = self.new.path.join(DATA);
            let mut others = fs::read_dir(&self.new.path).map_err(failed)?.flatten();
            if !btrfs::is_subvolume(&data) || others.any(|entry| entry.file_name() != DATA) {
                return Err(Error::validation("what was sent is no snapshot of a volume"));
            }
            btrfs::set_read_only(&data).map_err(failed)?;
            // Its program has only written it.
            btrfs::settle(&data).map_err(failed)?;
        }
        let dir = self.pool.path.join(&self.id);
        let stored = self
            .record
            .write(&self.new.path)
            .and_then(|()| fs::rename(&self.new.path, &dir))
            .and_then(|()| files::sync_dir(&self.pool.path));
        stored.map_err(failed)?;
        let found = Found {
            id: self.id,
            pool: self.pool,
            dir,
            record: self.record,
        };
        Ok(found.show(&|_| Vec::new()))
    }
}
