//! Capabilities: which a container has by default, and their names.

use serde::{Deserialize, Serialize};

/// A set of capabilities as the kernel counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Set(pub u64);

/// Names in the kernel's order.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The usual container's set without raw sockets (`ping` works without) and without device nodes (no device is
/// hidden from root by anything else on a host whose kernel has no device controller).
const DEFAULT: [&str; 12] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "AUDIT_WRITE",
    "SETFCAP",
];

impl Set {
    /// The set that a container has when nothing is asked for.
    pub fn default_container() -> Self {
        // Every name of the default set is in the table: see the test.
        Self::of_names(&DEFAULT).unwrap_or_default()
    }

    /// The set of these names, with or without `CAP_`, in any case. Fails with the first that is none.
    pub fn of_names<'a>(names: &[&'a str]) -> Result<Self, &'a str> {
        names.iter().try_fold(Self(0), |set, name| {
            let plain = name.to_ascii_uppercase();
            let plain = plain.strip_prefix("CAP_").unwrap_or(&plain);
            let bit = NAMES.iter().position(|known| *known == plain).ok_or(*name)?;
            Ok(Self(set.0 | 1 << bit))
        })
    }

    /// Both together.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The name of one that is in this set and not in the other; none when there is none.
    pub fn beyond(self, other: Self) -> Option<&'static str> {
        let number = usize::try_from((self.0 & !other.0).trailing_zeros()).ok()?;
        NAMES.get(number).copied()
    }

    /// Whether a capability is in it.
    pub fn contains(self, number: u32) -> bool {
        self.0 & 1 << number != 0
    }

    /// Whether this one, by its name, is in it.
    pub fn has(self, name: &str) -> bool {
        Self::of_names(&[name]).is_ok_and(|one| self.0 & one.0 == one.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_as_in_the_kernel() {
        assert_eq!(
            Set::of_names(&["CAP_CHOWN", "net_admin", "CHECKPOINT_RESTORE"]),
            Ok(Set(1 | 1 << 12 | 1 << 40))
        );
        assert_eq!(Set::of_names(&["CHOWN", "CAP_FLY"]), Err("CAP_FLY"));
        let default = Set::default_container();
        assert_eq!(default.0.count_ones(), 12);
        assert!(default.has("CAP_KILL") && !default.has("NET_RAW") && !default.has("MKNOD"));
    }
}
