//! The escape suite: what somebody would try who wants out of an ordinary job's container is refused there, and works
//! outside of one.
//!
//! Each case runs in containers of its own, made by the library as a supervisor makes them, with a user namespace and
//! without; no daemon, no network and no image tools are needed, so that the suite also runs in a virtual machine under
//! an older kernel.

#![expect(
    clippy::unwrap_used,
    clippy::cast_sign_loss,
    reason = "a test says what is wrong by panicking, and system calls take numbers of both kinds"
)]

mod cases;
mod ground;
mod images;
mod tricks;
mod users;

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use flynn_hostd::caps::Set;
use flynn_hostd::cgroup::{Hierarchies, Hierarchy};
use libtest_mimic::{Arguments, Trial};

use cases::{CASES, Case, Need};
use ground::Ground;

fn main() -> ExitCode {
    if let Some(code) = ground::role() {
        return code;
    }
    let arguments = Arguments::from_args();
    let lacking = lacks();
    let mut trials: Vec<Trial> = CASES
        .iter()
        .map(|case| {
            let lacking = lacking.clone().or_else(|| lacks_for(case));
            trial(case.name, lacking, move || refuses(case))
        })
        .collect();
    let others = [("programs_beside_the_job_s", beside as fn())];
    let others = others.into_iter().chain(images::TESTS.iter().copied());
    trials.extend(others.map(|(name, test)| trial(name, lacking.clone(), test)));
    let without_users = lacking.or_else(Ground::lacks_users);
    let of_users = users::TESTS.iter().copied();
    trials.extend(of_users.map(|(name, test)| trial(name, without_users.clone(), test)));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(name: &str, lacking: Option<String>, test: impl FnOnce() + Send + 'static) -> Trial {
    match lacking {
        None => Trial::test(name, move || {
            test();
            Ok(())
        }),
        Some(why) => Trial::test(name, || Ok(()))
            .with_kind(format!("skipped: {why}"))
            .with_ignored_flag(true),
    }
}

/// What the machine lacks for all of it.
fn lacks() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("root is needed".into());
    }
    let overlay =
        || std::fs::read_to_string("/proc/filesystems").is_ok_and(|known| known.contains("overlay"));
    if !overlay() {
        let load = Command::new("modprobe")
            .arg("overlay")
            .stderr(Stdio::null())
            .status();
        drop(load);
    }
    (!overlay()).then(|| "the kernel has no overlay".into())
}

/// What the machine lacks for one case.
fn lacks_for(case: &Case) -> Option<String> {
    let v2 = || Hierarchies::find().is_ok_and(|all| all.iter().any(Hierarchy::is_v2));
    let why = match case.needs {
        Need::File(path) if !Path::new(path).exists() => format!("the kernel has no {path}"),
        Need::Call(number) if tricks::is_missing(number) => format!("the kernel has no call {number}"),
        Need::Calls32 if !tricks::has_32_bits() => "the kernel takes no 32-bit calls".into(),
        Need::CgroupV2 if !v2() => "no cgroup v2 is mounted".into(),
        _ => return None,
    };
    Some(why)
}

/// The trick works outside, and is refused in a container.
fn refuses(case: &Case) {
    let mut ground = Ground::new(&["--try", case.name]);
    let asked = Set::of_names(case.capabilities).unwrap();
    ground.launch.capabilities = ground.launch.capabilities.union(asked);
    assert_eq!(
        ground.outside(case),
        [format!("{}: worked", case.name)],
        "outside"
    );
    is_refused(case, &ground.contain());
    // Who asks for capabilities has none.
    if case.capabilities.is_empty() && Ground::lacks_users().is_none() {
        is_refused(case, &Ground::new(&["--try", case.name]).with_users().contain());
    }
}

fn is_refused(case: &Case, said: &[String]) {
    let refused = format!("{}: refused ", case.name);
    assert!(
        said.len() == 1 && said[0].starts_with(&refused),
        "inside: {said:?}"
    );
}

/// A program that is started beside the job's own is no freer.
fn beside() {
    no_freer(Ground::new(&["--wait"]));
    if Ground::lacks_users().is_none() {
        no_freer(Ground::new(&["--wait"]).with_users());
    }
}

fn no_freer(mut ground: Ground) {
    ground.launch.limits.pids = 256;
    let cases: Vec<&str> = CASES
        .iter()
        .filter(|case| case.capabilities.is_empty() && lacks_for(case).is_none())
        .map(|case| case.name)
        .collect();
    let said = ground.execute(&[&["--try"], cases.as_slice()].concat());
    assert_eq!(said.len(), cases.len(), "{said:#?}");
    for (case, line) in cases.iter().zip(&said) {
        assert!(line.starts_with(&format!("{case}: refused ")), "{line}");
    }
    let said = ground.execute(&["--look", "fd"]);
    assert!(images::only_streams(&said), "{said:?}");
}
