//! `cargo xtask build`: the binaries that run on hosts, statically linked.
//!
//! They have a target directory of their own, since the flag that makes them static would otherwise have every
//! development build start over.

use crate::setup::{self, Need};
use crate::{exec, ui, workspace};
use anyhow::Result;
use std::path::PathBuf;

/// The target is always named, for a static build without it breaks procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Which package makes which binary.
const BINARIES: [(&str, &str); 4] = [
    ("flynn-hostd", "flynn-host"),
    ("flynn-system", "flynn-system"),
    ("flynn-cli", "flynn"),
    ("flynn-lab", "flynn-lab"),
];

/// How to build.
#[derive(clap::Args, Clone, Copy, Default)]
pub(crate) struct Profile {
    /// Optimise (the default)
    #[arg(long, conflicts_with = "debug")]
    release: bool,
    /// Build faster and run slower, with debug assertions
    #[arg(long)]
    debug: bool,
}

impl Profile {
    /// The quick build.
    pub(crate) fn debug() -> Self {
        Self {
            release: false,
            debug: true,
        }
    }

    /// Where a binary of this build is.
    pub(crate) fn binary(self, name: &str) -> PathBuf {
        let profile = if self.debug { "debug" } else { "release" };
        workspace::target()
            .join("static")
            .join(TARGET)
            .join(profile)
            .join(name)
    }
}

/// Builds all static binaries.
pub(crate) fn run(profile: Profile) -> Result<()> {
    make(profile, &BINARIES)
}

/// Builds what a host runs without any image.
pub(crate) fn host(profile: Profile) -> Result<()> {
    make(profile, &BINARIES[..1])
}

fn make(profile: Profile, binaries: &[(&str, &str)]) -> Result<()> {
    setup::check(&[Need::Build])?;
    ui::timed("Building the static binaries", || {
        let mut cargo = exec::cargo();
        cargo
            .args(["build", "--locked", "--target", TARGET, "--target-dir"])
            .arg(workspace::target().join("static"))
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        if !profile.debug {
            cargo.arg("--release");
        }
        for (package, binary) in binaries {
            cargo.args(["--package", package, "--bin", binary]);
        }
        exec::run(&mut cargo)?;
        for (_, binary) in binaries {
            let path = profile.binary(binary);
            let size = path.metadata().map_or(0, |meta| meta.len());
            ui::note(&format!("{} ({})", path.display(), ui::megabytes(size)));
        }
        Ok(())
    })
}
