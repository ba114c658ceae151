//! Which packages each need stands for, and which of them are there.

use super::Need;
use crate::exec;
use anyhow::{Context, Result, bail};
use std::collections::HashSet;
use std::process::{Command, Stdio};

/// The systems that setup knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum System {
    /// Debian 12
    Debian,
    /// Ubuntu 24.04
    Ubuntu,
}

impl System {
    /// Which one this is.
    pub(super) fn detect() -> Result<Self> {
        let text = std::fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        Self::parse(&text)
    }

    fn parse(os_release: &str) -> Result<Self> {
        let field = |name: &str| {
            os_release
                .lines()
                .filter_map(|line| line.split_once('='))
                .find(|(key, _)| *key == name)
                .map_or("", |(_, value)| value.trim_matches('"'))
        };
        match (field("ID"), field("VERSION_ID")) {
            ("debian", "12") => Ok(Self::Debian),
            ("ubuntu", "24.04") => Ok(Self::Ubuntu),
            (id, version) => bail!(
                "this is {id} {version}; Flynn is developed on Debian 12 and Ubuntu 24.04 \
                 (docs/contributing.md lists what is needed, should you want to try elsewhere)"
            ),
        }
    }

    /// Whether the distribution has a Rust compiler that is new enough for eBPF; else rustup has.
    pub(super) fn prefers_packaged_ebpf(self) -> bool {
        self == Self::Debian
    }

    /// The PostgreSQL that the distribution has.
    fn postgresql(self) -> &'static str {
        match self {
            Self::Debian => "postgresql-15",
            Self::Ubuntu => "postgresql-16",
        }
    }
}

/// Package, what it is for, who needs it.
const PACKAGES: &[(&str, &str, Need)] = &[
    ("gcc", "compiles and links", Need::Build),
    ("libc6-dev", "C library to link with", Need::Build),
    ("make", "builds libbpf", Need::Build),
    ("pkg-config", "finds libraries", Need::Build),
    ("libelf-dev", "reads eBPF objects", Need::Build),
    ("zlib1g-dev", "needed by libelf", Need::Build),
    ("mmdebstrap", "makes root file systems", Need::Images),
    (
        "debian-archive-keyring",
        "verifies Debian's packages",
        Need::Images,
    ),
    ("squashfs-tools", "makes image layers", Need::Images),
    ("skopeo", "makes the example's docker-archive", Need::Images),
    ("umoci", "makes the example's image", Need::Images),
    ("iproute2", "connects the lab's hosts", Need::Lab),
    ("nftables", "cuts the lab's links", Need::Lab),
    ("btrfs-progs", "makes the lab's disk pool", Need::Lab),
    ("e2fsprogs", "makes the lab's disks", Need::Lab),
    ("mount", "mounts the lab's disks", Need::Lab),
    ("curl", "asks what runs in the lab", Need::Test),
    ("busybox-static", "what test containers run", Need::Test),
    ("docker.io", "what images are pushed from", Need::Test),
    ("procps", "finds processes in the lab", Need::Test),
    ("rsyslog", "takes logs", Need::Test),
    ("runc", "a peer of the benchmarks", Need::Bench),
    ("nginx", "a peer of the benchmarks", Need::Bench),
    ("haproxy", "a peer of the benchmarks", Need::Bench),
    ("knot", "a peer of the benchmarks", Need::Bench),
    ("unbound", "a peer of the benchmarks", Need::Bench),
    ("etcd-server", "a peer of the benchmarks", Need::Bench),
    ("dnsperf", "makes load for benchmarks", Need::Bench),
    ("wrk", "makes load for benchmarks", Need::Bench),
    ("iperf3", "makes load for benchmarks", Need::Bench),
    ("qemu-system-x86", "boots other kernels", Need::Vm),
    ("cpio", "packs what they boot into", Need::Vm),
    ("kmod", "loads their modules", Need::Vm),
    ("busybox-static", "is their user space", Need::Vm),
    ("iproute2", "connects namespaces in them", Need::Vm),
    ("nftables", "masquerades in them", Need::Vm),
    ("squashfs-tools", "makes image layers in them", Need::Vm),
    ("e2fsprogs", "makes volumes with limits in them", Need::Vm),
    ("btrfs-progs", "makes volumes with snapshots in them", Need::Vm),
    ("apparmor", "confines jobs in them", Need::Vm),
];

/// Those of Debian alone: Ubuntu's kernel has a ZFS, whose programs do not go with these.
const DEBIAN: &[(&str, &str, Need)] = &[
    ("zfs-fuse", "the ZFS that volumes are tested on", Need::Test),
    ("zfs-fuse", "the ZFS that snapshots are measured on", Need::Bench),
];

/// The packages that are needed and not installed, with what they are for.
pub(super) fn missing(system: System, needs: &[Need]) -> Result<Vec<(String, &'static str)>> {
    let postgres = (
        system.postgresql(),
        "the database that tests run against",
        Need::Test,
    );
    let wanted: Vec<_> = PACKAGES
        .iter()
        .chain([&postgres])
        .chain(DEBIAN.iter().filter(|_| system == System::Debian))
        .filter(|(_, _, need)| needs.contains(need))
        .collect();
    let names: Vec<&str> = wanted.iter().map(|(name, _, _)| *name).collect();
    let absent: HashSet<String> = not_installed(&names)?.into_iter().collect();
    Ok(wanted
        .into_iter()
        .filter(|(name, _, _)| absent.contains(*name))
        .map(|(name, why, _)| ((*name).to_owned(), *why))
        .collect())
}

/// Which of these packages dpkg does not have installed.
pub(super) fn not_installed(names: &[&str]) -> Result<Vec<String>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let dpkg = exec::find("dpkg-query").context("no dpkg-query here; is this Debian?")?;
    // It exits with 1 when any is unknown, which is an answer and no failure.
    let output = Command::new(dpkg)
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\\n"])
        .args(names)
        .stderr(Stdio::null())
        .output()
        .context("cannot run dpkg-query")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let installed: HashSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    Ok(names
        .iter()
        .filter(|name| !installed.contains(**name))
        .map(|name| (*name).to_owned())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_are_told_apart() {
        let debian = "PRETTY_NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n";
        assert_eq!(System::parse(debian).unwrap(), System::Debian);
        assert_eq!(
            System::parse("ID=ubuntu\nVERSION_ID=\"24.04\"\n").unwrap(),
            System::Ubuntu
        );
        let error = System::parse("ID=fedora\nVERSION_ID=44\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("fedora 44"), "{error}");
    }

    #[test]
    fn an_unknown_package_is_not_installed() {
        let names = ["dpkg", "no-such-package-as-this"];
        assert_eq!(not_installed(&names).unwrap(), ["no-such-package-as-this"]);
    }
}
