//! `flynn-host preflight`: whether this machine can be a host, before it is one and after.

mod firewall;
mod ports;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use flynn_api::server::disk;
use serde::Serialize;

use super::print_json;
use super::show::table;
use crate::cgroup::Hierarchies;
use crate::config::{self, HostConfig};
use crate::{notices, sys};

/// The oldest kernel that the tests run on.
const KERNEL: (u32, u32) = (6, 1);

/// Bytes of memory below which a host has room for little but itself.
const MEMORY: u64 = 2 << 30;

/// Free bytes that the state directory should have, and without which nothing starts.
const DISK: (u64, u64) = (20 << 30, 2 << 30);

/// What an uplink should carry: containers get what is left when their packets are put into others.
const MTU: (u32, u32) = (1500, 1350);

/// `flynn-host preflight`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// The address at which other hosts reach this one; the host's own, or that of the default route, unless given
    #[arg(long)]
    address: Option<Ipv4Addr>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    outcome: Outcome,
    /// What was found.
    found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Ok,
            found: found.into(),
            action: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, action: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Warn,
            action: Some(action.into()),
            ..Self::ok(name, found)
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, action: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Fail,
            ..Self::warn(name, found, action)
        }
    }
}

/// Looks, and says what it has found. It fails when a host could not work here.
///
/// # Errors
/// The answer cannot be written.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let checks = all(&args.state, args.address);
    if args.json {
        print_json(&checks)?;
    } else {
        println!("{}", show(&checks));
    }
    let failed = checks.iter().any(|check| check.outcome == Outcome::Fail);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn show(checks: &[Check]) -> String {
    let mut table = table(&["CHECK", "", "FOUND"]);
    for check in checks {
        let outcome = match check.outcome {
            Outcome::Ok => "ok",
            Outcome::Warn => "warn",
            Outcome::Fail => "FAIL",
        };
        table.add_row([check.name, outcome, &check.found]);
        if let Some(action) = &check.action {
            table.add_row(["", "", &format!("→ {action}")]);
        }
    }
    table.trim_fmt()
}

/// What there is to see, for others.
pub(super) fn look(state: &Path) -> impl Serialize {
    all(state, None)
}

fn all(state: &Path, address: Option<Ipv4Addr>) -> Vec<Check> {
    let own = HostConfig::peek(state).map(|config| config.address);
    let address = address.or(own).or_else(|| config::default_address().ok());
    let mut checks = vec![kernel(), machine(), disk_space(state), cgroups()];
    checks.push(filesystems());
    checks.extend(features());
    checks.extend([
        ports::free(),
        firewall::check(),
        clock(),
        uplink(address),
        forwarding(),
    ]);
    checks
}

