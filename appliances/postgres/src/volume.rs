//! The data volume: whose it is, and that nobody else uses it.
//!
//! | path | what |
//! | --- | --- |
//! | `lock` | locked by the one process, and its server, that uses the volume |
//! | `peer.json` | the peer's identity, which outlives jobs and addresses |
//! | `pg/` | the database |
//! | `pg.new/` | a database that is being made |
//! | `run/` | the server's Unix socket |

use std::fs::{self, File, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::user::User;

/// The version of [`Record`] that this release writes.
const RECORD_VERSION: u32 = 1;

/// What `peer.json` holds.
#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    id: String,
}

/// The volume, locked for this process.
#[derive(Debug)]
pub(crate) struct Volume {
    dir: PathBuf,
    lock: File,
    /// The peer's identity.
    pub(crate) id: String,
}

impl Volume {
    /// Locks the volume, waiting for whoever has it, clears away what a dead process left, and reads the identity.
    pub(crate) async fn open(dir: &Path, user: &User) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::file("cannot make", dir))?;
        // The server's user owns the volume; its processes must get to `pg` and `run`, and nobody else has to.
        user.own(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
            .map_err(Error::file("cannot restrict", dir))?;
        let path = dir.join("lock");
        let lock = File::create(&path).map_err(Error::file("cannot open", &path))?;
        wait_for(&lock, &path).await?;

        // From here on nobody else is at work: these belong to processes that are no more. Their process ids may be in
        // use again, by us even, so the server must not go by them.
        let volume = Self {
            dir: dir.to_owned(),
            lock,
            id: identity(dir)?,
        };
        remove_file(&volume.database().join("postmaster.pid"))?;
        for left in [volume.sockets(), volume.unfinished()] {
            remove_dir(&left)?;
        }
        let sockets = volume.sockets();
        fs::create_dir(&sockets).map_err(Error::file("cannot make", &sockets))?;
        user.own(&sockets)?;
        Ok(volume)
    }

    /// The database.
    pub(crate) fn database(&self) -> PathBuf {
        self.dir.join("pg")
    }

    /// Whether there is one.
    pub(crate) fn has_database(&self) -> bool {
        self.database().join("PG_VERSION").exists()
    }

    /// Where a database is made.
    pub(crate) fn unfinished(&self) -> PathBuf {
        self.dir.join("pg.new")
    }

    /// Makes what is in [`Volume::unfinished`] the database.
    pub(crate) fn adopt(&self) -> Result<(), Error> {
        let (from, to) = (self.unfinished(), self.database());
        fs::rename(&from, &to).map_err(Error::file("cannot move", &from))?;
        sync(&self.dir)
    }

    /// Where the server's Unix socket is.
    pub(crate) fn sockets(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The lock, to be some process's standard input: it is held until the last process that has it is gone.
    pub(crate) fn held(&self) -> Result<Stdio, Error> {
        let lock = self
            .lock
            .try_clone()
            .map_err(Error::file("cannot share the lock of", &self.dir))?;
        Ok(lock.into())
    }
}

async fn wait_for(lock: &File, path: &Path) -> Result<(), Error> {
    let mut waited = false;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {
                if !waited {
                    tracing::warn!(path = %path.display(), "the volume is in use by another process; waiting for its end");
                }
                waited = true;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(TryLockError::Error(source)) => return Err(Error::file("cannot lock", path)(source)),
        }
    }
}

/// Reads the identity; makes one on a new volume.
fn identity(dir: &Path) -> Result<String, Error> {
    let path = dir.join("peer.json");
    let why = |why: String| Error::Record {
        path: path.clone(),
        why,
    };
    match fs::read(&path) {
        Ok(bytes) => {
            let record: Record = serde_json::from_slice(&bytes).map_err(|error| why(error.to_string()))?;
            if record.version > RECORD_VERSION {
                return Err(why(format!(
                    "its version is {}, made by a newer release",
                    record.version
                )));
            }
            Ok(record.id)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let record = Record {
                version: RECORD_VERSION,
                id: uuid::Uuid::new_v4().to_string(),
            };
            let bytes = serde_json::to_vec(&record).map_err(|error| why(error.to_string()))?;
            let new = dir.join("peer.json.new");
            let write = || -> std::io::Result<()> {
                let mut file = File::create(&new)?;
                file.write_all(&bytes)?;
                file.sync_all()?;
                fs::rename(&new, &path)
            };
            write().map_err(Error::file("cannot write", &new))?;
            sync(dir)?;
            Ok(record.id)
        }
        Err(error) => Err(Error::file("cannot read", &path)(error)),
    }
}

fn sync(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::file("cannot sync", dir))
}

fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("cannot remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes a directory with all in it, if it is there.
pub(crate) fn remove_dir(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("cannot remove", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_identity_stays_and_what_dead_processes_left_goes() {
        let dir = tempfile::tempdir().unwrap();
        let user = User::find().unwrap();
        let first = Volume::open(dir.path(), &user).await.unwrap();
        let id = first.id.clone();
        fs::create_dir(first.database()).unwrap();
        fs::write(first.database().join("postmaster.pid"), "1\n").unwrap();
        fs::create_dir(first.unfinished()).unwrap();
        fs::write(first.sockets().join(".s.PGSQL.5432.lock"), "1\n").unwrap();
        drop(first);
        let second = Volume::open(dir.path(), &user).await.unwrap();
        assert_eq!(second.id, id);
        assert!(!second.database().join("postmaster.pid").exists() && !second.unfinished().exists());
        assert_eq!(fs::read_dir(second.sockets()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_volume_in_use_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let user = User::find().unwrap();
        let first = Volume::open(dir.path(), &user).await.unwrap();
        let mut second = std::pin::pin!(Volume::open(dir.path(), &user));
        assert!(
            tokio::time::timeout(Duration::from_millis(50), second.as_mut())
                .await
                .is_err()
        );
        drop(first);
        second.await.unwrap();
    }

    #[tokio::test]
    async fn a_record_of_a_newer_release_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("peer.json"), r#"{"version":9,"id":"x"}"#).unwrap();
        let error = Volume::open(dir.path(), &User::find().unwrap())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("newer release"), "{error}");
    }
}
