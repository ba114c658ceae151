//! The operator's commands at a host that runs.

use std::fs;
use std::process::{Command, Output};

use flynn_api::host::{JobState, label};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use crate::host::{BINARY, Host, kill, lives};

fn flynn_host(args: &[&str]) -> Output {
    Command::new(BINARY).args(args).output().unwrap()
}

/// What a command says as JSON, and whether it is content.
fn json(args: &[&str]) -> (Value, bool) {
    let output = flynn_host(args);
    let value = serde_json::from_slice(&output.stdout);
    let value = value.unwrap_or_else(|error| {
        panic!("{args:?}: {error}: {output:?}");
    });
    (value, output.status.success())
}

pub(crate) async fn tags_and_drains_are_kept() {
    let host = Host::boot().await;
    let (tags, _) = json(&["tags", "set", "disk=ssd", "zone=a", "--json"]);
    assert_eq!(tags, serde_json::json!({"disk": "ssd", "zone": "a"}));
    for bad in [["tags", "set", "id=two"], ["tags", "remove", "none"]] {
        assert!(!flynn_host(&bad).status.success(), "{bad:?}");
    }
    assert!(flynn_host(&["tags", "remove", "zone"]).status.success());

    let mut web = host.job("sleep 1000");
    web.metadata.insert(label::APP_ID.into(), "shop".into());
    web.metadata.insert(label::PROCESS_TYPE.into(), "web".into());
    let mut everywhere = web.clone();
    everywhere.id = "one-omni".into();
    everywhere.metadata.insert(label::OMNI.into(), "true".into());
    host.run(&web).await;
    host.run(&everywhere).await;
    let (drained, content) = json(&["drain", "--no-wait", "--json"]);
    assert!(content);
    assert_eq!(drained["left"], serde_json::json!([web.id]));
    assert!(drained["stays"]["one-omni"].is_string(), "{drained}");
    // Over a restart as well.
    host.kill_daemon();
    host.start().await;
    let status = host.api.status().await.unwrap();
    assert!(status.draining && status.tags.len() == 1 && status.tags["disk"] == "ssd");
    let late = flynn_host(&["drain", "--timeout", "0"]);
    let said = String::from_utf8_lossy(&late.stderr);
    assert!(!late.status.success() && said.contains(&web.id), "{said}");
    host.api.stop_job(&web.id).await.unwrap();
    host.end(&web.id).await;
    assert!(flynn_host(&["drain", "--timeout", "30"]).status.success());
    assert!(flynn_host(&["drain", "--undo"]).status.success());
    assert!(!host.api.status().await.unwrap().draining);
}

pub(crate) async fn what_is_ill_is_mended() {
    let host = Host::boot().await;
    let state = host.state.to_str().unwrap().to_owned();
    let fix = |more: &[&str]| json(&[&["fix", "--json", "--state", state.as_str()], more].concat());
    let (steps, content) = fix(&[]);
    assert!(content, "{steps}");
    let mut job = host.job("sleep 1000");
    job.resurrect = true;
    let running = host.run(&job).await;
    let supervisor = running.supervisor_pid.unwrap();
    kill(supervisor, 19);
    let layer = host
        .state
        .join("layers")
        .join(format!("{}.squashfs", host.layer.id));
    let bytes = fs::read(&layer).unwrap();
    let other = host
        .state
        .join("layers")
        .join(format!("{}.squashfs", flynn_api::Digest::of(b"x")));
    fs::write(&other, &bytes).unwrap();

    let (_, content) = fix(&["--dry-run"]);
    assert!(!content && lives(supervisor) && other.exists());
    let (steps, content) = fix(&[]);
    assert!(content, "{steps}");
    let done = |name: &str| {
        let steps = steps.as_array().unwrap();
        steps
            .iter()
            .any(|step| step["name"] == name && step["done"].is_string())
    };
    assert!(done("supervisors") && done("layers"), "{steps}");
    assert!(!lives(supervisor) && !other.exists() && layer.exists());
    let again = host.wait(&job.id, |job| job.status == JobState::Running).await;
    assert_ne!(again.supervisor_pid, running.supervisor_pid);
    assert!(fix(&[]).1);
}

