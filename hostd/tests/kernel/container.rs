//! What a container is.

use flynn_api::host::{JobState, LogStream, VolumeBinding};
use flynn_api::resources::Resource;

use crate::host::Host;

pub(crate) async fn runs_a_program_in_its_own_world() {
    let host = Host::boot().await;
    let mut job =
        host.job("echo $A $HOME; hostname; cat /etc/hostname; echo $$; ps > /list; wc -l < /list; echo oops >&2; exit 3");
    job.config.env.insert("A".into(), "b c".into());
    host.run(&job).await;
    let ended = host.end(&job.id).await;
    assert_eq!((ended.status, ended.exit_status), (JobState::Crashed, Some(3)));
    let (out, err): (Vec<_>, Vec<_>) = host
        .lines(&job.id)
        .await
        .into_iter()
        .partition(|line| line.stream == LogStream::Stdout);
    let out: Vec<_> = out.iter().map(|line| line.msg.as_str()).collect();
    // Init is 1 and the program 2; ps and its heading are all else that there is.
    assert_eq!(out, ["b c /root", &job.id, &job.id, "2", "4"]);
    assert_eq!(
        err.iter().map(|line| line.msg.as_str()).collect::<Vec<_>>(),
        ["oops"]
    );
    let gone = host
        .until(async || host.job_groups(&job.id).is_empty().then_some(()))
        .await;
    assert!(gone.is_some(), "{:?}", host.job_groups(&job.id));
}

pub(crate) async fn keeps_layers_and_runs_apart() {
    let host = Host::boot().await;
    let script = "ls /written 2>&1; echo changed > /bin/busybox.new && echo new > /written && ls /written";
    for _ in 0..2 {
        let (ended, lines) = host.script(script).await;
        assert_eq!(ended.status, JobState::Done, "{lines:?}");
        assert_eq!(lines, ["ls: /written: No such file or directory", "/written"]);
    }
    let stored = host
        .state
        .join("layers")
        .join(format!("{}.squashfs", host.layer.id));
    assert_eq!(
        std::fs::read(stored).unwrap(),
        std::fs::read(&host.layer_file).unwrap()
    );
    // Nobody uses the layer any more.
    let mounted = std::path::Path::new("/run/flynn/layers").join(host.layer.id.to_string());
    assert!(
        host.until(async || crate::host::is_gone(&mounted).then_some(()))
            .await
            .is_some()
    );
}

fn limit(value: u64) -> Resource {
    Resource {
        request: None,
        limit: Some(value),
    }
}

pub(crate) async fn limits_memory() {
    let host = Host::boot().await;
    let mut job = host.job("exec tail /dev/zero");
    job.resources.0.insert("memory".into(), limit(24 << 20));
    let (ended, _) = host.finish(&job).await;
    assert_eq!(
        (ended.status, ended.exit_status, ended.oom_killed),
        (JobState::Crashed, Some(137), true)
    );
    assert!(ended.error.unwrap().contains("memory limit"));
}

pub(crate) async fn limits_processes() {
    let host = Host::boot().await;
    let mut job = host.job("for i in 1 2 3 4 5 6 7 8 9 10; do sleep 100 & done; echo all");
    job.resources.0.insert("max_pids".into(), limit(6));
    let (ended, lines) = host.finish(&job).await;
    assert_ne!(ended.exit_status, Some(0), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("can't fork")), "{lines:?}");
}

pub(crate) async fn drops_capabilities_and_filters_calls() {
    let host = Host::boot().await;
    let script = "grep -E 'Cap(Eff|Bnd|Amb)|NoNewPrivs|^Seccomp:' /proc/self/status; \
                  mount -t tmpfs none /tmp 2>&1; unshare -U true 2>&1; mknod /tmp/sda b 8 0 2>&1; \
                  dmesg 2>&1; date -s 2020-01-01 2>&1; chroot / true && echo chroot works";
    let (_, lines) = host.script(script).await;
    let all = lines.join("\n");
    let default = format!("{:016x}", flynn_hostd::caps::Set::default_container().0);
    for wanted in [
        &format!("CapEff:\t{default}"),
        &format!("CapBnd:\t{default}"),
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(all.contains(wanted), "no {wanted:?} in {all}");
    }
    assert!(
        all.contains("CapAmb:\t0000000000000000") && all.contains("chroot works"),
        "{all}"
    );
    assert!(lines.len() >= 9, "each refused call says so: {all}");

    let mut job = host.job("grep -E 'Cap(Eff|Amb)' /proc/self/status");
    job.config.linux_capabilities = Some(vec!["CAP_NET_ADMIN".into()]);
    job.config.uid = Some(1000);
    let (_, lines) = host.finish(&job).await;
    assert_eq!(lines, ["CapEff:\t0000000000001000", "CapAmb:\t0000000000001000"]);
}

