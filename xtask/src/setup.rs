//! `cargo xtask setup`: installs what is missing on Debian 12 and Ubuntu 24.04, after saying what and why.
//!
//! Every other command calls [`check`] first, which takes milliseconds when all is there and installs nothing
//! without a yes. Packages never start services here: see [`apt`].

mod apt;
mod ebpf;
mod packages;
mod tools;

use crate::{exec, ui};
use anyhow::{Result, bail};
use std::fmt::Write as _;
use std::io::{BufRead, IsTerminal, Write};

/// What a command needs of the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A C compiler, libelf, the eBPF toolchain
    Build,
    /// What makes images
    Images,
    /// What makes hosts out of namespaces
    Lab,
    /// What the tests use besides
    Test,
    /// The peers that benchmarks compare with
    Bench,
    /// What boots other kernels
    Vm,
}

/// All of them.
const ALL: [Need; 6] = [
    Need::Build,
    Need::Images,
    Need::Lab,
    Need::Test,
    Need::Bench,
    Need::Vm,
];

/// How to set up.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install without asking (also with CI=true in the environment)
    #[arg(long)]
    yes: bool,
}

/// One thing that is missing, and how it is got.
enum Missing {
    /// A Debian package and what it is for
    Package { name: String, why: &'static str },
    /// Nightly Rust with its sources, by rustup
    NightlyRust,
    /// A program that cargo builds
    Tool(&'static tools::Tool),
}

/// Installs whatever any command needs.
pub(crate) fn run(args: &Args) -> Result<()> {
    provide(&ALL, args.yes)?;
    ui::step("Everything is installed");
    Ok(())
}

/// Sees that what is needed is there; asks and installs when it is not.
pub(crate) fn check(needs: &[Need]) -> Result<()> {
    provide(needs, false)
}

/// The same with the consent given beforehand.
pub(crate) fn provide(needs: &[Need], yes: bool) -> Result<()> {
    apt::remove_stale_policy();
    let missing = missing(needs)?;
    if missing.is_empty() {
        return Ok(());
    }
    ui::step("Missing on this machine:");
    for item in &missing {
        ui::note(&item.described());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("installing needs root; run `cargo xtask setup` as root, or install the above by hand");
    }
    consent(yes)?;
    install(&missing)?;
    let left = self::missing(needs)?;
    if !left.is_empty() {
        let mut list = String::new();
        for item in &left {
            write!(list, "\n  {}", item.described())?;
        }
        bail!("still missing after the installation:{list}\ninstall it by hand and run the command again");
    }
    Ok(())
}

/// What is not there of what is needed.
fn missing(needs: &[Need]) -> Result<Vec<Missing>> {
    let system = packages::System::detect()?;
    let mut missing: Vec<Missing> = packages::missing(system, needs)?
        .into_iter()
        .map(|(name, why)| Missing::Package { name, why })
        .collect();
    if needs.contains(&Need::Build) && ebpf::toolchain().is_none() {
        if system.prefers_packaged_ebpf() {
            missing.extend(packages::not_installed(ebpf::PACKAGES)?.into_iter().map(|name| {
                Missing::Package {
                    name,
                    why: "a Rust compiler with its sources, for eBPF",
                }
            }));
        } else {
            missing.push(Missing::NightlyRust);
        }
    }
    missing.extend(tools::missing(needs).map(Missing::Tool));
    Ok(missing)
}

/// Asks for a yes on the terminal, unless it was given.
fn consent(yes: bool) -> Result<()> {
    if yes || exec::is_ci() {
        return Ok(());
    }
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        bail!("not installing without a yes; run `cargo xtask setup --yes`");
    }
    eprint!("Install it? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    if !matches!(answer.trim(), "y" | "Y" | "yes") {
        bail!("not installed; run the command again to be asked again");
    }
    Ok(())
}

/// Installs in the order in which things need each other.
fn install(missing: &[Missing]) -> Result<()> {
    let packages: Vec<&str> = missing
        .iter()
        .filter_map(|item| match item {
            Missing::Package { name, .. } => Some(name.as_str()),
            _ => None,
        })
        .collect();
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    if missing.iter().any(|item| matches!(item, Missing::NightlyRust)) {
        ui::timed("Installing nightly Rust with its sources", ebpf::install_nightly)?;
    }
    for item in missing {
        if let Missing::Tool(tool) = item {
            ui::timed(&format!("Building {}", tool.program), || tools::install(tool))?;
        }
    }
    Ok(())
}

impl Missing {
    /// One line: what and why.
    fn described(&self) -> String {
        match self {
            Self::Package { name, why } => format!("{name:<24} {why} (Debian package)"),
            Self::NightlyRust => {
                format!(
                    "{:<24} a compiler with its sources, for eBPF (rustup)",
                    "nightly + rust-src"
                )
            }
            Self::Tool(tool) => format!("{:<24} {} (cargo install)", tool.program, tool.why),
        }
    }
}
