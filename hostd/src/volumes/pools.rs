//! Where volumes are: the host's providers, each a directory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use flynn_api::server::disk;
use flynn_api::volume::{DEFAULT_PROVIDER, NewProvider, Provider, ProviderKind};
use flynn_api::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use super::btrfs;
use super::record::{Form, REMOVED, Record, UNFINISHED, is_volume_id};
use super::zfs::{self, Zfs};
use crate::files::{self, disk_error};
use crate::paths::Paths;

/// Marks a provider's directory: where it is missing, the disk is.
const MARK: &str = ".flynn-provider";

/// The form of the list that this release writes. In version 1 `default` had neither mark nor kind.
const VERSION: u32 = 2;

/// One provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pool {
    pub(super) id: String,
    pub(super) kind: ProviderKind,
    pub(super) path: PathBuf,
    /// Of a ZFS, what is mounted there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) dataset: Option<String>,
}

impl Pool {
    /// What is to be a provider. Nothing is made yet.
    pub(super) fn plan(new: &NewProvider) -> Result<Self> {
        if !is_volume_id(&new.id) {
            return Err(Error::invalid_field(
                "id",
                "letters, digits, dashes, underscores and dots",
            ));
        }
        let path = Path::new(&new.path);
        let is_dir = path.is_absolute() && path.is_dir();
        let path = path.canonicalize().ok().filter(|_| is_dir).ok_or_else(|| {
            Error::invalid_field(
                "path",
                format!("{:?} is no directory: make it, or mount its disk", new.path),
            )
        })?;
        if new.kind == ProviderKind::Btrfs {
            let failed = |error| disk_error("look for btrfs", &error);
            if !btrfs::is_on(&path).map_err(failed)? {
                let why = format!(
                    "{} is not on a btrfs: make one there with mkfs.btrfs and mount it, or say --kind dir",
                    path.display()
                );
                return Err(Error::invalid_field("kind", why));
            }
            btrfs::is_there().map_err(|error| Error::invalid_field("kind", error))?;
        }
        let dataset = match (new.kind, &new.dataset, &new.device) {
            (ProviderKind::Zfs, Some(dataset), None) => Some(dataset.clone()),
            (ProviderKind::Zfs, None, Some(_)) => Some(format!("flynn-{}", new.id)),
            (ProviderKind::Zfs, ..) => {
                let rule = "a ZFS needs either a dataset, or a device of which a pool is made";
                return Err(Error::invalid_field("dataset", rule));
            }
            (_, None, None) => None,
            _ => {
                let rule = "only a ZFS has a dataset or makes a pool of a device";
                return Err(Error::invalid_field("kind", rule));
            }
        };
        if let Some(dataset) = &dataset {
            if !zfs::is_name(dataset) {
                return Err(Error::invalid_field("dataset", "is a name such as tank/flynn"));
            }
            zfs::is_there().map_err(|error| Error::invalid_field("kind", error))?;
        }
        if new
            .device
            .as_ref()
            .is_some_and(|device| !Path::new(device).is_absolute())
        {
            return Err(Error::invalid_field("device", "is a path from / on"));
        }
        Ok(Self {
            id: new.id.clone(),
            kind: new.kind,
            path,
            dataset,
        })
    }

    /// Sees to it that a ZFS's dataset is there, and mounted in its directory.
    pub(super) fn prepare(&self, new: &NewProvider) -> Result<()> {
        let Some(dataset) = &self.dataset else {
            return Ok(());
        };
        if let Some(device) = &new.device {
            let device = Path::new(device);
            make_pool(dataset, device, new.size).map_err(|error| Error::invalid_field("device", error))?;
        }
        let is_marked = self.path.join(MARK).exists();
        let prepared = self.zfs().and_then(|zfs| zfs.prepare(is_marked));
        prepared.map_err(|error| Error::invalid_field("dataset", error))
    }