pub(crate) async fn runs_as_another_user() {
    let host = Host::boot().await;
    let mut job = host.job(
        "id -u; id -g; id -G; echo $HOME; echo to stderr > /dev/stderr; cat /root/x; \
                            grep CapEff /proc/self/status; touch /etc/x 2>/dev/null || echo read-only to me",
    );
    job.config.uid = Some(1000);
    let (ended, lines) = host.finish(&job).await;
    assert_eq!(ended.status, JobState::Done, "{lines:?}");
    for wanted in [
        "1000",
        "/home/app",
        "to stderr",
        "CapEff:\t0000000000000000",
        "read-only to me",
    ] {
        assert!(
            lines.iter().any(|line| line == wanted),
            "no {wanted:?} in {lines:?}"
        );
    }
}

pub(crate) async fn masks_and_hides() {
    let host = Host::boot().await;
    let script = "ls -l /proc/1/exe; cat /proc/1/environ; wc -c < /proc/keys; echo x > /proc/sys/kernel/hostname; \
                  echo b > /proc/sysrq-trigger; ls /sys/firmware | wc -l; touch /sys/x; cat /etc/resolv.conf; \
                  for f in null zero full random urandom tty pts/ptmx shm; do ls /dev/$f > /dev/null || echo no $f; done; \
                  echo gone > /dev/null; ls /proc/self/fd | wc -l; find / -name '*.squashfs' 2>/dev/null";
    let (_, lines) = host.script(script).await;
    let all = lines.join("\n");
    for wanted in [
        "cannot read link: Permission denied",
        "can't open '/proc/1/environ'",
        "Read-only file system",
    ] {
        assert!(all.contains(wanted), "no {wanted:?} in {all}");
    }
    assert!(
        !all.contains("no null") && !all.contains("no shm") && !all.contains("squashfs"),
        "{all}"
    );
    assert_eq!(
        lines.iter().filter(|line| *line == "0").count(),
        2,
        "keys and firmware are empty: {all}"
    );
    // Standard streams and the directory itself: nothing was inherited.
    assert!(lines.iter().any(|line| line == "4"), "{all}");
}

pub(crate) async fn mounts_volumes() {
    let host = Host::boot().await;
    let mut job = host
        .job("cat /data/kept 2>/dev/null; echo once > /data/kept; mknod /data/null c 1 3 2>&1; sleep 100");
    job.config.volumes = vec![VolumeBinding {
        path: "/data".into(),
        volume_id: "v1".into(),
        delete_on_stop: false,
        limit: None,
    }];
    host.run(&job).await;
    host.says(&job.id, "mknod").await;
    let volumes = host.api.volumes().await.unwrap();
    assert_eq!(
        (volumes[0].id.as_str(), volumes[0].jobs.as_slice()),
        ("v1", std::slice::from_ref(&job.id))
    );
    let busy = host.api.delete_volume("v1").await.unwrap_err();
    assert!(busy.message.contains(&job.id), "{busy}");
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;

    let mut again = host.job("cat /data/kept");
    again.config.volumes.clone_from(&job.config.volumes);
    again.config.volumes[0].delete_on_stop = true;
    let (_, lines) = host.finish(&again).await;
    assert_eq!(lines, ["once"]);
    let gone = host
        .until(async || host.api.volumes().await.unwrap().is_empty().then_some(()))
        .await;
    assert!(gone.is_some());
}

/// What the router's job has of the host, by the manifest that clusters begin with.
pub(crate) async fn gives_the_router_its_pins() {
    let manifest: serde_json::Value =
        serde_json::from_str(include_str!("../../src/bootstrap/manifest.json")).unwrap();
    let apps = manifest["apps"].as_array().unwrap();
    let router = apps.iter().find(|app| app["name"] == "router").unwrap();
    let process = &router["processes"]["app"];
    let host = Host::boot().await;
    let mut job = host.job(
        "cd $BPF_PINS && mkdir probe && rmdir probe && stat -f -c %t . && grep CapEff /proc/self/status",
    );
    let pins = router["env"]["BPF_PINS"].as_str().unwrap();
    job.config.env.insert("BPF_PINS".into(), pins.into());
    job.config.mounts = serde_json::from_value(process["mounts"].clone()).unwrap();
    job.config.linux_capabilities = serde_json::from_value(process["linux_capabilities"].clone()).unwrap();
    job.config.host_network = true;
    job.metadata
        .insert(flynn_api::host::label::SYSTEM_APP.into(), "true".into());
    let (ended, lines) = host.finish(&job).await;
    // A BPF file system; NET_BIND_SERVICE, NET_ADMIN, PERFMON and BPF.
    assert_eq!(
        lines,
        ["cafe4a11", "CapEff:\t000000c000001400"],
        "{:?}",
        ended.error
    );
}

pub(crate) async fn names_what_cannot_be_started() {
    let host = Host::boot().await;
    for (program, wanted) in [
        ("nonesuch", "no such program in the image"),
        ("/etc/passwd", "Permission denied"),
    ] {
        let mut job = host.job("");
        job.config.args = vec![program.into()];
        host.run(&job).await;
        let ended = host.end(&job.id).await;
        assert_eq!(ended.status, JobState::Failed);
        let error = ended.error.unwrap();
        assert!(error.contains(program) && error.contains(wanted), "{error}");
    }
    let mut job = host.job("");
    job.config.args.clear();
    let error = host.api.add_job(&job).await.unwrap_err();
    assert!(error.message.contains("config.args"), "{error}");
    assert_eq!(host.end(&job.id).await.status, JobState::Failed);
}
