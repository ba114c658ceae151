//! The compiler for eBPF: one that can build `core` for the kernel's target.
//!
//! Either rustup's nightly with its sources, or, where rustup has none to give, Debian's own compiler, which
//! comes with sources and is told by `RUSTC_BOOTSTRAP` to allow what nightly allows.

use crate::exec;
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The compilers that can build eBPF programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Toolchain {
    /// `rustup run nightly`, with rust-src
    Nightly,
    /// `/usr/bin/rustc` with rust-web-src
    Packaged,
}

/// Debian's packages for the second way; the LLVM is for building bpf-linker.
pub(super) const PACKAGES: &[&str] = &[
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "libxml2-dev",
];

/// Where the packaged LLVM is.
pub(super) const LLVM: &str = "/usr/lib/llvm-22";

/// Which one is there, nightly first.
pub(super) fn toolchain() -> Option<Toolchain> {
    let rustup = std::env::var_os("RUSTUP_HOME").map_or_else(|| exec::home().join(".rustup"), PathBuf::from);
    let nightly = rustup.join("toolchains/nightly-x86_64-unknown-linux-gnu");
    if has_sources(&nightly.join("lib")) {
        Some(Toolchain::Nightly)
    } else if Path::new("/usr/bin/rustc").exists() && has_sources(Path::new("/usr/lib")) {
        Some(Toolchain::Packaged)
    } else {
        None
    }
}

fn has_sources(lib: &Path) -> bool {
    lib.join("rustlib/src/rust/library/core/src/lib.rs").exists()
}

/// Gets nightly with its sources.
pub(super) fn install_nightly() -> Result<()> {
    exec::run(
        Command::new("rustup")
            .args([
                "toolchain",
                "install",
                "nightly",
                "--profile",
                "minimal",
                "--component",
                "rust-src",
            ])
            .env_remove("RUSTUP_TOOLCHAIN"),
    )
}
