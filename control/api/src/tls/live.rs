//! An identity in use, that follows its files: it is renewed while connections are made and taken.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::{ClientConfig, ServerConfig};

use super::{ClientAuth, Identity, TlsError};

/// An identity, and what is made of it.
pub struct Use {
    /// That.
    pub identity: Identity,
    /// For connections that come in.
    pub server: Arc<ServerConfig>,
    /// For connections that go out.
    pub client: Arc<ClientConfig>,
    version: Version,
}

/// Tells a file from the one that took its place within the same tick of the clock.
type Version = Option<(SystemTime, u64)>;

/// The identity in a directory.
pub struct Live {
    dir: PathBuf,
    auth: ClientAuth,
    current: RwLock<Arc<Use>>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Live {
    /// Reads it.
    pub fn open(dir: &Path, auth: ClientAuth) -> Result<Self, TlsError> {
        Ok(Self {
            dir: dir.to_owned(),
            auth,
            current: RwLock::new(Arc::new(load(dir, auth)?)),
        })
    }

    /// What is in use now.
    pub fn current(&self) -> Arc<Use> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes what is in the files, if the certificate is another by now: it is written last. Whether it is. What was in
    /// use stays so when the files cannot be used.
    pub fn look(&self) -> Result<bool, TlsError> {
        let there = version(&self.dir);
        if there.is_none() || there == self.current().version {
            return Ok(false);
        }
        self.set(load(&self.dir, self.auth)?);
        Ok(true)
    }

    /// Uses this one until there is another in the files.
    pub fn replace(&self, identity: Identity) -> Result<(), TlsError> {
        let version = self.current().version;
        self.set(made_of(identity, self.auth, version)?);
        Ok(())
    }

    fn set(&self, new: Use) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
    }
}

fn load(dir: &Path, auth: ClientAuth) -> Result<Use, TlsError> {
    // Before the content: what comes in between is looked at once more.
    let version = version(dir);
    made_of(Identity::load(dir)?, auth, version)
}

fn made_of(identity: Identity, auth: ClientAuth, version: Version) -> Result<Use, TlsError> {
    Ok(Use {
        server: identity.server_config(auth)?,
        client: identity.client_config()?,
        identity,
        version,
    })
}

fn version(dir: &Path) -> Version {
    let metadata = std::fs::metadata(dir.join("cert.pem")).ok()?;
    Some((metadata.modified().ok()?, metadata.ino()))
}
