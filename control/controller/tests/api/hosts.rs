//! One-off jobs and logs, with a host that only pretends.

use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::client::controller::LogOptions;
use flynn_api::controller::{App, Job, JobState, NewJob};
use flynn_api::host::{ExecRequest, ForwardRequest, attach};
use flynn_api::tls::PeerIdentity;
use flynn_api::{Env, Error, ErrorCode};
use futures::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::common::controller::{job, start_with};
use crate::common::{eventually, host, next, trial};

pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    vec![
        trial("a_detached_job_is_given_to_a_host", detached),
        trial("a_refused_job_is_recorded_as_down", refused),
        trial("an_attached_job_is_piped_both_ways_to_its_exit", attached),
        trial("a_program_beside_a_job_is_piped_both_ways", beside),
        trial("a_port_of_a_job_is_passed_on", forwarded),
        trial("an_attached_job_without_its_caller_is_stopped", abandoned),
        trial("without_hosts_the_way_out_is_named", no_hosts),
        trial("a_job_is_stopped_on_its_host", stop),
        trial("the_log_of_an_app_is_that_of_all_its_jobs", log),
    ]
}

fn new_job(release: &str) -> NewJob {
    NewJob {
        release_id: release.into(),
        args: vec!["echo".into(), "hi".into()],
        release_env: true,
        env: Env::from([("EXTRA".into(), "1".into())]),
        ..NewJob::default()
    }
}

async fn detached() {
    let (host, options) = host::start().await;
    let running = start_with(options).await;
    let (app, release, _) = running.running_app("shop", 0).await;
    let job = running
        .client
        .run_detached("shop", &new_job(&release.id))
        .await
        .unwrap();
    assert!(job.id.starts_with("host1-") && job.state == JobState::Starting);
    let (callers, given) = {
        let seen = host.seen.lock().unwrap();
        (seen.callers.clone(), seen.jobs[&job.id].clone())
    };
    assert_eq!(callers, [Some(PeerIdentity::Job("controller".into()))]);
    assert_eq!(
        (given.config.args.join(" ").as_str(), given.artifacts.len()),
        ("echo hi", 1)
    );
    assert_eq!(given.config.env["SECRET_KEY"], "s3cret-value");
    assert_eq!(
        (
            given.config.env["EXTRA"].as_str(),
            given.config.env["FLYNN_APP_ID"].as_str()
        ),
        ("1", app.id.as_str())
    );
    assert!(!given.config.stdin, "nobody will attach");
    assert_eq!(
        running.client.job("shop", &job.id).await.unwrap().args,
        ["echo", "hi"]
    );
    let unknown = running
        .client
        .run_detached("shop", &new_job("x"))
        .await
        .unwrap_err();
    assert!(unknown.message.starts_with("release: "), "{unknown}");
    running.stop().await;
}

async fn refused() {
    let (host, options) = host::start().await;
    let running = start_with(options).await;
    let (_, release, _) = running.running_app("shop", 0).await;
    let full = Error::new(ErrorCode::LimitExceeded, "the disk is full: delete something");
    host.seen.lock().unwrap().refuse = Some(full);
    let why = running
        .client
        .run_detached("shop", &new_job(&release.id))
        .await
        .unwrap_err();
    assert_eq!(why.code, ErrorCode::LimitExceeded);
    assert!(
        why.message.contains("host1") && why.message.contains("delete something"),
        "{why}"
    );
    let jobs = running.client.jobs("shop").await.unwrap();
    assert_eq!((jobs.len(), jobs[0].state), (1, JobState::Down));
    assert!(jobs[0].host_error.as_ref().unwrap().contains("disk is full"));
    running.stop().await;
}

async fn attached() {
    let (host, options) = host::start().await;
    let running = start_with(options).await;
    let (_, release, _) = running.running_app("shop", 0).await;
    let mut stream = running
        .client
        .run_attached("shop", &new_job(&release.id))
        .await
        .unwrap();
    let big = vec![b'x'; 300_000];
    write_frame(&mut stream, attach::STDIN, b"one").await.unwrap();
    write_frame(&mut stream, attach::STDIN, &big).await.unwrap();
    write_frame(&mut stream, attach::STDIN, b"").await.unwrap();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let status = loop {
        let frame = read_frame(&mut stream)
            .await
            .unwrap()
            .expect("the exit frame comes before the end");
        match frame.kind {
            attach::STDOUT => stdout.extend(frame.payload),
            attach::STDERR => stderr.extend(frame.payload),
            attach::EXIT => break i32::from_be_bytes(frame.payload.try_into().unwrap()),
            other => panic!("frame of kind {other}"),
        }
    };
    assert_eq!(
        (stdout.len(), &stdout[..8], stderr.as_slice(), status),
        (8 + big.len(), &b"helloone"[..], &b"bye"[..], 7)
    );
    assert_eq!(
        read_frame(&mut stream).await.unwrap(),
        None,
        "and nothing follows it"
    );
    let job: Job = eventually("the job is down", || async {
        let jobs = running.client.jobs("shop").await.unwrap();
        jobs.into_iter().find(|job| job.state == JobState::Down)
    })
    .await;
    assert_eq!(job.exit_status, Some(7));
    assert!(host.seen.lock().unwrap().jobs[&job.id].config.stdin);
    running.stop().await;
}