fn kernel() -> Check {
    const NAME: &str = "kernel";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    match version(release) {
        Some(version) if version >= KERNEL => Check::ok(NAME, release),
        _ => Check::warn(
            NAME,
            format!(
                "{release:?} is older than {}.{}, the oldest that is tested",
                KERNEL.0, KERNEL.1
            ),
            "install a newer one",
        ),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn machine() -> Check {
    let (cpu, memory) = notices::machine();
    let found = format!("{} cores, {} MiB of memory", cpu / 1000, memory >> 20);
    if memory < MEMORY {
        return Check::warn(
            "machine",
            found,
            "a host of its own needs 2 GiB, and what its jobs need",
        );
    }
    Check::ok("machine", found)
}

/// Of the state directory, or of where it will be.
fn disk_space(state: &Path) -> Check {
    const NAME: &str = "disk";
    let mut there = state;
    while !there.exists() {
        let Some(parent) = there.parent() else { break };
        there = parent;
    }
    let free = match disk::space(there) {
        Ok((free, _)) => free,
        Err(error) => {
            return Check::fail(
                NAME,
                format!("{}: {error}", there.display()),
                "choose another --state",
            );
        }
    };
    let found = format!("{} GiB free at {}", free >> 30, there.display());
    match free {
        _ if free < DISK.1 => Check::fail(
            NAME,
            found,
            "layers, logs and volumes are kept there: give it 20 GiB",
        ),
        _ if free < DISK.0 => Check::warn(
            NAME,
            found,
            "layers, logs and volumes are kept there: give it 20 GiB",
        ),
        _ => Check::ok(NAME, found),
    }
}

fn cgroups() -> Check {
    const NAME: &str = "cgroups";
    match Hierarchies::find() {
        Err(error) => Check::fail(
            NAME,
            error.to_string(),
            "mount cgroup2 at /sys/fs/cgroup, as systemd does",
        ),
        Ok(hierarchies) => {
            let missing = hierarchies.notices();
            if missing.is_empty() {
                return Check::ok(NAME, "all that limits need is there");
            }
            Check::warn(
                NAME,
                missing.join("; "),
                "boot with cgroup v2 and all its controllers",
            )
        }
    }
}

fn filesystems() -> Check {
    const NAME: &str = "file systems";
    let missing = notices::missing_filesystems();
    if missing.is_empty() {
        return Check::ok(NAME, "the kernel has all that containers need");
    }
    let action = "install the kernel's modules (on Ubuntu linux-modules-extra)";
    Check::fail(
        NAME,
        format!("the kernel has no {}", missing.join(", no ")),
        action,
    )
}

fn features() -> Vec<Check> {
    let probed = flynn_dataplane::features::probe();
    let check = |(feature, present): (flynn_dataplane::features::Feature, bool)| {
        if present {
            return Check::ok(feature.name(), feature.purpose());
        }
        if feature.is_missed() {
            return Check::warn(feature.name(), feature.otherwise(), "a kernel that has it");
        }
        Check::ok(feature.name(), feature.otherwise())
    };
    probed.into_iter().map(check).collect()
}

fn clock() -> Check {
    const NAME: &str = "clock";
    let action = "have it set by the network: timedatectl set-ntp true, or install chrony. Certificates and leases go by it";
    match sys::clock_is_set() {
        Ok(true) => Check::ok(NAME, "it is set by the network"),
        Ok(false) => Check::warn(NAME, "nobody sets it", action),
        Err(error) => Check::warn(NAME, format!("it cannot be asked: {error}"), action),
    }
}

/// The interface that has the host's address.
fn uplink(address: Option<Ipv4Addr>) -> Check {
    const NAME: &str = "uplink";
    let Some(address) = address else {
        let action = "give --address: that at which the other hosts reach this one";
        return Check::fail(
            NAME,
            "this machine has no default route to tell its address by",
            action,
        );
    };
    let Some((name, mtu)) = interface_of(address) else {
        let action = "give --address: one that an interface of this machine has";
        return Check::fail(NAME, format!("no interface has {address}"), action);
    };
    let found = format!("{address} at {name}, packets of up to {mtu} bytes");
    match mtu {
        _ if mtu < MTU.1 => Check::fail(
            NAME,
            found,
            "IPv6 in containers needs 1350 at least: raise its MTU",
        ),
        _ if mtu < MTU.0 => Check::warn(
            NAME,
            found,
            "smaller packets cost throughput: raise its MTU if you can",
        ),
        _ => Check::ok(NAME, found),
    }
}

/// Its name and MTU.
fn interface_of(address: Ipv4Addr) -> Option<(String, u32)> {
    let addresses = std::process::Command::new("ip")
        .args(["-json", "-4", "address", "show"])
        .output()
        .ok()?;
    let all: serde_json::Value = serde_json::from_slice(&addresses.stdout).ok()?;
    let has = |interface: &&serde_json::Value| {
        let addresses = interface["addr_info"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        addresses.iter().any(|own| own["local"] == address.to_string())
    };
    let found = all.as_array()?.iter().find(has)?;
    let mtu = found["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok())?;
    Some((found["ifname"].as_str()?.to_owned(), mtu))
}

fn forwarding() -> Check {
    const NAME: &str = "forwarding";
    let writable = rustix::fs::access("/proc/sys/net/ipv4/ip_forward", rustix::fs::Access::WRITE_OK).is_ok();
    if writable {
        return Check::ok(NAME, "the daemon turns on what it needs");
    }
    let action = "run flynn-host outside of a container, or one with a writable /proc/sys/net";
    Check::fail(NAME, "/proc/sys/net cannot be written", action)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_kernels_are_read() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("6.18-rc1"), Some((6, 18)));
        assert_eq!(version("Linux"), None);
    }

    #[test]
    fn what_is_to_be_done_is_said_below_what_was_found() {
        let text = show(&[Check::ok("one", "well"), Check::fail("two", "badly", "mend it")]);
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        assert!(
            lines[2].contains("FAIL") && lines[3].contains("→ mend it"),
            "{text}"
        );
    }

    #[test]
    fn a_state_directory_that_is_to_be_made_has_its_parent_s_disk() {
        let dir = tempfile::tempdir().unwrap();
        let found = disk_space(&dir.path().join("not/yet")).found;
        assert!(found.ends_with(&dir.path().display().to_string()), "{found}");
    }
}
