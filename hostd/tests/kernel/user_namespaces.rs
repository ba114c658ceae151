//! Root in an app's container is nobody on the host.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use flynn_api::host::{ActiveJob, ExecRequest, Job, JobState, UserNamespace, VolumeBinding, label};
use flynn_api::volume::{NewProvider, NewVolume, ProviderKind};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::host::{Host, kill, lives};
use crate::network::{config, networked};

/// What the machine lacks for these tests.
pub(crate) fn lacks() -> Option<String> {
    let probe = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .args(["probe-user-namespace", "1879048192"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(probe.stdout).unwrap();
    said.trim().parse::<u32>().err().map(|_| said.trim().to_owned())
}

async fn boot() -> Host {
    let host = Host::boot().await;
    host.api.configure_network(&config()).await.unwrap();
    host
}

fn first_id(job: &ActiveJob) -> u32 {
    match job.user_namespace {
        Some(UserNamespace::FirstId(first)) => first,
        _ => panic!("{job:#?}"),
    }
}

fn why_not(job: &ActiveJob) -> &str {
    match &job.user_namespace {
        Some(UserNamespace::Without(why)) => why,
        _ => panic!("{job:#?}"),
    }
}

fn with_volume(mut job: Job, volume: &str) -> Job {
    job.config.volumes = vec![VolumeBinding {
        path: "/data".into(),
        volume_id: volume.into(),
        delete_on_stop: false,
        limit: None,
    }];
    job
}

/// All that root is used to.
const AS_ROOT: &str = "id -u; cat /proc/self/uid_map; stat -c %u:%g / /etc /bin/busybox /etc/hostname /tmp; \
    mkdir /made && echo a > /made/file && chown 1000:1001 /made/file && stat -c %u:%g /made/file; \
    su app -c 'id -u; touch /made/other 2>/dev/null || echo refused; cat /made/file'; \
    echo gone > /dev/null && head -c 2 /dev/zero | wc -c; ls -ld /dev/shm /dev/pts | wc -l; \
    touch /dev/shm/x && chown 65534 /dev/shm/x && stat -c %u /dev/shm/x; chown 65536 /made 2>&1; \
    nc -l -p 80 & while ! netstat -tln | grep -q ':80 '; do sleep 0.05; done; echo listens; \
    echo heard > /dev/stderr; touch /made/last; sleep 1000";

pub(crate) async fn root_is_nobody_on_the_host() {
    let host = boot().await;
    let status = host.api.status().await.unwrap();
    let feature = status
        .features
        .iter()
        .find(|feature| feature.name == "user_namespaces");
    assert!(feature.unwrap().present, "{:?}", status.notices);
    let job = networked(&host, AS_ROOT);
    let running = host.run(&job).await;
    let first = first_id(&running);
    let last = host.state.join("jobs").join(&job.id).join("upper/made/last");
    assert!(host.until(async || last.exists().then_some(())).await.is_some());
    host.says(&job.id, "heard").await;
    let mut lines: Vec<_> = host
        .lines(&job.id)
        .await
        .into_iter()
        .map(|line| line.msg)
        .collect();
    lines.retain(|line| line != "heard");
    let map = format!("         0 {first}      65536");
    let wanted = [
        "0",
        &map,
        "0:0",
        "0:0",
        "0:0",
        "0:0",
        "0:0",
        "1000:1001",
        "1000",
        "refused",
        "a",
        "2",
        "2",
        "65534",
        "chown: /made: Invalid argument",
        "listens",
    ];
    assert_eq!(lines, wanted);

    // Outside: init, the program and what it started.
    let made = fs::metadata(&last).unwrap();
    assert_eq!((made.uid(), made.gid()), (first, first));
    let file = fs::metadata(last.with_file_name("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (first + 1000, first + 1001));
    let users = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
        line.split_whitespace()
            .skip(1)
            .map(|id| id.parse().unwrap())
            .collect::<BTreeSet<u32>>()
    };
    let pids: BTreeSet<u32> = host
        .job_groups(&job.id)
        .iter()
        .flat_map(|group| crate::host::pids_below(group))
        .collect();
    assert!(
        pids.contains(&running.pid.unwrap()) && pids.len() >= 3,
        "{pids:?}"
    );
    for pid in pids {
        assert_eq!(users(pid), BTreeSet::from([first]));
    }

    // A program beside it is there as well, with the user that it asks for, if there is one.
    let beside = |uid| ExecRequest {
        args: [
            "/bin/sh",
            "-c",
            "id -u; cat /proc/self/uid_map; tty; echo x > /made/beside",
        ]
        .map(str::to_owned)
        .into(),
        tty: true,
        uid,
        ..ExecRequest::default()
    };
    let executed = async |uid| {
        let mut stream = host.api.exec(&job.id, &beside(uid)).await.unwrap();
        let (said, _, status) = crate::attached::read_all(&mut stream).await;
        (String::from_utf8(said).unwrap(), status)
    };
    let (said, status) = executed(None).await;
    assert!(said.starts_with(&format!("0\r\n{map}\r\n/dev/pts/")), "{said:?}");
    assert_eq!(status, 0);
    assert_eq!(fs::metadata(last.with_file_name("beside")).unwrap().uid(), first);
    let (said, _) = executed(Some(1000)).await;
    assert!(said.starts_with("1000\r\n"), "{said:?}");
    let error = host.api.exec(&job.id, &beside(Some(100_000))).await.unwrap_err();
    assert!(error.message.contains("end with 65535"), "{error}");

    // Nor is there one for the job itself.
    let mut job = networked(&host, "id -u");
    job.config.uid = Some(100_000);
    let error = host.api.add_job(&job).await.unwrap_err();
    assert!(error.message.starts_with("config.uid: 100000"), "{error}");
    job = networked(&host, "id -u; id -g; id -G; echo out > /dev/stdout; echo $HOME");
    job.config.uid = Some(1000);
    let (_, lines) = host.finish(&job).await;
    assert_eq!(lines, ["1000", "1000", "1000", "out", "/home/app"]);
}

/// By one whose root is the host's, and by one whose is not.
async fn hands_a_volume_on(host: &Host, volume: &str) {
    let write = "mkdir -p /data/$N && echo $N > /data/$N/root && echo $N > /data/$N/app && chmod 600 /data/$N/* && \
                 chown 1000:1000 /data/$N/app && chmod 4755 /data/$N/root && stat -c %u:%a /data/$N/root /data/$N/app";
    // What the other has made is one's own.
    let read = "cat /data/*/root && su app -c 'cat /data/*/app' && rm -r /data/$N && echo removed";
    let job = |own: bool, name: &str, script: &str| {
        let mut job = if own {
            networked(host, script)
        } else {
            host.job(script)
        };
        job.config.env.insert("N".into(), name.into());
        with_volume(job, volume)
    };
    for (own, name) in [(false, "one"), (true, "two")] {
        let (ended, lines) = host.finish(&job(own, name, write)).await;
        assert_eq!(lines, ["0:4755", "1000:600"], "{ended:?}");
        assert_eq!(
            matches!(ended.user_namespace, Some(UserNamespace::FirstId(_))),
            own,
            "{ended:?}"
        );
    }
    let (_, lines) = host.finish(&job(true, "one", read)).await;
    assert_eq!(lines, ["one", "two", "one", "two", "removed"]);
    let (_, lines) = host.finish(&job(false, "two", read)).await;
    assert_eq!(lines, ["two", "two", "removed"]);
}

pub(crate) async fn volumes_are_handed_on() {
    let host = boot().await;
    hands_a_volume_on(&host, "plain").await;
    // As containers know them, so that it does not matter who has which range.
    let root = fs::metadata(host.state.join("volumes/plain/data")).unwrap();
    assert_eq!((root.uid(), root.gid()), (0, 0));
    // Who is not root does not get there: programs in it give nobody their owner's rights.
    let mut outsider = Command::new("ls");
    outsider.arg(host.state.join("volumes/plain/data")).uid(1000);
    let outsider = outsider.stdout(Stdio::null()).stderr(Stdio::null());
    assert!(!outsider.status().unwrap().success());
    // One that is made for a user is that user's.
    let mut job = with_volume(
        networked(&host, "echo x > /data/x && stat -c %u:%g /data /data/x"),
        "users",
    );
    job.config.uid = Some(1000);
    assert_eq!(host.finish(&job).await.1, ["1000:1000", "1000:1000"]);
}

/// On a filesystem of its own: an ext4 in a file, and a btrfs.
pub(crate) async fn volumes_of_all_kinds_are_handed_on() {
    let host = boot().await;
    let _pool = crate::volumes::Btrfs::of(&host).await;
    for (provider, volume) in [("default", "image"), ("fast", "subvolume")] {
        let new = NewVolume {
            id: Some(volume.into()),
            limit: Some(32 << 20),
            ..NewVolume::default()
        };
        host.api.create_volume(provider, &new).await.unwrap();
        hands_a_volume_on(&host, volume).await;
    }
}

pub(crate) async fn some_jobs_have_none() {
    let host = boot().await;
    let base = || networked(&host, "cat /proc/self/uid_map; ls /data 2>/dev/null; true");
    let mut asks = base();
    asks.config.host_user_namespace = true;
    let mut system = base();
    system.metadata.insert(label::SYSTEM_APP.into(), "true".into());
    let mut capable = base();
    capable.config.linux_capabilities = Some(vec!["CAP_NET_ADMIN".into()]);
    let in_network = host.job("cat /proc/self/uid_map");
    // An overlay maps no ids.
    let over = host.state.with_file_name("over");
    for name in ["", "lower", "upper", "work", "merged"] {
        fs::create_dir(over.join(name)).unwrap();
    }
    let _over = Over::mount(&over);
    let new = NewProvider {
        id: "over".into(),
        kind: ProviderKind::Dir,
        path: over.join("merged").display().to_string(),
        dataset: None,
        device: None,
        size: None,
        default: false,
    };
    host.api.add_provider(&new).await.unwrap();
    let new = NewVolume {
        id: Some("on-it".into()),
        ..NewVolume::default()
    };
    host.api.create_volume("over", &new).await.unwrap();
    for (job, why) in [
        (asks, "it asks for the host's"),
        (system, "one of the platform's own"),
        (capable, "CAP_NET_ADMIN"),
        (in_network, "host's network"),
        (with_volume(base(), "on-it"), "the volume at /data cannot map ids"),
    ] {
        let (ended, lines) = host.finish(&job).await;
        assert!(why_not(&ended).contains(why), "{ended:?}");
        assert_eq!(ended.status, JobState::Done, "{ended:?}");
        assert_eq!(lines, ["         0          0 4294967295"], "{why}");
    }
}

/// An overlay that is mounted for as long as this lives.
struct Over(std::path::PathBuf);

impl Over {
    fn mount(dir: &Path) -> Self {
        let name = |name: &str| dir.join(name).display().to_string();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            name("lower"),
            name("upper"),
            name("work")
        );
        let options = std::ffi::CString::new(options).unwrap();
        let target = dir.join("merged");
        mount(
            "overlay",
            &target,
            "overlay",
            MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .unwrap();
        Self(target)
    }
}

impl Drop for Over {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Each job has ids that no other has, also when the daemon knows of them from an earlier one only, and keeps them.
pub(crate) async fn ranges_are_one_jobs_alone() {
    let host = boot().await;
    let mut kept = networked(&host, "trap 'exit 3' USR1; echo up; while :; do sleep 0.05; done");
    kept.resurrect = true;
    let one = host.run(&kept).await;
    let other = host.run(&networked(&host, "sleep 1000")).await;
    assert_ne!(first_id(&one), first_id(&other));
    host.kill_daemon();
    host.start().await;
    let known = async |job: &ActiveJob| host.api.job(&job.job.id).await.unwrap();
    assert_eq!(known(&one).await.user_namespace, one.user_namespace);
    assert_eq!(known(&other).await.user_namespace, other.user_namespace);
    let mut all = BTreeSet::from([first_id(&one), first_id(&other)]);
    for _ in 0..3 {
        assert!(
            all.insert(first_id(&host.run(&networked(&host, "sleep 1000")).await)),
            "{all:?}"
        );
    }
    // The next run of a program is in the same.
    host.says(&kept.id, "up").await;
    host.api.signal_job(&kept.id, 10).await.unwrap();
    let again = host
        .wait(&kept.id, |job| {
            job.restarts == 1 && job.status == JobState::Running
        })
        .await;
    assert_eq!(again.user_namespace, one.user_namespace);
    let pid = again.pid.unwrap();
    assert_eq!(
        fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid(),
        0,
        "init is hidden"
    );
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(
        status.contains(&format!("Uid:\t{}\t", first_id(&one))),
        "{status}"
    );
    // Nor is it given away while a daemon that begins takes up what there is.
    host.kill_daemon();
    let gone = again.supervisor_pid.unwrap();
    kill(gone, 9);
    assert!(host.until(async || (!lives(gone)).then_some(())).await.is_some());
    host.start().await;
    let third = host.wait(&kept.id, |job| {
        job.status == JobState::Running && job.supervisor_pid != Some(gone)
    });
    let third = first_id(&third.await);
    let others = all.into_iter().filter(|first| *first != first_id(&one));
    assert!(
        others.into_iter().all(|first| first != third),
        "{third} is another's"
    );
}

/// What the kernel counts of a user it counts of each job for itself. In the host's user namespace, user 1000 of one job is
/// user 1000 of the other.
pub(crate) async fn limits_of_users_are_each_jobs_own() {
    let host = boot().await;
    let start =
        |count| format!("i=0; while [ $i -lt {count} ]; do sleep 1000 & i=$((i+1)); done; echo started");
    let job = |shared, script: &str| {
        let mut job = networked(&host, script);
        job.config.uid = Some(1000);
        job.config.host_user_namespace = shared;
        job
    };
    for shared in [true, false] {
        let crowd = job(shared, &format!("{}; sleep 1000", start(60)));
        host.run(&crowd).await;
        host.says(&crowd.id, "started").await;
        let (_, lines) = host
            .finish(&job(shared, &format!("ulimit -u 30; {}", start(10))))
            .await;
        let started = lines.iter().any(|line| line == "started");
        assert_eq!(started, !shared, "{lines:?}");
    }
}
