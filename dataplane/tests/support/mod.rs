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

/// Runs tests by their names, if this machine lets them; else they are reported as ignored, with the reason as their kind.
pub(crate) fn main(tools: &[&str], tests: &[(&str, fn())]) -> ! {
    let obstacle = obstacle(tools);
    if let Some(obstacle) = &obstacle {
        eprintln!("skipped: every test here {obstacle}");
    }
    let trial = |&(name, run): &(&str, fn())| {
        let trial = Trial::test(name, move || {
            run();
            Ok(())
        });
        trial
            .with_ignored_flag(obstacle.is_some())
            .with_kind(obstacle.clone().unwrap_or_default())
    };
    libtest_mimic::run(&Arguments::from_args(), tests.iter().map(trial).collect()).exit()
}

fn obstacle(tools: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".into());
    }
    let missing = |tool: &&&str| Command::new(tool).arg("-V").output().is_err();
    tools.iter().find(missing).map(|tool| format!("needs {tool}"))
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
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
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
