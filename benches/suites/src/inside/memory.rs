//! The memory of each process, shared pages by the share.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// A process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its program, and what it runs as.
    pub(crate) name: String,
    /// Bytes.
    pub(crate) pss: u64,
    /// It is the platform's: neither PostgreSQL's, nor an app's, nor the lab's.
    pub(crate) platform: bool,
}

/// All processes of the host but this one.
pub(crate) fn measure() -> Result<Vec<Process>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let pid = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse::<u32>().ok());
        if pid.is_some_and(|pid| pid != std::process::id()) {
            processes.extend(process(&path));
        }
    }
    Ok(processes)
}

/// One process.
pub(crate) fn of_pid(pid: u32) -> Result<Process> {
    let gone = || format!("there is no process {pid}");
    process(Path::new(&format!("/proc/{pid}"))).with_context(gone)
}

/// `None` for kernel threads and for what ended meanwhile.
fn process(path: &Path) -> Option<Process> {
    let exe = fs::read_link(path.join("exe")).ok()?;
    let line = fs::read(path.join("cmdline")).ok()?;
    let (name, platform) = name(&exe, &line);
    let rollup = fs::read_to_string(path.join("smaps_rollup")).ok()?;
    Some(Process {
        name,
        pss: pss(&rollup)?,
        platform,
    })
}

/// What a process is called, and whether it is the platform's. Supervisors run a file that is nowhere in sight: they
/// go by what they call themselves.
fn name(exe: &Path, line: &[u8]) -> (String, bool) {
    let mut words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let called = words.next().unwrap_or_default().into_owned();
    let called = Path::new(&called)
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let program = exe.file_name().and_then(|name| name.to_str()).unwrap_or(called);
    let platform = ["flynn-host", "flynn-system"].contains(&program);
    match words.next().filter(|_| platform) {
        Some(role) => (format!("{program} {role}"), platform),
        None => (program.to_owned(), platform),
    }
}

/// The line `Pss:` of a `smaps_rollup`, in bytes.
fn pss(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^52")]
pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_read() {
        let rollup =
            "55ce-7ffd ---p 00000000 00:00 0    [rollup]\nRss:  1524 kB\nPss:   304 kB\nPss_Dirty: 100 kB\n";
        assert_eq!(pss(rollup), Some(304 * 1024));
        assert_eq!(pss(""), None);
        assert!(measure().is_ok());
    }

    #[test]
    fn the_platforms_processes_are_told_from_others() {
        let supervisor = name(Path::new("/"), b"flynn-host\0supervise\0/jobs/x\0");
        assert_eq!(supervisor, ("flynn-host supervise".into(), true));
        let component = name(Path::new("/usr/bin/flynn-system"), b"/bin/flynn-system\0router\0");
        assert_eq!(component, ("flynn-system router".into(), true));
        assert!(!name(Path::new("/run/flynn-lab/program"), b"flynn-lab:init\0").1);
        assert!(
            !name(
                Path::new("/usr/lib/postgresql/15/bin/postgres"),
                b"postgres: walwriter \0"
            )
            .1
        );
    }
}
