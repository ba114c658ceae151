//! A job from its first word to its last.

use flynn_api::ErrorCode;
use flynn_api::client::Http;
use flynn_api::host::{ExecRequest, HealthCheck, JobEventKind, JobState, Port, Service};
use futures::StreamExt as _;

use crate::host::{Host, PATIENCE, lives};

pub(crate) async fn signals_and_stops() {
    let host = Host::boot().await;
    let job = host.job(
        "trap 'echo got usr1' USR1; trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done",
    );
    host.run(&job).await;
    host.says(&job.id, "ready").await;
    host.api.signal_job(&job.id, 10).await.unwrap();
    host.says(&job.id, "got usr1").await;
    host.api.stop_job(&job.id).await.unwrap();
    let ended = host.end(&job.id).await;
    assert_eq!((ended.status, ended.exit_status), (JobState::Done, Some(5)));
    host.says(&job.id, "bye").await;
    // Again: nothing happens. Of what never was: not found.
    host.api.stop_job(&job.id).await.unwrap();
    assert_eq!(
        host.api.stop_job("one-none").await.unwrap_err().code,
        ErrorCode::NotFound
    );
    assert_eq!(
        host.api.signal_job(&job.id, 10).await.unwrap_err().code,
        ErrorCode::Conflict
    );
}

pub(crate) async fn kills_who_does_not_stop() {
    let host = Host::boot().await;
    let mut job = host.job(
        "trap '' TERM; (trap '' TERM; while :; do sleep 1; done) & echo ready; while :; do sleep 1; done",
    );
    job.stop_timeout = Some(1);
    let running = host.run(&job).await;
    host.says(&job.id, "ready").await;
    host.api.stop_job(&job.id).await.unwrap();
    let ended = host.end(&job.id).await;
    assert_eq!((ended.status, ended.exit_status), (JobState::Done, Some(137)));
    assert!(!lives(running.pid.unwrap()));
}

pub(crate) async fn restarts_what_is_to_be_kept() {
    let host = Host::boot().await;
    let mut job = host.job("echo run; sleep 0.05; exit 1");
    job.resurrect = true;
    let first = host.run(&job).await;
    let third = host.wait(&job.id, |job| job.restarts >= 2).await;
    assert_eq!(first.supervisor_pid, third.supervisor_pid);
    assert!(
        host.lines(&job.id)
            .await
            .iter()
            .any(|line| line.msg.contains("starting it again in 250 ms"))
    );
    host.api.stop_job(&job.id).await.unwrap();
    assert_eq!(host.end(&job.id).await.status, JobState::Done);
}

pub(crate) async fn rotates_logs() {
    let host = Host::boot().await;
    // 34 MB of output, which is some 50 in the log.
    let job = host.job(
        "yes 0123456789012345678901234567890123456789012345678901234567890123 | head -n 500000; echo last",
    );
    host.run(&job).await;
    host.end(&job.id).await;
    let log = host.state.join("jobs").join(&job.id).join("log");
    let size: u64 = std::fs::read_dir(log)
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(size > 10 << 20 && size <= 20 << 20, "{size}");
    let lines = host.lines(&job.id).await;
    assert_eq!(lines.last().unwrap().msg, "last");
}

pub(crate) async fn follows_logs() {
    let host = Host::boot().await;
    let job = host.job(
        "trap 'for i in 3 4 5; do echo $i; done; printf partial; exit' USR1; echo 1; echo 2; while :; do sleep 0.05; done",
    );
    host.run(&job).await;
    host.says(&job.id, "2").await;
    let mut log = host.api.log(&job.id, Some(1), true).await.unwrap();
    let next = tokio::time::timeout(PATIENCE, log.next()).await.unwrap();
    assert_eq!(next.unwrap().unwrap().1.msg, "2");
    host.api.signal_job(&job.id, 10).await.unwrap();
    let rest = tokio::time::timeout(PATIENCE, log.map(|line| line.unwrap().1.msg).collect::<Vec<_>>());
    assert_eq!(rest.await.unwrap(), ["3", "4", "5", "partial"]);
}

