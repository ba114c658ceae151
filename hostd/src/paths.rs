//! Where things are on a host.

use std::io;
use std::path::{Path, PathBuf};

use flynn_api::Digest;
use flynn_api::volume::DEFAULT_PROVIDER;

use crate::files;

/// The directory of what does not survive a boot.
pub const RUN: &str = "/run/flynn";

/// A host's directories.
#[derive(Clone, Debug)]
pub struct Paths {
    state: PathBuf,
}

impl Paths {
    /// Those below this state directory, made where they are missing.
    pub fn create(state: &Path) -> io::Result<Self> {
        // Absolute: supervisors run elsewhere.
        let paths = Self::at(&std::path::absolute(state)?);
        for dir in [
            paths.state(),
            &paths.jobs(),
            &paths.layers(),
            &paths.images(),
            &paths.volumes(),
        ] {
            files::private_dir(dir)?;
        }
        files::private_dir(&Path::new(RUN).join("jobs"))?;
        files::private_dir(&Self::layer_mounts())?;
        Ok(paths)
    }

    /// Those below this state directory, whether they are there or not.
    pub fn at(state: &Path) -> Self {
        Self {
            state: state.to_owned(),
        }
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// One directory per job.
    pub fn jobs(&self) -> PathBuf {
        self.state.join("jobs")
    }

    /// A job's directory.
    pub fn job(&self, id: &str) -> PathBuf {
        self.jobs().join(id)
    }

    /// The layer store.
    pub fn layers(&self) -> PathBuf {
        self.state.join("layers")
    }

    /// A layer in the store.
    pub fn layer(&self, digest: Digest) -> PathBuf {
        self.layers().join(format!("{digest}.squashfs"))
    }

    /// Image manifests.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Volumes.
    pub fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// The list of providers of volumes that were added.
    pub fn providers(&self) -> PathBuf {
        self.state.join("providers.json")
    }

    /// Where a volume of this provider is mounted that is a filesystem in a file.
    pub fn volume_mount(provider: &str, id: &str) -> PathBuf {
        let all = Path::new(RUN).join("volumes");
        if provider == DEFAULT_PROVIDER {
            return all.join(id);
        }
        // A name that no volume has.
        all.join(format!("@{provider}")).join(id)
    }

    /// This host's private key for WireGuard.
    pub fn wireguard_key(&self) -> PathBuf {
        self.state.join("wireguard.key")
    }

    /// The cluster network's documents, as they were seen last.
    pub fn network(&self) -> PathBuf {
        Self::network_of(&self.state)
    }

    /// The same, below this state directory.
    pub fn network_of(state: &Path) -> PathBuf {
        state.join("network")
    }

    /// Where layers are mounted.
    pub fn layer_mounts() -> PathBuf {
        Path::new(RUN).join("layers")
    }

    /// Where one layer is mounted.
    pub fn layer_mount(digest: Digest) -> PathBuf {
        Self::layer_mounts().join(digest.to_string())
    }

    /// A supervisor's socket.
    pub fn socket(id: &str) -> PathBuf {
        Path::new(RUN).join("jobs").join(format!("{id}.sock"))
    }
}
