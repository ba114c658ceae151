//! What jobs may have, also changed while they run; and what they have used.

use std::fs;

use flynn_api::ErrorCode;
use flynn_api::host::{ActiveJob, JobEventKind, JobState};
use flynn_api::resources::Resources;
use futures::StreamExt as _;

use crate::host::{Host, PATIENCE, kill};

pub(crate) fn resources(limits: &[&str]) -> Resources {
    Resources::parse(limits.iter().copied()).unwrap()
}

/// What the kernel keeps to: the first of these files that a group of the job has. The names are v2's and v1's.
fn in_force(host: &Host, job: &ActiveJob, files: &[&str]) -> Option<String> {
    let groups = host.job_groups(&job.job.id);
    let mut paths = groups
        .iter()
        .flat_map(|group| files.iter().map(|file| group.join(file)));
    let text = paths.find_map(|path| fs::read_to_string(path).ok())?;
    Some(text.trim().to_owned())
}

pub(crate) async fn cores_weights_swap_and_disk_are_limited() {
    let host = Host::boot().await;
    let mut job = host.job("grep Cpus_allowed_list /proc/self/status; sleep 1000");
    job.config.cpuset = Some("1".into());
    job.resources = resources(&[
        "memory=64MB",
        "swap=32MB",
        "cpu_weight=300",
        "io_weight=50",
        "io_write=4MB",
        "io_read=unlimited",
    ]);
    let mut running = host.run(&job).await;
    if running.status == JobState::Failed {
        // Where the host keeps its state on no disk.
        assert!(
            running.error.as_ref().unwrap().contains("bandwidth"),
            "{running:?}"
        );
        job.id += "-again";
        job.resources.0.remove("io_write");
        running = host.run(&job).await;
    }
    host.says(&job.id, "Cpus_allowed_list:\t1").await;
    let of = |files: &[&str]| in_force(&host, &running, files);
    assert!(matches!(
        of(&["cpu.weight", "cpu.shares"]).as_deref(),
        Some("300" | "3072")
    ));
    // v1 counts both together.
    let sum = ((64 + 32) << 20).to_string();
    let swap = of(&["memory.swap.max", "memory.memsw.limit_in_bytes"]);
    assert!(
        swap.as_ref()
            .is_none_or(|swap| *swap == sum || *swap == (32 << 20).to_string()),
        "{swap:?}"
    );
    let disk = of(&["io.max", "blkio.throttle.write_bps_device"]);
    let limited = job.resources.limit("io_write") > 0;
    assert!(disk.is_none_or(|disk| disk.contains("4194304") == limited));

    for (wrong, field) in [
        ("cpu_weight=0", "resources.cpu_weight"),
        ("io_weight=1001", "resources.io_weight"),
        ("memory=1", "resources.memory"),
    ] {
        let mut job = host.job("true");
        job.resources = resources(&[wrong]);
        let refused = host.api.add_job(&job).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Validation);
        assert!(format!("{refused:?}").contains(field), "{refused:?}");
    }
    let mut job = host.job("true");
    job.config.cpuset = Some("3-1".into());
    assert_eq!(
        host.api.add_job(&job).await.unwrap_err().code,
        ErrorCode::Validation
    );
    // There is no such core.
    job.config.cpuset = Some("9999".into());
    let (ended, _) = host.finish(&job).await;
    assert_eq!(ended.status, JobState::Failed);
    assert!(ended.error.as_ref().unwrap().contains("cpuset"), "{ended:?}");
}

pub(crate) async fn limits_change_while_a_job_runs() {
    let host = Host::boot().await;
    let mut job = host.job("sleep 1000");
    job.resources = resources(&["memory=64MB", "max_pids=64"]);
    let running = host.run(&job).await;
    let pids = || in_force(&host, &running, &["pids.max"]);
    let memory = || in_force(&host, &running, &["memory.max", "memory.limit_in_bytes"]);
    assert_eq!(
        (pids().as_deref(), memory()),
        (Some("64"), Some((64 << 20).to_string()))
    );
    let mut events = host.api.job_events().await.unwrap();

    let change = async |limits: &[&str]| host.api.update_limits(&job.id, &resources(limits)).await;
    change(&["memory=128MB", "max_pids=32", "cpu=500"]).await.unwrap();
    assert_eq!(
        (pids().as_deref(), memory()),
        (Some("32"), Some((128 << 20).to_string()))
    );
    let quota = in_force(&host, &running, &["cpu.max", "cpu.cfs_quota_us"]);
    assert!(
        matches!(quota.as_deref(), Some("50000 100000" | "50000")),
        "{quota:?}"
    );
    let told = async {
        loop {
            let (_, event) = events.next().await.unwrap().unwrap();
            if event.event == JobEventKind::Update && event.job_id == job.id {
                return event.job.job.resources;
            }
        }
    };
    let told = tokio::time::timeout(PATIENCE, told).await.unwrap();
    assert_eq!((told.limit("max_pids"), told.limit("memory")), (32, 128 << 20));

    // What cannot be is refused, and changes nothing.
    for (wrong, code) in [
        (&["max_pids=16", "max_fd=1"][..], ErrorCode::Validation),
        (&["max_pids=16", "cpu_weight=0"], ErrorCode::Validation),
        (&["max_pids=16", "memory=1"], ErrorCode::Validation),
    ] {
        assert_eq!(change(wrong).await.unwrap_err().code, code, "{wrong:?}");
        assert_eq!(pids().as_deref(), Some("32"));
    }
    // It holds more than that.
    let mut large = host.job("head -c 40000000 /dev/zero > /dev/shm/large; echo holds; sleep 1000");
    large.resources = resources(&["memory=128MB"]);
    host.run(&large).await;
    host.says(&large.id, "holds").await;
    let refused = host
        .api
        .update_limits(&large.id, &resources(&["memory=24MB"]))
        .await;
    assert_eq!(refused.unwrap_err().code, ErrorCode::Conflict);
    assert_eq!(
        host.api
            .job(&large.id)
            .await
            .unwrap()
            .job
            .resources
            .limit("memory"),
        128 << 20
    );

    // A daemon that begins anew knows them.
    host.kill_daemon();
    host.start().await;
    let limits = host.api.job(&job.id).await.unwrap().job.resources;
    assert_eq!((limits.limit("max_pids"), limits.limit("cpu")), (32, 500));
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    assert_eq!(change(&["cpu=100"]).await.unwrap_err().code, ErrorCode::Conflict);
    let unknown = host.api.update_limits("nobody", &resources(&["cpu=100"])).await;
    assert_eq!(unknown.unwrap_err().code, ErrorCode::NotFound);
}

