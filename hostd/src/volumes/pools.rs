//! Where volumes are: the host's providers, each a directory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
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
    /// What is to be a provider.
    pub(super) fn new(new: &NewProvider) -> Result<Self> {
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
        let mut pool = Self {
            id: new.id.clone(),
            kind: new.kind,
            path,
            dataset: None,
        };
        match (new.kind, &new.dataset, &new.device) {
            (ProviderKind::Zfs, dataset, device) => {
                pool.prepare_zfs(dataset.as_deref(), device.as_deref(), new.size)?;
            }
            (_, None, None) => {}
            _ => {
                return Err(Error::invalid_field(
                    "kind",
                    "only a ZFS has a dataset or makes a pool of a device",
                ));
            }
        }
        Ok(pool)
    }

    /// Sees to it that its dataset is there, and mounted in its directory.
    fn prepare_zfs(&mut self, dataset: Option<&str>, device: Option<&str>, size: Option<u64>) -> Result<()> {
        let dataset = match (dataset, device) {
            (Some(dataset), None) => dataset.to_owned(),
            (None, Some(_)) => format!("flynn-{}", self.id),
            _ => {
                let rule = "a ZFS needs either a dataset, or a device of which a pool is made";
                return Err(Error::invalid_field("dataset", rule));
            }
        };
        if !zfs::is_name(&dataset) {
            return Err(Error::invalid_field("dataset", "is a name such as tank/flynn"));
        }
        zfs::is_there().map_err(|error| Error::invalid_field("kind", error))?;
        if let Some(device) = device {
            let device = Path::new(device);
            if !device.is_absolute() {
                return Err(Error::invalid_field("device", "is a path from / on"));
            }
            let make = || -> io::Result<()> {
                if let (Some(size), false) = (size, device.exists()) {
                    File::create_new(device)?.set_len(size)?;
                }
                zfs::make_pool(&dataset, device)
            };
            make().map_err(|error| Error::invalid_field("device", error))?;
        }
        self.dataset = Some(dataset);
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
        let at = self.all.iter().position(|there| there.id == id);
        let same_path = |there: &Pool| there.path.canonicalize().is_ok_and(|path| path == pool.path);
        match at {
            Some(0) if same_path(&self.all[0]) && pool.dataset.is_none() => {
                pool.mark().map_err(marked)?;
                self.all[0].kind = pool.kind;
            }
            Some(at) if self.all[at] == pool => {}
            Some(_) => {
                return Err(Error::new(
                    ErrorCode::ObjectExists,
                    format!("there is another provider {id}: choose another name"),
                ));
            }
            None => {
                self.check_apart(&pool)?;
                pool.mark().map_err(marked)?;
                self.all.push(pool);
            }
        }
        if default {
            self.default = id;
        }
        self.keep()
    }

    fn check_apart(&self, pool: &Pool) -> Result<()> {
        let overlaps =
            |there: &&Pool| there.path.starts_with(&pool.path) || pool.path.starts_with(&there.path);
        match self.all.iter().find(overlaps) {
            None => Ok(()),
            Some(there) => Err(Error::invalid_field(
                "path",
                format!(
                    "the provider {} is at {}: take another directory",
                    there.id,
                    there.path.display()
                ),
            )),
        }
    }

    /// Two providers have no dataset in common, and none is among the other's volumes.
    pub(super) fn check_datasets(&self, pool: &str, dataset: &str) -> Result<()> {
        let within = |inner: &str, outer: &str| {
            let rest = inner.strip_prefix(outer);
            inner == outer || rest.is_some_and(|rest| rest.starts_with(&format!("/{}", zfs::VOLUMES)))
        };
        let overlaps = |there: &&Pool| {
            let other = there.dataset.as_deref().filter(|_| there.id != pool);
            other.is_some_and(|other| within(dataset, other) || within(other, dataset))
        };
        match self.all.iter().find(overlaps) {
            None => Ok(()),
            Some(there) => Err(Error::invalid_field(
                "dataset",
                format!(
                    "the provider {} keeps its volumes in {}: take another dataset",
                    there.id,
                    there.dataset.as_deref().unwrap_or_default()
                ),
            )),
        }
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
