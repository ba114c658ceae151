//! The lab: one to five hosts on one machine, with faults, for tests, benchmarks and `cargo xtask up`.
//!
//! In flows a [`LabConfig`]; out comes a [`Lab`], whose verbs boot hosts, run commands in them, start, kill and pause
//! what they run, cut and mend the links between them, and take their power away.
//!
//! A host has network, mount, UTS, IPC, PID and cgroup namespaces of its own, a bpffs at `/sys/fs/bpf`, a cgroup
//! subtree that it sees as an ordinary `/sys/fs/cgroup`, a disk at `/var/lib/flynn`, and an interface `eth0` to a switch.
//! The rest of its root file system is the machine's under an overlay in memory, so whatever it writes there is gone
//! with it.
//!
//! Who is who. The **keeper** is the lab's one lasting process: it has a mount namespace in which the disks are, holds
//! the switch, and answers on a socket in the state directory. Each host is a **monitor**, which makes the namespaces,
//! and under it the host's process 1. **Forwarders** carry connections from the machine's loopback. All of them are
//! this program, executed again; see [`reexec`].
//!
//! Invariants:
//! - The machine itself gets no interface, no mount and no route. What it gets is one cgroup per hierarchy and the
//!   state directory.
//! - Whichever process of the lab dies, the kernel takes what was below it: the keeper takes the lab, a monitor its
//!   host. What then remains, cgroups and files, [`clean`] removes by name.
//! - No process is cloned without being executed anew, and namespaces are made by processes of one thread.

mod cgroup;
mod clean;
mod client;
mod config;
mod disk;
mod host;
mod keeper;
mod making;
pub mod netns;
mod obstacle;
mod protocol;
mod stage;
mod switch;
mod tool;
mod wait;

pub use clean::{clean, labs};
pub use client::{Host, Lab};
pub use config::{Bind, Forward, LabConfig, MOST_HOSTS, Service, host_address, host_address6, host_name};
pub use obstacle::obstacle;
pub use protocol::{HostStatus, LabStatus};
pub use stage::reexec;
pub use wait::until;

/// Makes namespaces for the calling thread, which must be the process's only one where they concern all.
pub fn unshare(flags: rustix::thread::UnshareFlags) -> rustix::io::Result<()> {
    debug_assert!(!flags.contains(rustix::thread::UnshareFlags::FILES));
    // SAFETY: the one hazard of this call is in unsharing the table of file descriptors, which nobody here does.
    #[expect(unsafe_code, reason = "there is no safe form")]
    unsafe {
        rustix::thread::unshare_unsafe(flags)
    }
}
