//! Removing what a lab left, however it ended, and seeing that it is gone.

use crate::cgroup::{self, Group};
use crate::config::check_name;
use crate::making::alone;
use crate::wait::until;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The names of the labs that there are, or that were and left something.
pub fn labs() -> Result<Vec<String>> {
    cgroup::labs()
}

/// Kills what is left of a lab, removes its cgroups and its state directory, and fails if anything of it remains:
/// a process, a cgroup, a mount in any namespace, or a loop device.
pub fn clean(name: &str, dir: &Path) -> Result<()> {
    check_name(name)?;
    // One that is in the making comes to be first, and nobody makes one of this name meanwhile.
    let _alone = alone(dir)?;
    let group = Group::lab(name)?;
    group.kill()?;
    group.remove()?;
    // Mounts and loop devices go with the last process, or a moment later.
    until(Duration::from_secs(20), "the lab's disks to be let go", || {
        Ok(loops_below(dir)?.is_empty())
    })?;
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
        }
        _ => {}
    }
    if group.exists() {
        bail!("cgroups of the lab {name} are left");
    }
    if let Some((pid, mount)) = mount_below(dir) {
        bail!("process {pid} has {} mounted still", mount.display());
    }
    Ok(())
}

/// Loop devices whose file is below `dir`, or was.
fn loops_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").context("cannot list block devices")? {
        let path = entry?.path();
        // Most have none.
        if let Ok(file) = fs::read_to_string(path.join("loop/backing_file"))
            && Path::new(file.trim_end()).starts_with(dir)
        {
            found.push(path);
        }
    }
    Ok(found)
}

/// A mount at or below `dir` in any process's namespace.
fn mount_below(dir: &Path) -> Option<(String, PathBuf)> {
    for entry in fs::read_dir("/proc").ok()? {
        let entry = entry.ok()?;
        // Processes come and go while we look.
        let Ok(text) = fs::read_to_string(entry.path().join("mountinfo")) else {
            continue;
        };
        let mount = text
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .find(|at| Path::new(at).starts_with(dir));
        if let Some(at) = mount {
            return Some((entry.file_name().to_string_lossy().into_owned(), at.into()));
        }
    }
    None
}
