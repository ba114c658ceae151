//! A place of one's own for each test: a thread in a network and a mount namespace that nobody else has, with a BPF file
//! system. All of it is gone when the test is over, however it ends. (The overlay's tests begin here as well.)

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use libtest_mimic::{Arguments, Trial};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};
use tempfile::TempDir;

/// Runs tests by their names. Those which this machine does not let run are reported as ignored, with what they need as
/// their kind: all of them without root and these tools, and those for which `needs` says so.
pub(crate) fn main(
    tools: &[&str],
    needs: impl Fn(&str) -> Option<&'static str>,
    tests: &[(&str, fn())],
) -> ! {
    let all_need = if rustix::process::geteuid().is_root() {
        missing(tools)
    } else {
        Some("root")
    };
    let trial = |&(name, run): &(&str, fn())| {
        let trial = Trial::test(name, move || {
            run();
            Ok(())
        });
        let needed = all_need
            .or_else(|| needs(name))
            .map(|what| format!("needs {what}"));
        trial
            .with_ignored_flag(needed.is_some())
            .with_kind(needed.unwrap_or_default())
    };
    libtest_mimic::run(&Arguments::from_args(), tests.iter().map(trial).collect()).exit()
}

fn missing<'t>(tools: &[&'t str]) -> Option<&'t str> {
    tools
        .iter()
        .copied()
        .find(|tool| Command::new(tool).arg("-V").output().is_err())
}

/// Runs a test in a place of its own, with a directory that a BPF file system is mounted on.
pub(crate) fn alone(test: impl FnOnce(&Path) + Send + 'static) {
    let run = move || {
        unshare(UnshareFlags::NEWNET | UnshareFlags::NEWNS);
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let bpffs = TempDir::new().unwrap();
        mount("bpf", bpffs.path(), "bpf", MountFlags::empty(), None).unwrap();
        ip(&["link", "set", "lo", "up"]);
        test(bpffs.path());
    };
    joined(thread::spawn(run).join());
}

/// The result of a thread, or its panic with what it said.
pub(crate) fn joined<R>(result: thread::Result<R>) -> R {
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Where programs and maps are pinned.
pub(crate) fn pins(bpffs: &Path) -> PathBuf {
    bpffs.join("flynn")
}

/// Has iproute2 do something in the namespace of this thread.
pub(crate) fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Leaves namespaces that this thread shares with others.
pub(crate) fn unshare(flags: UnshareFlags) {
    // SAFETY: no flag which takes from a thread what others count on it to share: no files, no memory.
    unsafe { unshare_unsafe(flags) }.unwrap();
}
