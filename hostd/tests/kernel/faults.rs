//! What is killed, broken, full or new, and what then.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use flynn_api::ErrorCode;
use flynn_api::host::{JobState, Mount, VolumeBinding, label};
use flynn_hostd::container::OwnLayer;
use flynn_hostd::paths::Paths;
use flynn_hostd::status::Status;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::host::{Host, PATIENCE, kill, lives};
use crate::job_limits::resources;

pub(crate) async fn containers_outlive_the_daemon() {
    let host = Host::boot().await;
    let job = host.job("i=0; while :; do i=$((i+1)); echo line $i; sleep 0.02; done");
    let before = host.run(&job).await;
    host.says(&job.id, "line 3").await;
    host.kill_daemon();
    // It says more while there is no daemon.
    let log = host.state.join("jobs").join(&job.id).join("log");
    let logged = || {
        let files = fs::read_dir(&log).unwrap().flatten();
        files.map(|file| file.metadata().unwrap().len()).sum::<u64>()
    };
    let there = logged();
    assert!(
        host.until(async || (logged() > there).then_some(()))
            .await
            .is_some()
    );
    host.start().await;
    let after = host.wait(&job.id, |job| job.status == JobState::Running).await;
    assert_eq!(
        (after.pid, after.supervisor_pid),
        (before.pid, before.supervisor_pid)
    );
    assert_eq!(after.started_at, before.started_at);
    host.says(&job.id, "line 20").await;
    let numbers: Vec<usize> = host
        .lines(&job.id)
        .await
        .iter()
        .map(|line| line.msg[5..].parse().unwrap())
        .collect();
    assert!(
        numbers.iter().copied().eq(1..=numbers.len()),
        "no line was lost: {numbers:?}"
    );
    // Stopped by an operator it leaves jobs alone as well.
    host.stop_daemon();
    assert!(lives(before.pid.unwrap()));
    host.start().await;
    host.api.stop_job(&job.id).await.unwrap();
    assert_eq!(host.end(&job.id).await.status, JobState::Done);
}

pub(crate) async fn an_end_without_a_daemon_is_kept() {
    let host = Host::boot().await;
    let mut job =
        host.job("echo x > /file; while [ ! -e /scratch/go ]; do sleep 0.01; done; echo last; exit 11");
    job.config.volumes.push(VolumeBinding {
        volume_id: "scratch".into(),
        path: "/scratch".into(),
        delete_on_stop: true,
        limit: None,
    });
    let running = host.run(&job).await;
    host.kill_daemon();
    fs::write(host.state.join("volumes/scratch/data/go"), "").unwrap();
    let supervisor = running.supervisor_pid.unwrap();
    assert!(
        host.until(async || (!lives(supervisor)).then_some(()))
            .await
            .is_some()
    );
    host.start().await;
    let ended = host.end(&job.id).await;
    assert_eq!((ended.status, ended.exit_status), (JobState::Crashed, Some(11)));
    assert_eq!(host.lines(&job.id).await.last().unwrap().msg, "last");
    // Nor is anything left of it.
    let dir = host.state.join("jobs").join(&job.id);
    let tidy = host.until(async || {
        let left = OwnLayer::NAMES.iter().chain(&["root", "launch.json"]);
        let is_left = left.into_iter().any(|name| dir.join(name).exists());
        let volume = host.api.volume("scratch").await;
        (!is_left && volume.is_err_and(|error| error.code == ErrorCode::NotFound)).then_some(())
    });
    assert!(tidy.await.is_some(), "{}", host.log());
}

pub(crate) async fn a_container_dies_with_its_supervisor() {
    let host = Host::boot().await;
    let job = host.job("sleep 1000 & sleep 1000");
    let running = host.run(&job).await;
    kill(running.supervisor_pid.unwrap(), 9);
    let ended = host.end(&job.id).await;
    assert_eq!(ended.status, JobState::Crashed);
    assert!(ended.error.unwrap().contains("supervisor was killed"));
    assert!(!lives(running.pid.unwrap()));
    assert!(
        host.until(async || host.job_groups(&job.id).is_empty().then_some(()))
            .await
            .is_some()
    );
}

