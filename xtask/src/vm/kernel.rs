//! Getting kernels: Debian's packages, unpacked and never installed.

use crate::{exec, workspace};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A series of kernels.
#[derive(Clone, Copy)]
pub(super) struct Series {
    /// Its name.
    pub(super) name: &'static str,
    /// The package that depends on its newest kernel.
    package: &'static str,
}

/// Those that the programs must work under, besides this machine's own.
pub(super) const SERIES: [Series; 2] = [
    Series {
        name: "6.1",
        package: "linux-image-cloud-amd64",
    },
    Series {
        name: "6.12",
        package: "linux-image-6.12-cloud-amd64",
    },
];

/// An unpacked kernel.
pub(super) struct Kernel {
    /// What `uname -r` says.
    pub(super) release: String,
    /// What is booted.
    pub(super) image: PathBuf,
    /// Its modules.
    pub(super) modules: PathBuf,
}

/// The newest kernel of a series, or the one that is here already when apt has none to offer.
pub(super) fn get(series: Series) -> Result<Kernel> {
    let directory = workspace::target().join("vm").join(series.name);
    match newest(series).and_then(|package| unpacked(&directory, &package)) {
        Ok(kernel) => Ok(kernel),
        Err(error) => latest_here(&directory).ok_or(error),
    }
}

/// The package with the kernel itself: what the series's package depends on.
fn newest(series: Series) -> Result<String> {
    let ask = || -> Result<Option<String>> {
        let text = exec::quiet(Command::new("apt-cache").args([
            "depends",
            "--no-recommends",
            "--no-suggests",
            series.package,
        ]))?;
        Ok(String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .map(str::to_owned))
    };
    if let Ok(Some(package)) = ask() {
        return Ok(package);
    }
    // A clean machine may have no lists yet.
    exec::quiet(Command::new("apt-get").args(["-qq", "update"]))?;
    ask()?.with_context(|| format!("apt knows no {}", series.package))
}

fn unpacked(directory: &Path, package: &str) -> Result<Kernel> {
    let root = directory.join(package);
    if let Some(kernel) = kernel_in(&root) {
        return Ok(kernel);
    }
    let aside = directory.join("unpacking");
    if aside.exists() {
        std::fs::remove_dir_all(&aside).with_context(|| format!("cannot remove {}", aside.display()))?;
    }
    std::fs::create_dir_all(&aside).with_context(|| format!("cannot make {}", aside.display()))?;
    exec::quiet(
        Command::new("apt-get")
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(&aside),
    )?;
    let archive = std::fs::read_dir(&aside)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt has downloaded no {package}"))?;
    exec::quiet(Command::new("dpkg-deb").arg("-x").args([&archive, &aside]))?;
    std::fs::remove_file(&archive)?;
    std::fs::rename(&aside, &root)?;
    kernel_in(&root).with_context(|| format!("there is no kernel in {package}"))
}

fn latest_here(directory: &Path) -> Option<Kernel> {
    let mut roots: Vec<PathBuf> = std::fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    roots.sort();
    roots.iter().rev().find_map(|root| kernel_in(root))
}

fn kernel_in(root: &Path) -> Option<Kernel> {
    let release = std::fs::read_dir(root.join("boot"))
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))?;
    let modules = root.join("lib/modules").join(&release);
    modules.is_dir().then(|| Kernel {
        image: root.join("boot").join(format!("vmlinuz-{release}")),
        modules,
        release,
    })
}

/// Puts those modules into a tree that a machine may need, with the tables by which they are found: the kernel then
/// loads them when they are first asked for, as on any host.
pub(super) fn stage_modules(kernel: &Kernel, root: &Path) -> Result<()> {
    const PARTS: [&str; 15] = [
        "kernel/net",
        "kernel/lib",
        "kernel/crypto",
        "kernel/arch/x86/crypto",
        "kernel/fs/overlayfs",
        "kernel/fs/squashfs",
        "kernel/fs/ext4",
        "kernel/fs/jbd2",
        "kernel/fs/mbcache.ko*",
        "kernel/fs/btrfs",
        "kernel/drivers/block/loop.ko*",
        "kernel/drivers/net/veth.ko*",
        "kernel/drivers/net/dummy.ko*",
        "kernel/drivers/net/vxlan",
        "kernel/drivers/net/wireguard",
    ];
    let to = root.join("lib/modules").join(&kernel.release);
    let builtin = std::fs::read_to_string(kernel.modules.join("modules.builtin"))?;
    for part in PARTS {
        let (from, to) = (kernel.modules.join(part), to.join(part));
        let parent = to.parent().context("a part has a parent")?;
        std::fs::create_dir_all(parent)?;
        if let Some(prefix) = part.strip_suffix('*') {
            let from = from.parent().context("a part has a parent")?;
            let name = Path::new(prefix)
                .file_name()
                .unwrap_or_default()
                .to_string_lossy();
            let mut found = false;
            for entry in std::fs::read_dir(from)? {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with(&*name) {
                    std::fs::copy(entry.path(), parent.join(entry.file_name()))?;
                    found = true;
                }
            }
            // What one kernel has as a module, another has within.
            if !found && !builtin.contains(prefix) {
                bail!("Linux {} has no module {name}", kernel.release);
            }
        } else if from.is_dir() {
            exec::quiet(Command::new("cp").arg("-r").args([&from, &to]))?;
        }
    }
    for table in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        std::fs::copy(kernel.modules.join(table), to.join(table))?;
    }
    exec::quiet(
        Command::new(exec::find("depmod").context("no depmod; `cargo xtask setup` installs kmod")?)
            .arg("-b")
            .arg(root)
            .arg(&kernel.release),
    )
    .map(drop)
}
