//! What this machine has, and what it cannot do.

use std::path::Path;

use flynn_api::host::KernelFeature;

/// What operators of more than one host have to know.
pub(crate) const PLAIN: &str = "traffic between hosts is not encrypted: who can listen on the network between them reads \
                                what apps say to each other. Connect the hosts by a network of their own, or have apps \
                                speak TLS";

/// The file systems without which there are no containers, and that the kernel has not.
pub(crate) fn missing_filesystems() -> Vec<&'static str> {
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |name: &str| {
        filesystems
            .lines()
            .any(|line| line.split_whitespace().last() == Some(name))
    };
    let mut missing = vec!["overlay", "squashfs"];
    // A module may come when it is asked for; then mounting it will say more.
    missing.retain(|name| !has(name) && !module_can_come(name));
    missing
}

/// What the kernel lacks, and what that means.
pub(crate) fn of_kernel() -> Vec<String> {
    let mut notices = Vec::new();
    for name in missing_filesystems() {
        notices.push(format!("no containers: the kernel has no {name} file system"));
    }
    notices
}

/// What the kernel has of what the network makes use of, and what the operator misses without the rest.
pub(crate) fn of_network() -> (Vec<KernelFeature>, Vec<String>) {
    let probed = flynn_dataplane::features::probe();
    let missed = probed
        .iter()
        .filter(|(feature, present)| !present && feature.is_missed())
        .map(|(feature, _)| format!("{}: the kernel has no {}", feature.otherwise(), feature.name()))
        .collect();
    let features = probed
        .into_iter()
        .map(|(feature, present)| KernelFeature {
            name: feature.name().into(),
            present,
            detail: if present {
                feature.purpose()
            } else {
                feature.otherwise()
            }
            .into(),
        })
        .collect::<Vec<_>>();
    let with = |present| {
        let names: Vec<&str> = features
            .iter()
            .filter(|feature: &&KernelFeature| feature.present == present)
            .map(|feature| feature.name.as_str())
            .collect();
        names.join(" ")
    };
    tracing::info!(used = with(true), missing = with(false), "kernel features");
    (features, missed)
}

fn module_can_come(name: &str) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release.trim()).join("modules.dep");
    std::fs::read_to_string(modules).is_ok_and(|list| list.contains(&format!("/{name}.ko")))
}

/// Thousandths of cores, and bytes of memory.
pub(crate) fn machine() -> (u64, u64) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
    });
    (cores * 1000, kib.unwrap_or(0) * 1024)
}