/// The supervisor of a job, of which nobody else has heard yet, and what it has begun that is no other program yet.
fn supervisors_of(job_dir: &Path) -> Vec<u32> {
    let end = [job_dir.as_os_str().as_bytes(), b"\0"].concat();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.starts_with(b"flynn-host\0supervise\0") && arguments.ends_with(&end)
    })
    .collect()
}

/// In words, and whether it has come.
type Moment = (&'static str, fn(&Start<'_>) -> bool);

/// What can be seen of a start, one after the other; once seen it stays so.
const MOMENTS: [Moment; 7] = [
    ("there is a supervisor", |_| true),
    ("it is in the job's status", |start| {
        start.status().is_some_and(|status| status.supervisor.is_some())
    }),
    ("its socket is there", |start| Paths::socket(start.id).exists()),
    ("the job has groups", |start| {
        !start.host.job_groups(start.id).is_empty()
    }),
    ("its disk is being made", |start| {
        start.dir().join("temp.ext4").exists()
    }),
    ("its container is being made", |start| {
        supervisors_of(&start.dir()).len() > 1 || start.runs()
    }),
    ("it runs", |start| start.runs()),
];

/// A job that is being started.
struct Start<'a> {
    host: &'a Host,
    id: &'a str,
}

impl Start<'_> {
    fn dir(&self) -> PathBuf {
        self.host.state.join("jobs").join(self.id)
    }

    fn status(&self) -> Option<Status> {
        Status::read(&self.dir()).ok().flatten()
    }

    fn runs(&self) -> bool {
        self.status().is_some_and(|status| status.started_at.is_some())
    }
}

/// At each moment of a start, the supervisor as well as what it has made of itself.
pub(crate) async fn supervisors_killed_while_they_start_leave_nothing() {
    let long = std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1");
    let host = Host::boot().await;
    host.finish(&host.job("true")).await;
    let (mut before, mut after) = (0, 0);
    let rounds = if long { 20 } else { 2 };
    let strikes = (0..rounds)
        .flat_map(|_| MOMENTS)
        .flat_map(|moment| [(moment, true), (moment, false)]);
    for ((moment, is_come), first) in strikes {
        let mut job = host.job("sleep 1000");
        job.resources = resources(&["temp_disk=16MB", "memory=64MB"]);
        let start = Start {
            host: &host,
            id: &job.id,
        };
        let dir = start.dir();
        let strike = async {
            let look = async {
                loop {
                    let found = supervisors_of(&dir);
                    // The last is often the container's init.
                    let struck = if first { found.first() } else { found.last() };
                    match struck {
                        Some(pid) if is_come(&start) => return *pid,
                        _ => tokio::task::yield_now().await,
                    }
                }
            };
            let struck = tokio::time::timeout(PATIENCE, look).await;
            let struck = struck.unwrap_or_else(|_| panic!("never came: {moment}\n{}", host.log()));
            eprintln!("{} when {moment}: {struck}", job.id);
            kill(struck, 9);
        };
        let (added, ()) = tokio::join!(host.api.add_job(&job), strike);
        if let Ok(()) = added {
            let ended = host.end(&job.id).await;
            assert!(ended.status != JobState::Done, "{ended:?}");
            if ended.started_at.is_some() {
                after += 1;
            } else {
                before += 1;
            }
        } else {
            before += 1;
        }
        let gone = host.until(async || {
            let left = OwnLayer::NAMES.iter().chain(&["root", "launch.json"]);
            let tidy = !left.into_iter().any(|name| dir.join(name).exists());
            (tidy && host.job_groups(&job.id).is_empty() && supervisors_of(&dir).is_empty()).then_some(())
        });
        assert!(
            gone.await.is_some(),
            "killed when {moment}: something is left\n{}",
            host.log()
        );
    }
    eprintln!("{before} before their program ran, {after} after");
    assert!(
        before > 0 && after > 0,
        "{before} and {after}: the test did not test"
    );
    host.finish(&host.job("true")).await;
}

