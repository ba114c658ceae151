//! Where volumes are: the host's providers, each a directory.

use std::io;
use std::path::{Path, PathBuf};

use flynn_api::server::disk;
use flynn_api::volume::{DEFAULT_PROVIDER, NewProvider, Provider, ProviderKind};
use flynn_api::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use super::btrfs;
use super::record::{Form, UNFINISHED, is_volume_id};
use crate::files::{self, disk_error};
use crate::paths::Paths;

/// Marks the directory of a provider that was added: where it is missing, the disk is.
const MARK: &str = ".flynn-provider";

/// One provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pool {
    pub(super) id: String,
    pub(super) kind: ProviderKind,
    pub(super) path: PathBuf,
}

impl Pool {
    /// Why its volumes cannot be had now.
    pub(super) fn check(&self) -> Result<()> {
        let why = if self.id != DEFAULT_PROVIDER && !self.path.join(MARK).exists() {
            "its mark is not there"
        } else if self.kind == ProviderKind::Btrfs && !btrfs::is_on(&self.path).unwrap_or(false) {
            "no btrfs is there"
        } else {
            return Ok(());
        };
        Err(Error::unavailable(format!(
            "the volumes of the provider {} at {} cannot be had ({why}): mount its disk there, or give it up with \
             flynn-host volume remove-provider {}",
            self.id,
            self.path.display(),
            self.id
        )))
    }

    /// In what form it keeps a volume with this limit.
    pub(super) fn form(&self, limit: Option<u64>) -> Form {
        match (self.kind, limit) {
            (ProviderKind::Btrfs, _) => Form::Subvolume,
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
                name.starts_with(UNFINISHED)
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
    default: String,
    providers: Vec<Pool>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Pools {
    file: PathBuf,
    /// Where volumes of jobs are made.
    default: String,
    /// The one that every host has comes first.
    all: Vec<Pool>,
}

impl Pools {
    pub(super) fn open(paths: &Paths) -> io::Result<Self> {
        let path = paths.volumes();
        // Without the program the directory is as good as any.
        let kind = if btrfs::is_on(&path)? && btrfs::is_there().is_ok() {
            ProviderKind::Btrfs
        } else {
            ProviderKind::Dir
        };
        let own = Pool {
            id: DEFAULT_PROVIDER.into(),
            kind,
            path,
        };
        let file = paths.providers();
        let stored: Option<Stored> = files::read_json(&file)?;
        let (default, added) = stored.map_or_else(
            || (DEFAULT_PROVIDER.to_owned(), Vec::new()),
            |stored| (stored.default, stored.providers),
        );
        Ok(Self {
            file,
            default,
            all: [own].into_iter().chain(added).collect(),
        })
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

    pub(super) fn add(&mut self, new: &NewProvider) -> Result<()> {
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
        let pool = Pool {
            id: new.id.clone(),
            kind: new.kind,
            path,
        };
        if let Some(there) = self.all.iter().find(|there| there.id == pool.id) {
            if *there != pool {
                return Err(Error::new(
                    ErrorCode::ObjectExists,
                    format!("there is another provider {}: choose another name", pool.id),
                ));
            }
        } else {
            self.take(pool)?;
        }
        if new.default {
            self.default.clone_from(&new.id);
        }
        self.save()
    }

    fn take(&mut self, pool: Pool) -> Result<()> {
        let overlaps =
            |there: &&Pool| there.path.starts_with(&pool.path) || pool.path.starts_with(&there.path);
        if let Some(there) = self.all.iter().find(overlaps) {
            return Err(Error::invalid_field(
                "path",
                format!(
                    "the provider {} is at {}: take another directory",
                    there.id,
                    there.path.display()
                ),
            ));
        }
        if pool.kind == ProviderKind::Btrfs {
            let failed = |error| disk_error("look for btrfs", &error);
            if !btrfs::is_on(&pool.path).map_err(failed)? {
                let why = format!(
                    "{} is not on a btrfs: make one there with mkfs.btrfs and mount it, or say --kind dir",
                    pool.path.display()
                );
                return Err(Error::invalid_field("kind", why));
            }
            btrfs::is_there().map_err(|error| Error::invalid_field("kind", error))?;
        }
        files::write_json(&pool.path.join(MARK), &serde_json::json!({ "version": 1 }))
            .map_err(|error| disk_error("mark the provider's directory", &error))?;
        self.all.push(pool);
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
        self.save()
    }

    fn save(&self) -> Result<()> {
        let stored = Stored {
            version: 1,
            default: self.default.clone(),
            providers: self.all[1..].to_vec(),
        };
        files::write_json(&self.file, &stored)
            .map_err(|error| disk_error("keep the list of providers", &error))
    }
}
