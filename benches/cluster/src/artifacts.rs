//! What was built.

use std::path::{Path, PathBuf};

/// Where each thing is that a cluster is made of.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// The host's binary.
    pub flynn_host: PathBuf,
    /// The command line.
    pub flynn: PathBuf,
    /// Manifests and layers.
    pub images: PathBuf,
    /// An app that nobody here wrote, as a docker-archive.
    pub example: PathBuf,
    /// The chores' binary.
    pub xtask: PathBuf,
    /// Where labs have their state.
    pub labs: PathBuf,
    /// Binaries are not optimised.
    pub is_debug: bool,
}

impl Artifacts {
    /// Finds everything, or says what is missing and how it is got.
    pub fn find() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("a lab needs root, for its namespaces and mounts".into());
        }
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .unwrap_or(Path::new("."));
        let target = std::env::var_os("FLYNN_TARGET").map_or_else(|| checkout.join("target"), PathBuf::from);
        let target = std::path::absolute(&target).map_err(|why| format!("{}: {why}", target.display()))?;
        let built = target.join("x86_64-unknown-linux-gnu");
        let profile = std::env::var("FLYNN_PROFILE").unwrap_or_else(|_| "release".into());
        let binary = |name: &str| built.join(&profile).join(name);
        let images = target.join("images");
        let found = Self {
            flynn_host: binary("flynn-host"),
            flynn: binary("flynn"),
            xtask: built.join("debug/xtask"),
            example: images.join("example.docker.tar"),
            labs: target.join("lab"),
            is_debug: profile == "debug",
            images,
        };
        for path in [&found.flynn_host, &found.flynn, &found.xtask] {
            exists(path, "cargo xtask build")?;
        }
        for name in [
            "system.json",
            "postgres.json",
            "imaging.json",
            "example.docker.tar",
        ] {
            exists(&found.images.join(name), "cargo xtask image")?;
        }
        Ok(found)
    }
}

fn exists(path: &Path, maker: &str) -> Result<(), String> {
    if path.exists() {
        return Ok(());
    }
    Err(format!("there is no {}; `{maker}` makes it", path.display()))
}
