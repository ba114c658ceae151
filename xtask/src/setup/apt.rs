//! Installing packages without starting what is in them.
//!
//! Debian's packages start their services on installation unless `/usr/sbin/policy-rc.d` says no. Where the
//! machine has such a policy, it stands. Where it has none, ours is there for the time of the installation, and
//! should we be killed meanwhile, it removes itself when it is next asked. Services that came with the
//! installation are also taken out of the boot: a developer's port 80 is not ours to take.

use crate::{exec, ui};
use anyhow::{Context, Result};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

const POLICY: &str = "/usr/sbin/policy-rc.d";
const MARK: &str = "# flynn xtask: no services during its installation";

/// Updates the package lists and installs.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    let services = Services::before();
    let _policy = Policy::forbid()?;
    ui::timed("Updating the package lists", || {
        exec::run(apt_get().arg("update"))
    })?;
    ui::timed(&format!("Installing {} packages", packages.len()), || {
        exec::run(
            apt_get()
                .args(["install", "--yes", "--no-install-recommends"])
                .args(packages),
        )
    })?;
    services.disable_new()
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("NEEDRESTART_MODE", "l")
        .arg("-qq");
    command
}

/// Our policy, while it stands.
struct Policy {
    ours: bool,
}

impl Policy {
    /// Puts a policy in place that forbids to start anything, unless there is a policy.
    fn forbid() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        let pid = std::process::id();
        let script =
            format!("#!/bin/sh\n{MARK}\nkill -0 {pid} 2>/dev/null && exit 101\nrm -f {POLICY}\nexit 0\n");
        let staged = format!("{POLICY}.flynn");
        std::fs::write(&staged, script).with_context(|| format!("cannot write {staged}"))?;
        std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o755))?;
        std::fs::rename(&staged, POLICY).with_context(|| format!("cannot write {POLICY}"))?;
        Ok(Self { ours: true })
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.ours {
            remove_stale_policy();
        }
    }
}

/// Removes a policy of ours that a killed installation left.
pub(super) fn remove_stale_policy() {
    if std::fs::read_to_string(POLICY).is_ok_and(|text| text.contains(MARK)) {
        // It removes itself when next asked, should this fail.
        let _ = std::fs::remove_file(POLICY);
    }
}

/// The services that start at boot, where systemd is in charge.
struct Services(Option<Vec<String>>);

impl Services {
    /// What is enabled before the installation.
    fn before() -> Self {
        Self(Path::new("/run/systemd/system").exists().then(enabled))
    }

    /// Disables what the installation enabled.
    fn disable_new(self) -> Result<()> {
        let Some(before) = self.0 else { return Ok(()) };
        let new: Vec<String> = enabled()
            .into_iter()
            .filter(|unit| !before.contains(unit))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        ui::note(&format!("not started at boot: {}", new.join(", ")));
        exec::quiet(Command::new("systemctl").arg("disable").args(&new)).map(drop)
    }
}

fn enabled() -> Vec<String> {
    let list = exec::quiet(Command::new("systemctl").args([
        "list-unit-files",
        "--type=service",
        "--state=enabled",
        "--no-legend",
        "--plain",
    ]));
    let text = list.unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}