/// The value of a job's metric.
fn metric(text: &str, name: &str, job: &str) -> Option<f64> {
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with(&format!("flynn_job_{name}{{")) && line.contains(job))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

pub(crate) async fn want_is_told_and_use_is_counted() {
    let host = Host::boot().await;
    let mut events = host.api.job_events().await.unwrap();
    let mut busy = host.job("while :; do :; done");
    busy.resources = resources(&["cpu=100"]);
    let mut greedy = host.job("while :; do tail /dev/zero; echo killed; sleep 1; done");
    greedy.resources = resources(&["memory=24MB"]);
    let (busy, greedy) = (host.run(&busy).await.job.id, host.run(&greedy).await.job.id);
    let mut missing = vec![
        (JobEventKind::Throttled, busy.clone()),
        (JobEventKind::Oom, greedy.clone()),
    ];
    let told = async {
        while !missing.is_empty() {
            let (_, event) = events.next().await.unwrap().unwrap();
            missing.retain(|(kind, job)| (*kind, job) != (event.event, &event.job_id));
        }
    };
    let told = tokio::time::timeout(PATIENCE, told).await;
    assert!(told.is_ok(), "not told: {missing:?}");
    let text = host.metrics().await;
    for (job, name) in [
        (&busy, "cpu_seconds_total"),
        (&busy, "cpu_throttled_seconds_total"),
        (&busy, "memory_bytes"),
        (&busy, "pids"),
        (&greedy, "memory_peak_bytes"),
        (&greedy, "oom_kills_total"),
    ] {
        assert!(
            metric(&text, name, job).is_some_and(|value| value > 0.0),
            "{name} of {job}: {text}"
        );
    }
    // They go on nevertheless.
    for job in [busy, greedy] {
        assert!(!host.api.job(&job).await.unwrap().status.is_terminal());
    }
}

/// The files behind the loop devices that belong to a job.
fn temporary_disks(host: &Host, id: &str) -> Vec<String> {
    let dir = format!("{}/", host.state.join("jobs").join(id).display());
    let devices = fs::read_dir("/sys/block").unwrap();
    let files =
        devices.filter_map(|it| fs::read_to_string(it.unwrap().path().join("loop/backing_file")).ok());
    files.filter(|file| file.starts_with(&dir)).collect()
}

pub(crate) async fn temporary_disks_are_full_for_their_job_alone() {
    let host = Host::boot().await;
    let mut job = host.job(
        "test -e /big && echo old; dd if=/dev/zero of=/big bs=1M count=64 || echo full; rm /big; \
         echo room > /more && cat /more; dd if=/dev/zero of=/big bs=1M count=8; exit 1",
    );
    job.resources = resources(&["temp_disk=32MB"]);
    job.resurrect = true;
    host.run(&job).await;
    // Each run has an empty one.
    host.wait(&job.id, |job| job.restarts > 1).await;
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    let lines = host.lines(&job.id).await;
    let said = |text: &str| lines.iter().filter(|line| line.msg == text).count();
    assert!(
        said("full") > 1 && said("room") > 1 && said("old") == 0,
        "{lines:?}"
    );
    let job_dir = host.state.join("jobs").join(&job.id);
    let gone = host.until(async || {
        let left = ["upper", "work", "temp", "temp.ext4"].iter();
        let left = left.filter(|name| job_dir.join(name).exists()).count();
        (left == 0 && temporary_disks(&host, &job.id).is_empty()).then_some(())
    });
    assert!(gone.await.is_some(), "{:?}", temporary_disks(&host, &job.id));

    // What dies with its supervisor has nobody to tidy up after it.
    let mut killed = host.job("sleep 1000");
    killed.resources = resources(&["temp_disk=16MB"]);
    let running = host.run(&killed).await;
    assert_eq!(temporary_disks(&host, &killed.id).len(), 1, "it has one");
    kill(running.supervisor_pid.unwrap(), 9);
    host.end(&killed.id).await;
    let gone = host.until(async || temporary_disks(&host, &killed.id).is_empty().then_some(()));
    assert!(gone.await.is_some(), "{:?}", temporary_disks(&host, &killed.id));

    let mut small = host.job("true");
    small.resources = resources(&["temp_disk=1MB"]);
    let refused = host.api.add_job(&small).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Validation);
    assert!(
        refused.message.starts_with("resources.temp_disk: "),
        "{refused:?}"
    );
    small.resources = resources(&["temp_disk=1000000TB"]);
    let (ended, _) = host.finish(&small).await;
    assert_eq!(ended.status, JobState::Failed);
    assert!(ended.error.as_ref().unwrap().contains("temp_disk"), "{ended:?}");
}
