//! The disk of a host's state: full at each step of a start, and cut off with the power.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use flynn_api::host::{JobState, VolumeBinding};
use flynn_hostd::container::OwnLayer;
use flynn_hostd::status::Status;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use crate::host::{Host, kill, lives, pids_below};

/// Room for so many more files and directories than there are.
fn leave(state: &Path, free: u64) {
    let filler = state.join("filler");
    fs::create_dir_all(&filler).unwrap();
    let left = || rustix::fs::statvfs(state).unwrap().f_ffree;
    let mut number = 0;
    while left() > free {
        fs::write(filler.join(number.to_string()), "").unwrap();
        number += 1;
    }
}

pub(crate) async fn a_disk_that_is_full_at_any_step_is_said_and_survived() {
    let host = Host::new(|state| {
        mount(
            "tmpfs",
            state,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=64m,nr_inodes=400"),
        )
        .unwrap();
    });
    host.start().await;
    host.put_layer(&host.layer_file).await.unwrap();
    let standing = host.job("trap 'echo bye; exit 5' TERM; while :; do sleep 0.05; done");
    let before = host.run(&standing).await;
    let filler = host.state.join("filler");
    let (mut refused, mut failed, mut ran) = (0, 0, 0);
    for free in 0..24 {
        leave(&host.state, free);
        let job = host.job("echo said; exit 3");
        let job_dir = host.state.join("jobs").join(&job.id);
        let is_said = |why: &str| why.contains("full") || why.contains("No space left");
        if let Err(error) = host.api.add_job(&job).await {
            assert!(is_said(&error.message), "{free} free: {error}");
            refused += 1;
        } else {
            let ended = host.end(&job.id).await;
            if ended.started_at.is_some() {
                assert_eq!(ended.exit_status, Some(3), "{free} free: {ended:?}");
                ran += 1;
            } else {
                let error = ended.error.clone().unwrap_or_default();
                assert!(is_said(&error), "{free} free: {ended:?}");
                failed += 1;
            }
        }
        fs::remove_dir_all(&filler).unwrap();
        let gone = host.until(async || {
            let tidy = [&OwnLayer::NAMES[..], &["root", "launch.json"]]
                .concat()
                .iter()
                .all(|name| !job_dir.join(name).exists());
            (host.job_groups(&job.id).is_empty() && tidy && !socket(&job.id).exists()).then_some(())
        });
        assert!(
            gone.await.is_some(),
            "{free} free: something is left of {}\n{}",
            job.id,
            host.log()
        );
        if let Ok(job) = host.api.job(&job.id).await {
            let stored = host.until(async || {
                Status::read(&job_dir)
                    .ok()
                    .flatten()
                    .filter(|it| it.state.is_terminal())
            });
            assert_eq!(stored.await.unwrap().state, job.status, "{free} free");
        }
    }
    assert!(refused > 3 && ran > 1, "each of them: {refused} {failed} {ran}");
    println!("{refused} refused, {failed} failed, {ran} ran");
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    assert!(!mounts.contains("/jobs/"), "{mounts}");
    let after = host.api.job(&standing.id).await.unwrap();
    assert_eq!((after.pid, after.restarts), (before.pid, 0));
    host.finish(&host.job("true")).await;
    host.api.stop_job(&standing.id).await.unwrap();
    assert_eq!(host.end(&standing.id).await.exit_status, Some(5));
    // The daemon, the supervisors that wait for jobs, and nobody else.
    let idle = host.until(async || {
        let mut pids: Vec<_> = host.groups.iter().flat_map(|group| pids_below(group)).collect();
        pids.sort_unstable();
        pids.dedup();
        (pids.len() <= 2).then_some(())
    });
    assert!(idle.await.is_some(), "somebody is left");
}

fn socket(id: &str) -> PathBuf {
    Path::new("/run/flynn/jobs").join(format!("{id}.sock"))
}

/// A host whose state is on an ext4 of its own, in a file.
fn host_on_ext4(image: &Path) -> Host {
    let host = Host::new(|state| {
        let file = fs::File::create(image).unwrap();
        file.set_len(256 << 20).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-E", "lazy_itable_init=1"])
            .arg(image)
            .status();
        assert!(made.unwrap().success());
        attach(image, state);
    });
    set_boot("5b1f3f0e-0000-4000-8000-000000000001", &host);
    host
}