pub(crate) async fn refuses_bad_jobs() {
    let host = Host::boot().await;
    // Each on a connection of its own: a server that has refused a body half way closes the one it came on.
    let put = async |path: &str, body: &str| {
        let request = http::Request::put(path)
            .body(flynn_api::client::full(body.to_owned()))
            .unwrap();
        Http::new("unix:/run/flynn/host.sock")
            .unwrap()
            .send(request)
            .await
            .unwrap_err()
    };
    for (body, wanted) in [
        ("{", "JSON"),
        (r#"{"id":"one-1","confg":{}}"#, "confg"),
        (r#"{"id":"one-2"}"#, "one-2"),
        (r#"{"id":"one-1"}"#, "artifacts"),
    ] {
        let error = put("/host/jobs/one-1", body).await;
        assert_eq!(error.code, ErrorCode::Validation, "{error}");
        assert!(error.message.contains(wanted), "{error}");
    }
    let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(5 << 20));
    assert_eq!(
        put("/host/jobs/one-1", &long).await.code,
        ErrorCode::LimitExceeded
    );

    let job = host.job("sleep 100");
    host.run(&job).await;
    // The same again is the same; another one of that id is refused.
    host.api.add_job(&job).await.unwrap();
    let mut other = job.clone();
    other.config.tty = true;
    assert_eq!(
        host.api.add_job(&other).await.unwrap_err().code,
        ErrorCode::ObjectExists
    );

    let mut unknown = host.job("true");
    unknown.artifacts[0].manifest.as_mut().unwrap().rootfs[0].layers[0].id = flynn_api::Digest::of(b"none");
    let error = host.api.add_job(&unknown).await.unwrap_err();
    assert!(error.message.contains("not on this host"), "{error}");
    let error = host.api.add_job(&unknown).await.unwrap_err();
    assert!(error.message.contains("not on this host"), "again: {error}");

    let mut networked = host.job("true");
    networked.config.host_network = false;
    let error = host.api.add_job(&networked).await.unwrap_err();
    assert!(
        error.code == ErrorCode::Unavailable && error.message.contains("bootstrap"),
        "{error}"
    );
}

pub(crate) async fn reports_events() {
    let host = Host::boot().await;
    let old = host.job("sleep 100");
    host.run(&old).await;
    let mut events = host.api.job_events().await.unwrap();
    let mut job = host.job("sleep 0.1; exit 4");
    job.config.env.insert("SOME_TOKEN".into(), "hush".into());
    host.run(&job).await;
    let mut seen = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(PATIENCE, events.next()).await {
        let (_, event) = event.unwrap();
        assert!(!format!("{event:?}").contains("hush"));
        seen.push((event.event, event.job_id, event.job.exit_status));
        if seen.last().unwrap().0 == JobEventKind::Stop {
            break;
        }
    }
    let new = |kind, exit| (kind, job.id.clone(), exit);
    assert_eq!(
        seen,
        [
            (JobEventKind::Current, old.id.clone(), None),
            new(JobEventKind::Create, None),
            new(JobEventKind::Start, None),
            new(JobEventKind::Stop, Some(4)),
        ]
    );
    assert!(!format!("{:?}", host.api.jobs().await.unwrap()).contains("hush"));
}

pub(crate) async fn checks_ports() {
    let host = Host::boot().await;
    let taken = std::net::TcpListener::bind("0.0.0.0:7000").unwrap();
    let mut job = host.job("true");
    job.config.ports = vec![Port {
        port: 7000,
        proto: "tcp".into(),
        service: None,
    }];
    let error = host.api.add_job(&job).await.unwrap_err();
    assert!(
        error.code == ErrorCode::Conflict && error.message.contains("port 7000/tcp"),
        "{error}"
    );
    drop(taken);
    job.id = "one-free".into();
    job.config.ports.push(Port {
        port: 0,
        proto: "tcp".into(),
        service: None,
    });
    job.config.args = ["/bin/sh", "-c", "echo $PORT $PORT_1"].map(str::to_owned).into();
    let (_, lines) = host.finish(&job).await;
    let ports: Vec<u16> = lines[0].split(' ').map(|port| port.parse().unwrap()).collect();
    assert!(ports[0] == 7000 && ports[1] > 1024, "{ports:?}");
}

pub(crate) async fn pauses_and_resumes() {
    let host = Host::boot().await;
    let mut job = host.job(
        "trap 'exit 4' TERM; echo ready; i=0; while :; do i=$((i+1)); echo $i > /tmp/n; sleep 0.01; done",
    );
    job.config.ports = vec![checked("true", HealthCheck::default())];
    let running = host.run(&job).await;
    host.wait(&job.id, |job| job.healthy).await;
    host.api.pause_job(&job.id).await.unwrap();
    host.api.pause_job(&job.id).await.unwrap();
    let paused = host.wait(&job.id, |job| job.paused).await;
    assert!(!paused.healthy && paused.status == JobState::Running);
    // The state of each of its processes, and how much it has run.
    let at_work = || {
        let tasks = host.job_groups(&job.id).into_iter().flat_map(|group| {
            let procs = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
            procs.lines().map(str::to_owned).collect::<Vec<_>>()
        });
        let tasks: std::collections::BTreeSet<String> = tasks.collect();
        let stat = |pid: &String| std::fs::read_to_string(format!("/proc/{pid}/sched")).unwrap_or_default();
        let switches = |pid: &String| {
            let sched = stat(pid);
            let line = sched
                .lines()
                .find(|line| line.starts_with("nr_switches"))
                .unwrap_or_default();
            line.rsplit(' ').next().unwrap_or_default().to_owned()
        };
        tasks
            .iter()
            .map(|pid| (pid.clone(), switches(pid)))
            .collect::<Vec<_>>()
    };
    let before = at_work();
    assert!(before.len() >= 2, "{before:?}");
    // Ten of its rounds: that nothing happens is seen by waiting alone.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    assert_eq!(at_work(), before, "nothing moves");
    let refused = host
        .api
        .exec(
            &job.id,
            &ExecRequest {
                args: vec!["true".into()],
                ..ExecRequest::default()
            },
        )
        .await;
    assert!(refused.unwrap_err().message.contains("paused"));

    host.api.resume_job(&job.id).await.unwrap();
    let resumed = host.wait(&job.id, |job| !job.paused && job.healthy).await;
    assert_eq!((resumed.pid, resumed.restarts), (running.pid, 0));
    assert!(
        host.until(async || (at_work() != before).then_some(()))
            .await
            .is_some()
    );
    // A paused job hears that it is to stop.
    host.api.pause_job(&job.id).await.unwrap();
    host.api.stop_job(&job.id).await.unwrap();
    let ended = host.end(&job.id).await;
    assert_eq!(
        (ended.status, ended.exit_status, ended.paused),
        (JobState::Done, Some(4), false)
    );
    assert_eq!(
        host.api.pause_job(&job.id).await.unwrap_err().code,
        ErrorCode::Conflict
    );
}

/// A port whose service is checked by a command.
fn checked(command: &str, check: HealthCheck) -> Port {
    Port {
        port: 0,
        proto: "udp".into(),
        service: Some(Service {
            name: "checked".into(),
            check: Some(HealthCheck {
                kind: "command".into(),
                command: ["/bin/sh", "-c", command].map(str::to_owned).into(),
                interval: Some(50_000_000),
                ..check
            }),
            ..Service::default()
        }),
    }
}

pub(crate) async fn commands_check_health() {
    let host = Host::boot().await;
    let who = "echo $(id -u) $(grep -e CapEff -e NoNewPrivs -e Seccomp: /proc/self/status) $(hostname) $FLYNN_APP_NAME";
    let mut job = host.job(&format!(
        "trap 'rm -f /tmp/well' USR1; trap 'touch /tmp/well' USR2; trap 'exit 0' TERM; touch /tmp/well; {who}; \
         until [ -e /tmp/who ]; do sleep 0.05; done; cat /tmp/who; ls /proc | grep -c '^[0-9]'; cat /tmp/count; \
         while :; do sleep 0.05; done"
    ));
    job.config.uid = Some(1000);
    job.config.ports = vec![checked(
        // The program waits for the last of the two.
        &format!(
            "ls /proc | grep -c '^[0-9]' > /tmp/count; {who} > /tmp/new; mv /tmp/new /tmp/who; test -e /tmp/well"
        ),
        HealthCheck::default(),
    )];
    host.run(&job).await;
    host.wait(&job.id, |job| job.healthy).await;
    let lines = host
        .until(async || Some(host.lines(&job.id).await).filter(|lines| lines.len() >= 4))
        .await;
    let lines: Vec<String> = lines.unwrap().into_iter().map(|line| line.msg).collect();
    assert_eq!(lines[0], lines[1], "the check is what the program is");
    assert!(
        lines[0].starts_with("1000 ") && lines[0].contains("NoNewPrivs: 1"),
        "{lines:?}"
    );
    let processes: u32 = lines[3].parse().unwrap();
    assert!(
        processes < 8,
        "the check sees the container's processes alone, not {processes}"
    );

    host.api.signal_job(&job.id, 10).await.unwrap();
    host.wait(&job.id, |job| !job.healthy).await;
    host.api.signal_job(&job.id, 12).await.unwrap();
    host.wait(&job.id, |job| job.healthy).await;
    host.api.stop_job(&job.id).await.unwrap();
    let ended = host.end(&job.id).await;
    assert_eq!((ended.status, ended.exit_status), (JobState::Done, Some(0)));
    assert!(host.job_groups(&job.id).is_empty(), "nothing of a check is left");
}

pub(crate) async fn commands_that_fail_are_explained() {
    let host = Host::boot().await;
    let kill = HealthCheck {
        kill_down: true,
        start_timeout: Some(2),
        timeout: Some(20_000_000_000),
        ..HealthCheck::default()
    };
    for (command, why) in [
        (
            "echo no database; exit 3",
            "/bin/sh ended with status 3: no database",
        ),
        ("sleep 100", "/bin/sh: it took longer than 300 ms"),
        ("kill -9 $$", "/bin/sh ended with status 137"),
        // More than a pipe holds.
        ("yes | head -c 1000000; exit 1", "/bin/sh ended with status 1: y"),
    ] {
        let mut job = host.job("trap 'exit 0' TERM; while :; do sleep 0.05; done");
        let mut check = kill.clone();
        if command.starts_with("sleep") {
            check.timeout = Some(300_000_000);
        }
        job.config.ports = vec![checked(command, check)];
        host.run(&job).await;
        let ended = host.end(&job.id).await;
        assert_eq!(ended.status, JobState::Crashed, "{ended:?}");
        assert!(
            ended.error.as_deref().unwrap_or_default().contains(why),
            "{ended:?}"
        );
    }
    let mut job = host.job("while :; do sleep 0.05; done");
    job.config.ports = vec![checked("", kill)];
    let check = job.config.ports[0]
        .service
        .as_mut()
        .unwrap()
        .check
        .as_mut()
        .unwrap();
    check.command = vec!["/no/such".into()];
    host.run(&job).await;
    let ended = host.end(&job.id).await;
    assert!(
        ended
            .error
            .as_deref()
            .unwrap_or_default()
            .contains("cannot start /no/such"),
        "{ended:?}"
    );
}