async fn beside() {
    let (_host, options) = host::start().await;
    let running = start_with(options).await;
    let (_, release, _) = running.running_app("shop", 0).await;
    let client = &running.client;
    let job = client.run_detached("shop", &new_job(&release.id)).await.unwrap();
    let request = ExecRequest {
        args: vec!["psql".into()],
        stdin: true,
        ..ExecRequest::default()
    };
    let mut stream = client.exec("shop", &job.id, &request).await.unwrap();
    write_frame(&mut stream, attach::STDIN, b"?").await.unwrap();
    let said = read_frame(&mut stream).await.unwrap().unwrap();
    assert_eq!(
        (said.kind, said.payload.as_slice()),
        (attach::STDOUT, &b"psql?"[..])
    );
    let end = read_frame(&mut stream).await.unwrap().unwrap();
    assert_eq!(
        (end.kind, end.payload),
        (attach::EXIT, 3i32.to_be_bytes().to_vec())
    );

    let none = "host1-00000000-0000-4000-8000-000000000000";
    let refused = client.exec("shop", none, &request).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotFound);
    running.stop().await;
}

async fn forwarded() {
    let (_host, options) = host::start().await;
    let running = start_with(options).await;
    let (_, release, _) = running.running_app("shop", 0).await;
    let client = &running.client;
    let job = client.run_detached("shop", &new_job(&release.id)).await.unwrap();
    let request = ForwardRequest { port: 5432 };
    let mut stream = client.forward("shop", &job.id, &request).await.unwrap();
    stream.write_all(b"?").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "5432?");
    running.stop().await;
}

async fn abandoned() {
    let (host, options) = host::start().await;
    let running = start_with(options).await;
    let (_, release, _) = running.running_app("shop", 0).await;
    let body = serde_json::to_string(&new_job(&release.id)).unwrap();
    let auth = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, ":test-key");
    let request = format!(
        "POST /apps/shop/jobs HTTP/1.1\r\nHost: c\r\nAuthorization: Basic {auth}\r\nConnection: Upgrade\r\n\
         Upgrade: flynn-attach/0\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let stopped = |count: usize| {
        let seen = &host.seen;
        eventually("the job is stopped", move || async move {
            let seen = seen.lock().unwrap();
            let known = seen.stopped.iter().all(|job| seen.jobs.contains_key(job));
            (seen.stopped.len() == count && known).then_some(())
        })
    };
    for (before, orderly) in [false, true].into_iter().enumerate() {
        let mut raw = tokio::net::TcpStream::connect(running.addr).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut raw, request.as_bytes())
            .await
            .unwrap();
        let mut head = vec![0; 12];
        tokio::io::AsyncReadExt::read_exact(&mut raw, &mut head)
            .await
            .unwrap();
        assert_eq!(head, b"HTTP/1.1 101");
        if orderly {
            // Whoever closes their side has left.
            tokio::io::AsyncWriteExt::shutdown(&mut raw).await.unwrap();
            stopped(before + 1).await;
        } else {
            // A connection with unread bytes is reset when it is closed.
            drop(raw);
            stopped(before + 1).await;
        }
    }
    running.stop().await;
}

async fn no_hosts() {
    let running = crate::common::controller::start().await;
    let (_, release, _) = running.running_app("shop", 0).await;
    let why = running
        .client
        .run_detached("shop", &new_job(&release.id))
        .await
        .unwrap_err();
    assert_eq!((why.code, why.retry), (ErrorCode::Unavailable, true));
    assert!(why.message.contains("discoverd"), "{why}");
    let app = running
        .client
        .create_app(&App {
            name: "bare".into(),
            ..App::default()
        })
        .await
        .unwrap();
    let empty = flynn_api::controller::Release {
        app_id: Some(app.id),
        ..Default::default()
    };
    let empty = running.client.create_release(&empty).await.unwrap();
    let why = running
        .client
        .run_detached("bare", &new_job(&empty.id))
        .await
        .unwrap_err();
    assert!(why.message.starts_with("release: has no image"), "{why}");
    running.stop().await;
}

