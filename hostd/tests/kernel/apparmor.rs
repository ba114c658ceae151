//! AppArmor's profile for jobs, where the kernel has AppArmor.

use std::fs;
use std::process::Command;

use flynn_api::host::label;

use crate::host::Host;

/// Why this machine cannot do that; none when it can.
pub(crate) fn lacks() -> Option<String> {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !enabled.is_ok_and(|enabled| enabled.starts_with('Y')) {
        return Some("the kernel has no AppArmor".into());
    }
    let parser = Command::new("apparmor_parser").arg("--version").output();
    parser.err().map(|error| format!("no apparmor_parser: {error}"))
}

pub(crate) async fn jobs_are_confined_and_the_platform_s_are_not() {
    let host = Host::boot().await;
    let status = host.api.status().await.unwrap();
    let apparmor = status.features.iter().find(|feature| feature.name == "apparmor");
    assert!(apparmor.unwrap().present, "{apparmor:?} {:?}", status.notices);
    let script = "cat /proc/self/attr/current; echo 0 > /proc/self/oom_score_adj && echo its own; \
                  echo x > /tmp/file && cat /tmp/file; exit 3";
    let (ended, lines) = host.script(script).await;
    assert_eq!(ended.exit_status, Some(3), "{ended:?}");
    assert_eq!(lines, ["flynn-job (enforce)", "its own", "x"]);

    // Without a user namespace nothing but the profile keeps a job from a signal to its init.
    let mut job = host.job("cat /proc/self/attr/current; kill -0 1 2>/dev/null && echo sent");
    job.config.host_user_namespace = true;
    let (_, lines) = host.finish(&job).await;
    assert_eq!(lines, ["flynn-job (enforce)"]);
    job.id += "-platform";
    job.metadata.insert(label::SYSTEM_APP.into(), "true".into());
    let (_, lines) = host.finish(&job).await;
    assert_eq!(lines, ["unconfined", "sent"]);

    // Nor is a program that is started beside it free.
    let standing = host.job("sleep 1000");
    host.run(&standing).await;
    let beside = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .args(["exec", &standing.id, "--", "cat", "/proc/self/attr/current"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&beside.stdout).trim(),
        "flynn-job (enforce)",
        "{beside:?}"
    );

    // Whoever tidies up removes it.
    let removed = Command::new("apparmor_parser")
        .args(["--remove", "/run/flynn/apparmor.profile"])
        .status();
    assert!(removed.unwrap().success());
    let (_, lines) = host.script("cat /proc/self/attr/current").await;
    assert_eq!(lines, ["flynn-job (enforce)"]);
}