pub(crate) async fn a_kept_job_survives_its_supervisor() {
    let host = Host::boot().await;
    let mut job = host.job("echo up; sleep 1000");
    job.resurrect = true;
    let first = host.run(&job).await;
    kill(first.supervisor_pid.unwrap(), 9);
    let again = |job: &flynn_api::host::ActiveJob| {
        job.status == JobState::Running && job.supervisor_pid != first.supervisor_pid
    };
    let second = host.wait(&job.id, again).await;
    assert_eq!(second.restarts, 1);
    assert!(!lives(first.pid.unwrap()));
    // Nor does it matter that nobody looked when the supervisor died.
    host.kill_daemon();
    kill(second.supervisor_pid.unwrap(), 9);
    host.start().await;
    let third = host.wait(&job.id, |job| {
        job.status == JobState::Running && job.supervisor_pid != second.supervisor_pid
    });
    assert_eq!(third.await.restarts, 2);
}

/// What was stopped stays so, though nothing was there to be stopped, and the daemon that was told is gone.
pub(crate) async fn a_stop_between_two_starts_is_kept() {
    let host = Host::boot().await;
    let mut job = host.job("sleep 1000");
    job.resurrect = true;
    let first = host.run(&job).await;
    host.kill_daemon();
    kill(first.supervisor_pid.unwrap(), 9);
    let ended = host.until(async || (!lives(first.pid.unwrap())).then_some(()));
    assert!(ended.await.is_some());
    // What it needs is away for a while.
    for entry in fs::read_dir("/run/flynn/layers").unwrap() {
        let _ = unmount(entry.unwrap().path(), UnmountFlags::DETACH);
    }
    let (layers, away) = (host.state.join("layers"), host.state.join("away"));
    fs::rename(&layers, &away).unwrap();
    host.start().await;
    host.wait(&job.id, |job| job.error.is_some()).await;
    host.api.stop_job(&job.id).await.unwrap();
    host.kill_daemon();
    fs::remove_dir_all(&layers).unwrap();
    fs::rename(&away, &layers).unwrap();
    host.start().await;
    let stopped = host.end(&job.id).await;
    assert_eq!(stopped.started_at, first.started_at, "{stopped:?}");
    host.finish(&host.job("true")).await;
}

pub(crate) async fn a_broken_record_harms_no_other() {
    let host = Host::boot().await;
    let [good, bad, lost] = [(); 3].map(|()| host.job("sleep 1000"));
    let running = host.run(&good).await;
    host.run(&bad).await;
    let program = host.run(&lost).await.pid.unwrap();
    host.kill_daemon();
    let jobs = host.state.join("jobs");
    fs::write(jobs.join(&bad.id).join("job.json"), "{\"id\"").unwrap();
    fs::write(jobs.join(&lost.id).join("status.json"), "{\"ver").unwrap();
    fs::write(host.state.join("jobs/stray"), "").unwrap();
    host.start().await;
    assert_eq!(
        host.wait(&good.id, |job| job.status == JobState::Running)
            .await
            .pid,
        running.pid
    );
    assert_eq!(host.api.job(&bad.id).await.unwrap_err().code, ErrorCode::NotFound);
    // It is known that it was there: it does not run on unseen.
    let ended = host.end(&lost.id).await;
    assert_eq!(ended.status, JobState::Crashed);
    assert!(ended.error.unwrap().contains("lost"));
    assert!(
        host.until(async || (!lives(program)).then_some(()))
            .await
            .is_some()
    );
    let notices = host.api.status().await.unwrap().notices;
    assert!(
        notices
            .iter()
            .any(|notice| notice.contains(&bad.id) && notice.contains("set aside")),
        "{notices:?}"
    );
}

pub(crate) async fn a_container_that_hangs_is_stopped_soon() {
    let host = Host::boot().await;
    let mut job = host.job("true");
    job.stop_timeout = Some(300);
    // What is put into a frozen group stands still: its init does not come to the program.
    let frozen = host
        .groups
        .iter()
        .find(|group| group.join("cgroup.procs").exists() && is_v2(group));
    let group = frozen.unwrap().join("flynn/user").join(&job.id);
    fs::create_dir_all(&group).unwrap();
    fs::write(group.join("cgroup.freeze"), "1").unwrap();
    host.api.add_job(&job).await.unwrap();
    host.wait(&job.id, |job| job.pid.is_some()).await;
    host.api.stop_job(&job.id).await.unwrap();
    let ended = host.end(&job.id).await;
    assert_eq!((ended.status, ended.started_at), (JobState::Done, None));
    assert!(
        host.until(async || host.job_groups(&job.id).is_empty().then_some(()))
            .await
            .is_some()
    );
}