async fn stop() {
    let (host, options) = host::start().await;
    let running = start_with(options).await;
    let (app, release, jobs) = running.running_app("shop", 1).await;
    running.client.kill_job("shop", &jobs[0].id).await.unwrap();
    assert_eq!(host.seen.lock().unwrap().stopped, [jobs[0].id.clone()]);
    let elsewhere = Job {
        host_id: "host9".into(),
        id: String::new(),
        ..job(&app, &release, "web", JobState::Up)
    };
    running.client.put_job(&elsewhere).await.unwrap();
    let why = running
        .client
        .kill_job("shop", &elsewhere.uuid)
        .await
        .unwrap_err();
    assert!(why.message.contains("host9 is not there"), "{why}");
    let mut pending = job(&app, &release, "web", JobState::Pending);
    (pending.id, pending.host_id) = (String::new(), String::new());
    running.client.put_job(&pending).await.unwrap();
    let why = running.client.kill_job("shop", &pending.uuid).await.unwrap_err();
    assert!(why.message.contains("scale its process type down"), "{why}");
    running.stop().await;
}

async fn log() {
    let (host, options) = host::start().await;
    let running = start_with(options).await;
    let client = &running.client;
    let (app, release, jobs) = running.running_app("shop", 1).await;
    let ended = job(&app, &release, "worker", JobState::Down);
    client.put_job(&ended).await.unwrap();
    for second in 0..6 {
        let job = if second % 2 == 0 { &jobs[0] } else { &ended };
        host.say(&job.id, second, &format!("line {second}"));
    }
    let read = async |options: LogOptions| -> Vec<String> {
        let lines = client.log("shop", &options).await.unwrap();
        lines.map(|line| line.unwrap().1.msg).collect().await
    };
    let all = ["line 0", "line 1", "line 2", "line 3", "line 4", "line 5"];
    assert_eq!(
        read(LogOptions::default()).await,
        all,
        "ended jobs included, in the order of time"
    );
    assert_eq!(
        read(LogOptions {
            lines: Some(2),
            ..LogOptions::default()
        })
        .await,
        all[4..]
    );
    let workers = LogOptions {
        process_type: Some("worker".into()),
        ..LogOptions::default()
    };
    assert_eq!(read(workers).await, ["line 1", "line 3", "line 5"]);
    let one = LogOptions {
        job_id: Some(jobs[0].id.clone()),
        ..LogOptions::default()
    };
    assert_eq!(read(one).await, ["line 0", "line 2", "line 4"]);
    let json = running.http().send(
        http::Request::get("/apps/shop/log?lines=1")
            .body(flynn_api::client::full(""))
            .unwrap(),
    );
    let json = http_body_util::BodyExt::collect(json.await.unwrap().into_body())
        .await
        .unwrap()
        .to_bytes();
    let line: serde_json::Value = serde_json::from_slice(json.strip_suffix(b"\n").unwrap()).unwrap();
    assert_eq!(
        (&line["msg"], &line["process_type"]),
        (&"line 5".into(), &"worker".into())
    );

    let follow = LogOptions {
        follow: true,
        lines: Some(1),
        ..LogOptions::default()
    };
    let mut lines = client.log("shop", &follow).await.unwrap();
    let mut line = async |what: &str| next(&mut lines, what).await.1;
    assert_eq!(line("the last of the past").await.msg, "line 5");
    let quiet = LogOptions {
        follow: true,
        lines: Some(0),
        ..LogOptions::default()
    };
    let mut new_lines = client.log("shop", &quiet).await.unwrap();
    // The same second again, and one later: neither is mistaken for what was read before.
    host.say(&jobs[0].id, 4, "same second");
    host.say(&jobs[0].id, 7, "later");
    assert_eq!(line("of a time seen before").await.msg, "same second");
    assert_eq!(
        next(&mut new_lines, "nothing of the past").await.1.msg,
        "same second"
    );
    assert_eq!(line("of a later time").await.msg, "later");
    let new = job(&app, &release, "web", JobState::Up);
    host.say(&new.id, 8, "from a new job");
    client.put_job(&new).await.unwrap();
    let line = line("of a job that came later").await;
    assert_eq!(
        (line.msg.as_str(), line.job_id.as_str()),
        ("from a new job", new.id.as_str())
    );
    drop((lines, new_lines));
    running.stop().await;
}
