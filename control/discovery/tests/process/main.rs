//! discoverd as processes: killed wherever it writes, without power, and with a disk that fills up.
//!
//! The test binary is also these processes.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod failpoints;
mod full_disk;
mod hosts;
mod ledger;
mod outages;
mod trap;
mod watch;

use std::process::{Command, Stdio};

use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> std::process::ExitCode {
    flynn_api::tls::install_provider();
    if let Some(code) = common::process::child(|| trap::install().unwrap()) {
        return code;
    }
    if std::env::var_os(trap::PROBE).is_some() {
        return trap::probed();
    }
    let arguments = Arguments::from_args();
    let (no_disk, no_watch) = (disk_tests_impossible(), trap::impossible());
    for (what, why) in [("a full disk", &no_disk), ("kills at each write", &no_watch)] {
        if let Some(why) = why {
            eprintln!("skipped: {what} ({why})");
        }
    }
    let trial = |name: &str, skipped: bool, test: fn()| {
        let test = move || {
            test();
            Ok::<_, Failed>(())
        };
        Trial::test(name, test).with_ignored_flag(skipped)
    };
    let watched = |name, test| trial(name, no_watch.is_some(), test);
    let trials = vec![
        trial("a full disk is waited out", no_disk.is_some(), full_disk::run),
        trial(
            "a full disk of the leader is not all's",
            no_disk.is_some(),
            full_disk::of_the_leader,
        ),
        trial("no acknowledged write is lost to kills", false, outages::kills),
        watched(
            "one member is killed wherever its store begins",
            failpoints::one_begins,
        ),
        watched("one member is killed wherever it writes", failpoints::one_writes),
        watched("failures to write are outlived", failpoints::failures),
        watched(
            "a member of three is killed wherever it writes",
            failpoints::three_write,
        ),
        watched(
            "nothing is answered before it is on disk",
            failpoints::answers_wait,
        ),
        watched(
            "a leader that lost the end of its log leads no more",
            failpoints::a_shorter_log,
        ),
        watched(
            "three members without power come back in any order",
            outages::three,
        ),
        watched("five members without power come back in any order", outages::five),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn disk_tests_impossible() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("a small file system needs root".to_owned());
    }
    let unshare = Command::new("unshare")
        .args(["--mount", "true"])
        .stderr(Stdio::null())
        .status();
    (!unshare.is_ok_and(|status| status.success())).then(|| "unshare(1) does not work here".to_owned())
}