pub(crate) async fn what_there_is_to_know_is_collected() {
    let host = Host::boot().await;
    let mut job = host.job("echo something; sleep 1000");
    job.config.env.insert("SOME_TOKEN".into(), "hush".into());
    host.run(&job).await;
    host.says(&job.id, "something").await;
    let file = host.state.with_file_name("debug.tar.gz");
    let (file, state) = (file.to_str().unwrap(), host.state.to_str().unwrap());
    let args = ["collect-debug-info", "--output", file, "--state", state, "--json"];
    let (collected, content) = json(&args);
    assert!(
        content && collected["bytes"].as_u64().unwrap() > 1000,
        "{collected}"
    );
    assert!(!flynn_host(&args).status.success(), "no file is overwritten");
    let to = host.state.with_file_name("debug");
    fs::create_dir(&to).unwrap();
    let unpacked = Command::new("tar")
        .args(["-xzf", file, "--strip-components=1", "-C"])
        .arg(&to)
        .status();
    assert!(unpacked.unwrap().success());
    let read = |name: &str| fs::read_to_string(to.join(name)).unwrap();
    assert!(read("jobs.json").contains("SOME_TOKEN") && !read("jobs.json").contains("hush"));
    assert!(read(&format!("jobs/{}/output.log", job.id)).contains("something"));
    assert!(read("status.json").contains("\"one\"") && read("links.txt").contains("lo"));
    // Also of a host whose daemon does not run.
    host.kill_daemon();
    let (without, content) = json(&["collect-debug-info", "--output", &format!("{file}.2"), "--json"]);
    assert!(
        content
            && without["missing"]
                .as_array()
                .unwrap()
                .contains(&"status.json".into()),
        "{without}"
    );
}

/// One that fails keeps the others from nothing, and what came of each is said.
pub(crate) async fn commands_say_what_came_of_each() {
    let host = Host::boot().await;
    let (one, two) = (host.job("echo a line; sleep 1000"), host.job("sleep 1000"));
    host.run(&one).await;
    host.run(&two).await;
    host.says(&one.id, "a line").await;
    let log = flynn_host(&["log", &one.id, "--json"]);
    let line: Value = serde_json::from_slice(&log.stdout).unwrap();
    assert_eq!(
        (&line["msg"], &line["stream"]),
        (&"a line".into(), &"stdout".into())
    );
    let (sent, content) = json(&["signal", &one.id, "WINCH", "--json"]);
    assert!(content && sent == serde_json::json!([{ "id": one.id }]), "{sent}");
    let (paused, content) = json(&["pause", &one.id, "--json"]);
    assert!(content && paused[0]["error"].is_null(), "{paused}");
    let (stopped, content) = json(&["stop", &one.id, "nobody", &two.id, "--json"]);
    let ids = [0, 1, 2].map(|index| stopped[index]["id"].clone());
    assert_eq!(ids, [one.id.as_str(), "nobody", two.id.as_str()].map(Value::from));
    assert!(
        !content
            && stopped[1]["error"]
                .as_str()
                .is_some_and(|why| why.contains("no job nobody")),
        "{stopped}"
    );
    for job in [one, two] {
        assert_eq!(host.end(&job.id).await.status, JobState::Done);
    }
    let one = flynn_host(&["stop", "nobody"]);
    assert!(!one.status.success() && String::from_utf8_lossy(&one.stderr).contains("no job nobody"));
    let state = host.state.with_file_name("another");
    let state = state.to_str().unwrap();
    let (config, _) = json(&[
        "init",
        "--state",
        state,
        "--id",
        "two",
        "--address",
        "192.0.2.2",
        "--json",
    ]);
    assert_eq!(
        (&config["id"], &config["address"]),
        (&"two".into(), &"192.0.2.2".into())
    );
}

pub(crate) async fn machines_are_looked_at_before_they_are_hosts() {
    let host = Host::boot().await;
    let state = host.state.to_str().unwrap();
    let (checks, _) = json(&["preflight", "--json", "--state", state]);
    let of = |name: &str| {
        let checks = checks.as_array().unwrap();
        checks
            .iter()
            .find(|check| check["name"] == name)
            .cloned()
            .unwrap()
    };
    for name in [
        "kernel",
        "file systems",
        "forwarding",
        "ports",
        "firewall",
        "uplink",
    ] {
        assert_eq!(of(name)["outcome"], "ok", "{}", of(name));
    }
    // This machine's disk may have any room.
    let disk = host.state.with_file_name("disk");
    fs::create_dir(&disk).unwrap();
    for (size, outcome) in [(c"size=30g", "ok"), (c"size=10g", "warn"), (c"size=1g", "fail")] {
        mount("tmpfs", &disk, "tmpfs", MountFlags::empty(), Some(size)).unwrap();
        let (checks, _) = json(&["preflight", "--json", "--state", disk.to_str().unwrap()]);
        let checks = checks.as_array().unwrap();
        let room = checks.iter().find(|check| check["name"] == "disk").unwrap();
        assert_eq!(room["outcome"], outcome, "{room}");
        unmount(&disk, UnmountFlags::empty()).unwrap();
    }
    let _taken = std::net::TcpListener::bind("192.0.2.1:1111").unwrap();
    let (checks, content) = json(&["preflight", "--json", "--state", state, "--address", "192.0.2.99"]);
    let text = checks.to_string();
    assert!(
        !content && text.contains("1111/tcp") && text.contains("no interface has 192.0.2.99"),
        "{text}"
    );
    let script = flynn_host(&["completion", "bash"]);
    assert!(String::from_utf8_lossy(&script.stdout).contains("collect-debug-info"));
}
