//! Where things are in this checkout.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// The root of the checkout, known since this crate was compiled in it.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

/// Cargo's target directory; all that xtask makes is below it.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Where cargo puts what it builds, by profile: the target has a name (`.cargo/config.toml`).
pub(crate) fn built() -> PathBuf {
    target().join("x86_64-unknown-linux-gnu")
}

/// Where images go.
pub(crate) fn images() -> PathBuf {
    target().join("images")
}

/// Takes the lock that two runs of xtask must not hold at once; it is released when the file is dropped.
pub(crate) fn lock(path: &Path) -> Result<std::fs::File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    let file =
        std::fs::File::create(path).with_context(|| format!("cannot open the lock {}", path.display()))?;
    file.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