    /// Its programs, where it is on ZFS.
    pub(super) fn zfs(&self) -> io::Result<Zfs<'_>> {
        match (self.kind, self.dataset.as_deref()) {
            (ProviderKind::Zfs, Some(root)) => Ok(Zfs {
                root,
                path: &self.path,
            }),
            _ => Err(io::Error::new(io::ErrorKind::Unsupported, "it is on no ZFS")),
        }
    }

    /// The datasets and snapshots that its volumes are. Where a record cannot be read, nobody knows.
    pub(super) fn datasets(&self) -> io::Result<BTreeSet<String>> {
        let mut datasets = BTreeSet::new();
        for name in self.names(false)? {
            let dir = self.path.join(name);
            match Record::read(&dir)? {
                Some(record) => datasets.extend(record.dataset),
                // It went this moment.
                None if !dir.exists() => {}
                None => {
                    let why = format!("{} has no record", dir.display());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
            }
        }
        Ok(datasets)
    }

    fn mark(&self) -> io::Result<()> {
        files::write_json(&self.path.join(MARK), &serde_json::json!({ "version": 1 }))
    }

    /// Why its volumes cannot be had now.
    pub(super) fn check(&self) -> Result<()> {
        let why = if !self.path.join(MARK).exists() {
            "its mark is not there"
        } else if self.kind == ProviderKind::Btrfs && !btrfs::is_on(&self.path).unwrap_or(false) {
            "no btrfs is there"
        } else {
            return Ok(());
        };
        let (id, path) = (&self.id, self.path.display());
        let give_up = if id == DEFAULT_PROVIDER {
            format!("begin with an empty one there with flynn-host volume add-provider default {path}")
        } else {
            format!("give it up with flynn-host volume remove-provider {id}")
        };
        Err(Error::unavailable(format!(
            "the volumes of the provider {id} at {path} cannot be had ({why}): mount its disk there, or {give_up}"
        )))
    }

    /// In what form it keeps a volume with this limit.
    pub(super) fn form(&self, limit: Option<u64>) -> Form {
        match (self.kind, limit) {
            (ProviderKind::Btrfs, _) => Form::Subvolume,
            (ProviderKind::Zfs, _) => Form::Dataset,
            (ProviderKind::Dir, Some(_)) => Form::Image,
            (ProviderKind::Dir, None) => Form::Directory,
        }
    }

    /// The names in it: those of volumes, or those of what is unfinished.
    pub(super) fn names(&self, unfinished: bool) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let Ok(name) = entry?.file_name().into_string() else {
                continue;
            };
            let wanted = if unfinished {
                name.starts_with(UNFINISHED) || name.starts_with(REMOVED)
            } else {
                is_volume_id(&name)
            };
            if wanted {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Makes a pool of a device, which is a new file of this size if there is none.
fn make_pool(name: &str, device: &Path, size: Option<u64>) -> io::Result<()> {
    let (Some(size), false) = (size, device.exists()) else {
        return zfs::make_pool(name, device);
    };
    // It is all that volumes hold.
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(device)?;
    let made = file.set_len(size).and_then(|()| zfs::make_pool(name, device));
    if made.is_err() {
        let _ = std::fs::remove_file(device);
    }
    made
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// How the provider `default` keeps volumes, once its directory is marked.
    #[serde(default)]
    kind: Option<ProviderKind>,
    /// Where volumes of jobs are made.
    default: String,
    /// Those that were added.
    providers: Vec<Pool>,
}

/// All of them.
#[derive(Clone, Debug)]
pub(super) struct Pools {
    file: PathBuf,
    /// Where volumes of jobs are made.
    default: String,
    /// The one that every host has comes first.
    all: Vec<Pool>,
}

impl Pools {
    pub(super) fn open(paths: &Paths) -> io::Result<Self> {
        let file = paths.providers();
        let stored: Option<Stored> = files::read_json(&file)?;
        if stored.as_ref().is_some_and(|stored| stored.version > VERSION) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{}: a later release of flynn-host has made it: use that one",
                    file.display()
                ),
            ));
        }
        let (kind, default, added) = stored.map_or_else(
            || (None, DEFAULT_PROVIDER.to_owned(), Vec::new()),
            |stored| (stored.kind, stored.default, stored.providers),
        );
        let path = paths.volumes();
        let own = Pool {
            id: DEFAULT_PROVIDER.into(),
            kind: match kind {
                Some(kind) => kind,
                // Without the program the directory is as good as any.
                None if btrfs::is_on(&path)? && btrfs::is_there().is_ok() => ProviderKind::Btrfs,
                None => ProviderKind::Dir,
            },
            path,
            dataset: None,
        };
        let all = [own].into_iter().chain(added).collect();
        let pools = Self { file, default, all };
        // What is there at the first start is what has to be there at each.
        if kind.is_none() {
            pools.all[0].mark()?;
            pools.save()?;
        }
        Ok(pools)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pool> {
        self.all.iter()
    }

    pub(super) fn get(&self, id: &str) -> Result<&Pool> {
        let found = self.all.iter().find(|pool| pool.id == id);
        found.ok_or_else(|| {
            let mut error = Error::not_found("provider", id);
            error.message.push_str(": flynn-host volume providers lists them");
            error
        })
    }

    /// Where volumes of jobs are made.
    pub(super) fn default(&self) -> Result<&Pool> {
        self.get(&self.default)
    }

    pub(super) fn show(&self) -> Vec<Provider> {
        let show = |pool: &Pool| {
            let error = pool.check().err().map(|error| error.message);
            Provider {
                id: pool.id.clone(),
                kind: pool.kind,
                path: pool.path.display().to_string(),
                dataset: pool.dataset.clone(),
                default: pool.id == self.default,
                free: disk::space(&pool.path)
                    .ok()
                    .filter(|_| error.is_none())
                    .map(|(free, _)| free),
                error,
            }
        };
        self.all.iter().map(show).collect()
    }

    /// Puts one on the list. Repeated it does nothing, but to mark the directory of `default` anew.
    pub(super) fn add(&mut self, pool: Pool, default: bool) -> Result<()> {
        let marked = |error| disk_error("mark the provider's directory", &error);
        let id = pool.id.clone();
        match self.place(&pool)? {
            Some(0) => {
                pool.mark().map_err(marked)?;
                self.all[0].kind = pool.kind;
            }
            Some(_) => {}
            None => {
                pool.mark().map_err(marked)?;
                self.all.push(pool);
            }
        }
        if default {
            self.default = id;
        }
        self.keep()
    }

    /// Where this one is on the list, if it is. Refused is what may not be put there.
    pub(super) fn place(&self, pool: &Pool) -> Result<Option<usize>> {
        let Some(at) = self.all.iter().position(|there| there.id == pool.id) else {
            self.check_apart(pool)?;
            return Ok(None);
        };
        let there = &self.all[at];
        let same_path = || there.path.canonicalize().is_ok_and(|path| path == pool.path);
        if there == pool || at == 0 && pool.dataset.is_none() && same_path() {
            return Ok(Some(at));
        }
        Err(Error::new(
            ErrorCode::ObjectExists,
            format!("there is another provider {}: choose another name", pool.id),
        ))
    }

    /// Two providers have neither a directory nor a dataset in common, and none is among the other's volumes.
    fn check_apart(&self, pool: &Pool) -> Result<()> {
        for there in &self.all {
            if there.path.starts_with(&pool.path) || pool.path.starts_with(&there.path) {
                let (id, path) = (&there.id, there.path.display());
                let why = format!("the provider {id} is at {path}: take another directory");
                return Err(Error::invalid_field("path", why));
            }
            if let (Some(theirs), Some(ours)) = (&there.dataset, &pool.dataset)
                && (zfs::is_among(ours, theirs) || zfs::is_among(theirs, ours))
            {
                let id = &there.id;
                let why = format!("the provider {id} keeps its volumes in {theirs}: take another dataset");
                return Err(Error::invalid_field("dataset", why));
            }
        }
        Ok(())
    }

    /// Takes one off the list. What is there stays there.
    pub(super) fn remove(&mut self, id: &str) -> Result<()> {
        let pool = self.get(id)?;
        if id == DEFAULT_PROVIDER {
            return Err(Error::conflict(
                "the provider default is part of every host: it stays",
            ));
        }
        if pool.check().is_ok() {
            let names = pool
                .names(false)
                .map_err(|error| disk_error("list its volumes", &error))?;
            let volume = names
                .iter()
                .find(|name| pool.path.join(name).join("volume.json").exists());
            if let Some(volume) = volume {
                return Err(Error::conflict(format!(
                    "the provider {id} has volumes, {volume} among them: delete them first, or unmount its disk to \
                     take them with it"
                )));
            }
        }
        self.all.retain(|pool| pool.id != id);
        if self.default == id {
            DEFAULT_PROVIDER.clone_into(&mut self.default);
        }
        self.keep()
    }

    fn keep(&self) -> Result<()> {
        self.save()
            .map_err(|error| disk_error("keep the list of providers", &error))
    }

    fn save(&self) -> io::Result<()> {
        let stored = Stored {
            version: VERSION,
            kind: Some(self.all[0].kind),
            default: self.default.clone(),
            providers: self.all[1..].to_vec(),
        };
        files::write_json(&self.file, &stored)
    }
}