fn is_v2(group: &std::path::Path) -> bool {
    group.join("cgroup.freeze").exists()
}

pub(crate) async fn devices_are_refused_before_the_start() {
    let host = Host::boot().await;
    let mount = |target: &str| Mount {
        location: "/it".into(),
        target: target.into(),
        writeable: true,
    };
    let mut job = host.job("cat /it; echo read");
    job.metadata.insert(label::SYSTEM_APP.into(), "true".into());
    job.config.mounts = vec![mount("/dev/loop-control")];
    let error = host.api.add_job(&job).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Validation);
    assert!(error.message.contains("/dev/loop-control is a device"), "{error}");
    job.config.mounts = vec![mount("/dev/null")];
    let (ended, lines) = host.finish(&job).await;
    assert_eq!(
        (ended.exit_status, lines.as_slice()),
        (Some(0), ["read".to_owned()].as_slice())
    );
}

pub(crate) async fn wrong_layers_leave_nothing() {
    let host = Host::boot().await;
    let bytes = fs::read(&host.layer_file).unwrap();
    let layers = || {
        let names = fs::read_dir(host.state.join("layers")).unwrap();
        names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect::<Vec<_>>()
    };
    let before = layers();
    let other = flynn_api::Digest::of(b"other");
    let error = host.put_layer_as(other, bytes.clone()).await.unwrap_err();
    assert!(
        error.code == ErrorCode::Validation && error.message.contains("has the digest"),
        "{error}"
    );
    let cut = host
        .put_layer_as(flynn_api::Digest::of(&bytes[1..]), bytes[..1000].to_vec())
        .await
        .unwrap_err();
    assert_eq!(cut.code, ErrorCode::Validation);
    assert_eq!(layers(), before);
    // One that is no squashfs is taken, and named when it is to be mounted.
    let digest = flynn_api::Digest::of(b"no squashfs");
    host.put_layer_as(digest, b"no squashfs".to_vec()).await.unwrap();
    let mut job = host.job("true");
    let layer = flynn_api::image::Layer::squashfs(digest, 11);
    job.artifacts[0].manifest.as_mut().unwrap().rootfs[0]
        .layers
        .push(layer);
    let error = host.api.add_job(&job).await.unwrap_err();
    assert!(error.message.contains("cannot mount layer"), "{error}");
}

pub(crate) async fn a_full_disk_is_said_and_survived() {
    // Room for the image and little more.
    let host = Host::new(|state| {
        mount("tmpfs", state, "tmpfs", MountFlags::empty(), Some(c"size=16m")).unwrap();
    });
    host.start().await;
    host.put_layer(&host.layer_file).await.unwrap();
    let job = host.job("yes 01234567890123456789012345678901234567890123456789 | head -n 100000; \
                        dd if=/dev/zero of=/fill bs=64k 2>&1; echo still here; sleep 0.3; rm /fill; echo after; exit 12");
    host.run(&job).await;
    let full = host.until(async || {
        let free = host.api.status().await.ok()?.disk_free;
        (free == 0).then_some(())
    });
    assert!(full.await.is_some());
    let refused = host
        .put_layer_as(flynn_api::Digest::of(&vec![7; 1 << 20]), vec![7; 1 << 20])
        .await
        .unwrap_err();
    assert!(
        refused.code == ErrorCode::LimitExceeded && refused.message.contains("nearly full"),
        "{refused}"
    );
    let refused = host.api.add_job(&host.job("true")).await.unwrap_err();
    assert!(refused.message.contains("nearly full"), "{refused}");
    let ended = host.end(&job.id).await;
    assert_eq!(ended.exit_status, Some(12));
    let stored = Status::read(&host.state.join("jobs").join(&job.id))
        .unwrap()
        .unwrap();
    assert_eq!(stored.exit_status, Some(12));
}

