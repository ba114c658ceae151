//! Programs that cargo builds, at versions that are known to work together.

use super::Need;
use super::ebpf::{self, Toolchain};
use crate::exec;
use anyhow::{Context, Result};
use std::process::Command;

/// One such program.
pub(super) struct Tool {
    pub(super) program: &'static str,
    version: &'static str,
    pub(super) why: &'static str,
    need: Need,
}

const TOOLS: &[Tool] = &[
    Tool {
        program: "bpf-linker",
        version: "0.13.0",
        why: "links eBPF programs",
        need: Need::Build,
    },
    Tool {
        program: "cargo-nextest",
        version: "0.9.143",
        why: "runs tests",
        need: Need::Test,
    },
    Tool {
        program: "cargo-deny",
        version: "0.20.2",
        why: "checks dependencies",
        need: Need::Test,
    },
];

/// The tools that are needed and not there.
pub(super) fn missing(needs: &[Need]) -> impl Iterator<Item = &'static Tool> {
    TOOLS
        .iter()
        .filter(|tool| needs.contains(&tool.need) && exec::find(tool.program).is_none())
}

/// Builds and installs one.
pub(super) fn install(tool: &Tool) -> Result<()> {
    let linker = tool.program == "bpf-linker";
    let toolchain = ebpf::toolchain();
    let mut command = if linker && toolchain == Some(Toolchain::Nightly) {
        // It must be built by the compiler whose LLVM it then uses.
        let mut command = Command::new("rustup");
        command
            .args(["run", "nightly", "cargo"])
            .env_remove("RUSTUP_TOOLCHAIN");
        command
    } else {
        exec::cargo()
    };
    command.args(["install", "--locked", tool.program, "--version", tool.version]);
    if exec::is_ci() {
        // Built in half the time; what it does there takes a second either way.
        command.arg("--debug");
    }
    if linker && toolchain == Some(Toolchain::Packaged) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let llvm_first =
            std::iter::once(format!("{}/bin", ebpf::LLVM).into()).chain(std::env::split_paths(&path));
        command
            .args(["--no-default-features", "--features", "llvm-22"])
            .env("LLVM_PREFIX", ebpf::LLVM)
            .env(
                "PATH",
                std::env::join_paths(llvm_first).context("PATH cannot be extended")?,
            )
            .env("RUSTFLAGS", format!("-L {}/lib", ebpf::LLVM));
    }
    exec::run(&mut command)
}