fn attach(image: &Path, state: &Path) {
    let mounted = Command::new("mount")
        .args(["-o", "loop"])
        .arg(image)
        .arg(state)
        .status();
    assert!(mounted.unwrap().success());
}

/// The kernel's id of the present boot, as this host sees it.
fn set_boot(id: &str, host: &Host) {
    const BOOT: &str = "/proc/sys/kernel/random/boot_id";
    let path = host.state.with_file_name("boot-id");
    let _ = unmount(BOOT, UnmountFlags::DETACH);
    fs::write(&path, format!("{id}\n")).unwrap();
    mount_bind(&path, BOOT).unwrap();
}

/// What was not synced is lost, and everybody dies: the host's disk is what had come to it when everybody stood still.
fn cut_power(host: &Host, image: &Path, rest: &Path) {
    for group in &host.groups {
        let _ = fs::write(group.join("cgroup.freeze"), "1");
    }
    let copied = Command::new("cp")
        .args(["--sparse=always"])
        .arg(image)
        .arg(rest)
        .status();
    assert!(copied.unwrap().success());
    for group in &host.groups {
        let _ = fs::write(group.join("cgroup.kill"), "1");
    }
    host.kill_daemon();
    for group in &host.groups {
        for pid in pids_below(group) {
            kill(pid, 9);
            while lives(pid) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let _ = fs::write(group.join("cgroup.freeze"), "0");
    }
    // All that a boot begins without.
    for entry in fs::read_dir("/run/flynn/layers").unwrap() {
        let _ = unmount(entry.unwrap().path(), UnmountFlags::DETACH);
    }
    for entry in fs::read_dir("/run/flynn/jobs").unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    unmount(&host.state, UnmountFlags::DETACH).unwrap();
    attach(rest, &host.state);
}

pub(crate) async fn a_power_cut_loses_nothing_that_was_said() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let host = host_on_ext4(&image);
    host.start().await;
    host.put_layer(&host.layer_file).await.unwrap();

    let (ended, _) = host.finish(&host.job("echo over; exit 11")).await;
    let plain = host.job("sleep 1000");
    let mut kept = host.job("echo up; cat /data/it; exec sleep 1000");
    kept.resurrect = true;
    kept.config.volumes = vec![VolumeBinding {
        path: "/data".into(),
        volume_id: "v1".into(),
        ..VolumeBinding::default()
    }];
    let mut writer = host.job("echo written > /data/it; sync; echo done");
    writer.config.volumes.clone_from(&kept.config.volumes);
    host.finish(&writer).await;
    let mut stopped = host.job("sleep 1000");
    stopped.resurrect = true;
    for job in [&plain, &kept, &stopped] {
        host.run(job).await;
    }
    host.api.stop_job(&stopped.id).await.unwrap();
    host.end(&stopped.id).await;
    host.says(&kept.id, "written").await;

    for round in 2..=3 {
        let rest = dir.path().join(format!("disk-{round}"));
        cut_power(&host, &image, &rest);
        fs::rename(&rest, &image).unwrap();
        set_boot(&format!("5b1f3f0e-0000-4000-8000-00000000000{round}"), &host);
        host.start().await;
        let again = host.wait(&kept.id, |job| job.status == JobState::Running).await;
        assert_eq!(again.job.id, kept.id);
        host.says(&kept.id, "written").await;
        let over = host.end(&plain.id).await;
        assert_eq!(over.status, JobState::Crashed, "{over:?}");
        assert!(over.error.unwrap().starts_with("host restarted"));
        let told = host.api.job(&ended.job.id).await.unwrap();
        assert_eq!((told.status, told.exit_status), (JobState::Crashed, Some(11)));
        assert_eq!(host.api.job(&stopped.id).await.unwrap().status, JobState::Done);
        assert_eq!(host.api.volume("v1").await.unwrap().jobs, [kept.id.clone()]);
        let (done, lines) = host.finish(&host.job("echo works")).await;
        assert_eq!((done.exit_status, lines), (Some(0), vec!["works".to_owned()]));
    }
    host.api.stop_job(&kept.id).await.unwrap();
    host.end(&kept.id).await;
}
