//! `cargo xtask build`: the binaries that run on hosts, statically linked, as `.cargo/config.toml` has it for everything.

use crate::setup::{self, Need};
use crate::{exec, ui, workspace};
use anyhow::Result;
use std::path::PathBuf;

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
        workspace::built().join(self.name()).join(name)
    }

    /// What cargo calls its directory.
    pub(crate) fn name(self) -> &'static str {
        if self.debug { "debug" } else { "release" }
    }
}

/// Builds all binaries, and all tests, with what they have in common once.
pub(crate) fn everything() -> Result<()> {
    ui::timed("Building everything", || {
        exec::run(exec::cargo().args(["build", "--locked", "--workspace", "--all-targets"]))
    })
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
            .args(["build", "--locked"])
            // Whoever has flags of their own in the environment would get others than what hosts need.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        if profile.debug {
            // With a test, for what is in a package for tests alone is then built in, as it is for all tests: nothing is
            // built in two ways.
            cargo.args(["--workspace", "--bins", "--test", "lab"]);
        } else {
            cargo.arg("--release");
            for (package, binary) in binaries {
                cargo.args(["--package", package, "--bin", binary]);
            }
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
