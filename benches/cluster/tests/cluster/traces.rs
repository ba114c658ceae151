//! What a lab must not leave behind.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

/// Sees that nothing on this machine is of the lab any more.
pub(crate) fn none(name: &str, dir: &Path) -> Result<()> {
    ensure!(!dir.exists(), "{} is still there", dir.display());
    let labs = flynn_lab::labs()?;
    ensure!(
        !labs.iter().any(|lab| lab == name),
        "a cgroup of the lab is still there"
    );
    let dir = dir.display().to_string();
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    ensure!(
        !mounts.contains(&dir) && !mounts.contains("flynn"),
        "mounts are still there:\n{mounts}"
    );
    let loops = fs::read_dir("/sys/block")?.filter_map(|entry| {
        fs::read_to_string(entry.ok()?.path().join("loop/backing_file"))
            .ok()
            .filter(|file| file.contains(&dir))
    });
    let loops: Vec<_> = loops.collect();
    ensure!(loops.is_empty(), "loop devices are still there: {loops:?}");
    // By their arguments, and by the directory in what they were told in their environment.
    let processes = fs::read_dir("/proc")?.filter_map(|entry| {
        let path = entry.ok()?.path();
        let told = ["cmdline", "environ"].map(|file| fs::read(path.join(file)).unwrap_or_default());
        let [line, environ] = told.map(|text| String::from_utf8_lossy(&text).replace('\0', " "));
        (line.contains(&dir) || environ.contains(&dir)).then_some(line)
    });
    let processes: Vec<_> = processes.collect();
    ensure!(processes.is_empty(), "processes are still there: {processes:?}");
    Ok(())
}