/// Without anybody who makes room: what it has written goes with it.
pub(crate) async fn a_job_that_fills_the_disk_can_end() {
    let host = Host::new(|state| {
        mount("tmpfs", state, "tmpfs", MountFlags::empty(), Some(c"size=16m")).unwrap();
    });
    host.start().await;
    host.put_layer(&host.layer_file).await.unwrap();
    let fill = "dd if=/dev/zero of=/fill bs=64k 2> /dev/null;";
    for (then, stopped) in [("exit 3", false), ("sleep 1000", true)] {
        let job = host.job(&format!("{fill} {then}"));
        host.run(&job).await;
        if stopped {
            let full = host.until(async || (host.api.status().await.ok()?.disk_free == 0).then_some(()));
            assert!(full.await.is_some());
            host.api.stop_job(&job.id).await.unwrap();
        }
        let ended = host.end(&job.id).await;
        let wanted = if stopped {
            JobState::Done
        } else {
            JobState::Crashed
        };
        assert_eq!(ended.status, wanted, "{ended:?}");
        let dir = host.state.join("jobs").join(&job.id);
        let tidy = host.until(async || {
            let stored = Status::read(&dir).ok().flatten()?.state;
            (stored == wanted && !dir.join("upper").exists()).then_some(())
        });
        assert!(tidy.await.is_some(), "{}", host.log());
        // There is room again.
        host.finish(&host.job("true")).await;
    }
}

pub(crate) async fn a_new_boot_is_noticed() {
    let host = Host::boot().await;
    let plain = host.job("sleep 1000");
    let mut kept = host.job("sleep 1000");
    kept.resurrect = true;
    let mut stopped = host.job("sleep 1000");
    stopped.resurrect = true;
    let supervisors: Vec<u32> = {
        let mut pids = Vec::new();
        for job in [&plain, &kept, &stopped] {
            pids.push(host.run(job).await.supervisor_pid.unwrap());
        }
        pids
    };
    host.api.stop_job(&stopped.id).await.unwrap();
    host.end(&stopped.id).await;
    // As if the machine had been off: nothing runs, and the boot is another.
    host.kill_daemon();
    for pid in supervisors {
        kill(pid, 9);
        assert!(host.until(async || (!lives(pid)).then_some(())).await.is_some());
    }
    for job in [&plain, &kept, &stopped] {
        let dir = host.state.join("jobs").join(&job.id);
        let status = Status {
            boot_id: "an earlier one".into(),
            ..Status::read(&dir).unwrap().unwrap()
        };
        status.write(&dir).unwrap();
    }
    host.start().await;
    let ended = host.end(&plain.id).await;
    assert_eq!(
        (ended.status, ended.error.as_deref()),
        (JobState::Crashed, Some("host restarted"))
    );
    host.wait(&kept.id, |job| job.status == JobState::Running).await;
    assert_eq!(host.api.job(&stopped.id).await.unwrap().status, JobState::Done);
}

pub(crate) async fn a_kept_job_comes_back_after_a_shutdown() {
    let host = Host::boot().await;
    let mut job = host.job("trap 'exit 0' TERM; while :; do sleep 0.05; done");
    job.resurrect = true;
    let first = host.run(&job).await;
    let supervisor = first.supervisor_pid.unwrap();
    // What an init system does at the end: SIGTERM to everyone.
    host.stop_daemon();
    kill(supervisor, 15);
    assert!(
        host.until(async || (!lives(supervisor)).then_some(()))
            .await
            .is_some()
    );
    let stored = Status::read(&host.state.join("jobs").join(&job.id))
        .unwrap()
        .unwrap();
    assert!(stored.state.is_terminal() && !stored.stop_requested);
    // What it needs is not there at first: it is tried again.
    let layer = host
        .state
        .join("layers")
        .join(format!("{}.squashfs", host.layer.id));
    fs::rename(&layer, layer.with_extension("away")).unwrap();
    host.start().await;
    host.wait(&job.id, |job| {
        job.error
            .as_ref()
            .is_some_and(|error| error.contains("not on this host"))
    })
    .await;
    fs::rename(layer.with_extension("away"), &layer).unwrap();
    let second = host.wait(&job.id, |job| job.status == JobState::Running).await;
    assert_ne!(second.supervisor_pid, first.supervisor_pid);
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
}

pub(crate) async fn two_daemons_do_not_share_a_state() {
    let host = Host::boot().await;
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .args(["daemon", "--id", "one", "--address", "192.0.2.1", "--state"])
        .arg(&host.state)
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another flynn-host daemon"));
    host.api.status().await.unwrap();
}
