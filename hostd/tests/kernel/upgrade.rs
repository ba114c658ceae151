//! Another program goes on with the daemon's work, or fails to, or nobody does for a while.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flynn_api::client::Http;
use flynn_api::client::host::HostClient;
use flynn_api::host::{ActiveJob, Job, JobEventKind, JobState, attach};
use flynn_api::tls::{Ca, Identity, PeerIdentity, install_provider};
use flynn_api::{Error, ErrorCode};
use flynn_hostd::identities;
use flynn_hostd::status::ProcessId;
use futures::StreamExt as _;
use futures::future::join_all;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::attached::{expect, read_all, request, send};
use crate::host::{BINARY, Host, PATIENCE, kill, lives};
use crate::network::{config, networked};

/// Lines that a short job says, and its exit status.
const LINES: usize = 50;
const EXIT: i32 = 7;

/// Says its lines, which the log has to have, and ends.
const SHORT: &str = "i=0; while [ $i -lt 50 ]; do i=$((i+1)); echo line $i; done; exit 7";

/// Counts until it is stopped.
const LONG: &str =
    "trap 'echo bye; exit 5' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.02; done";

fn rounds() -> usize {
    let long = std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1");
    if long { 100 } else { 10 }
}

/// A client over mutual TLS, as another host is one, for whose identity the host has its own.
fn over_tls(host: &Host) -> HostClient {
    install_provider();
    let dir = identities::host_dir(&host.state);
    let ca = Ca::create("test cluster").unwrap();
    let identity = PeerIdentity::Host("one".into());
    let issued = ca.issue(&identity, &["192.0.2.1".into()]).unwrap();
    issued.save(&dir).unwrap();
    let identity = Identity::load(&dir).unwrap();
    let http = Http::new("https://192.0.2.1:1113").unwrap();
    HostClient::new(http.identity(&identity).unwrap())
}

/// The numbers of the lines that a job has said, in their order.
fn numbers(lines: &[String]) -> Vec<usize> {
    let numbers = lines
        .iter()
        .filter_map(|line| line.strip_prefix("line ")?.parse().ok());
    numbers.collect()
}

async fn said(host: &Host, id: &str) -> Vec<String> {
    host.lines(id).await.into_iter().map(|line| line.msg).collect()
}

pub(crate) async fn an_update_is_noticed_by_nobody() {
    let host = Host::boot().await;
    let tls = over_tls(&host);
    assert!(host.until(async || tls.status().await.ok()).await.is_some());
    let first = host.daemon_pid();
    let long = host.job(LONG);
    let before = host.run(&long).await;
    let mut typed = host.job("exec cat");
    typed.config.stdin = true;
    host.run(&typed).await;
    let (mut attached, mut seen) = (host.api.attach(&request(&typed)).await.unwrap(), String::new());
    send(&mut attached, attach::STDIN, b"one\n").await;
    expect(&mut attached, &mut seen, "one\n").await;
    let followed = host.api.log(&long.id, None, true).await.unwrap();
    let mut events = host.api.job_events().await.unwrap();
    events.next().await.unwrap().unwrap();

    let updated = host.update(None).await.unwrap();
    assert_ne!(updated.pid, first);
    for api in [&host.api, &tls] {
        assert_eq!(api.status().await.unwrap().pid, updated.pid);
    }
    // Who is told of events hears that he has to ask again; all others go on.
    let ended = timeout(PATIENCE, async { while let Some(Ok(_)) = events.next().await {} });
    ended.await.unwrap();
    send(&mut attached, attach::STDIN, b"two\n").await;
    expect(&mut attached, &mut seen, "two\n").await;
    let after = host.wait(&long.id, |job| job.status == JobState::Running).await;
    assert_eq!(
        (after.pid, after.supervisor_pid, after.started_at, after.restarts),
        (before.pid, before.supervisor_pid, before.started_at, 0)
    );
    let mut events = host.api.job_events().await.unwrap();
    host.api.stop_job(&long.id).await.unwrap();
    let stop = async {
        loop {
            let (_, event) = events.next().await.unwrap().unwrap();
            if event.event == JobEventKind::Stop && event.job_id == long.id {
                return event.job.exit_status;
            }
        }
    };
    assert_eq!(timeout(PATIENCE, stop).await.unwrap(), Some(5));
    // The log was followed by way of the first daemon, to its end.
    let followed = followed.map(|line| line.unwrap().1.msg).collect::<Vec<_>>();
    let followed = timeout(PATIENCE, followed).await.unwrap();
    assert_eq!(followed.last().unwrap(), "bye");
    assert!(
        numbers(&followed).into_iter().eq(1..followed.len()),
        "{followed:?}"
    );
    assert!(!host.first_daemon_ended(), "it has a client");
    send(&mut attached, attach::STDIN, b"").await;
    assert_eq!(read_all(&mut attached).await.2, 0);
    drop(attached);
    let ended = host.until(async || host.first_daemon_ended().then_some(()));
    assert!(
        ended.await.is_some(),
        "nothing is left for the first daemon to do"
    );
    host.finish(&host.job("true")).await;
}

/// One that has handed over and has clients yet ends when the other is killed: whoever restarts daemons sees that there is
/// none.
pub(crate) async fn nobody_lingers_without_a_successor() {
    let host = Host::boot().await;
    let mut typed = host.job("exec cat");
    typed.config.stdin = true;
    let before = host.run(&typed).await;
    let attached = host.api.attach(&request(&typed)).await.unwrap();
    // Nor is it enough that the successor has ended, which has handed over as well.
    let next = host.update(None).await.unwrap();
    let last = host.update(None).await.unwrap();
    // The first one finds that the second has gone, and that the third is there.
    let noticed = || host.log().contains("has handed over in its turn");
    let looked = host.until(async || (!lives(next.pid) && noticed()).then_some(()));
    assert!(looked.await.is_some(), "{}", host.log());
    assert!(!host.first_daemon_ended(), "it has a client");
    kill(last.pid, 9);
    let ended = host.until(async || host.first_daemon_ended().then_some(()));
    assert!(ended.await.is_some(), "{}", host.log());
    drop(attached);
    host.kill_daemon();
    host.start().await;
    let after = host.wait(&typed.id, |job| job.status == JobState::Running).await;
    assert_eq!(after.pid, before.pid);
}

/// A program that is no good.
fn program(host: &Host, name: &str, script: &str) -> PathBuf {
    let path = host.state.join(name);
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

pub(crate) async fn an_update_that_fails_changes_nothing() {
    let host = Host::boot().await;
    // Of its own, beside which others can be put.
    let place = host.state.join("bin");
    fs::create_dir(&place).unwrap();
    host.stop_daemon();
    fs::copy(BINARY, place.join("flynn-host")).unwrap();
    host.start_program(&place.join("flynn-host")).await;
    let pid = host.daemon_pid();
    let mut long = host.job(LONG);
    long.resurrect = true;
    let before = host.run(&long).await;
    let say = |text: &str| format!("echo '{text}' >&0; ");
    let hello = say(r#"{"say":"hello","handover":1,"version":"9"}"#);
    let prepared = say(r#"{"say":"prepared"}"#);
    // One packet of the daemon's.
    let hear = "dd bs=65536 count=1 >/dev/null 2>&1; ";
    let script = |text: String| format!("#!/bin/sh\n{text}");
    let bad = [
        ("exits", script("exit 3".into()), "exit status: 3"),
        (
            "old",
            script(say(r#"{"say":"hello","handover":0,"version":"0.0"}"#) + "cat"),
            "protocol 0",
        ),
        ("babbles", script(say("good morning") + "cat"), "not understood"),
        (
            "refuses",
            script(hello.clone() + hear + &say(r#"{"say":"failed","why":"no room"}"#) + "cat"),
            "no room",
        ),
        ("dies", script(format!("{hello}{hear}kill -9 $$")), "signal: 9"),
        ("hangs", script("exec sleep 1000".into()), "within 10 s"),
        (
            "nothing",
            "\x7fELF nonsense".to_owned(),
            "no program for this machine",
        ),
    ];
    for (name, text, why) in &bad {
        let error = host.update(Some(&program(&host, name, text))).await.unwrap_err();
        assert!(error.message.contains(why), "{name}: {error}");
        assert_eq!(host.api.status().await.unwrap().pid, pid, "{name}");
    }
    let plain = program(&host, "plain", "");
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    for (path, why) in [
        (plain.as_path(), "not executable"),
        (Path::new("/no/such"), "cannot be read"),
        (Path::new("flynn-host"), "no absolute path"),
        (Path::new("/etc"), "no file"),
    ] {
        let error = host.update(Some(path)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Validation, "{error}");
        assert!(error.message.contains(why), "{error}");
    }
    // It fails when nobody acts any more: the daemon begins anew, and has what it had.
    let late = program(
        &host,
        "late",
        &script(format!("{hello}{hear}{prepared}{hear}exit 4")),
    );
    let error = host.update(Some(&late)).await.unwrap_err();
    assert!(error.message.contains("exit status: 4"), "{error}");
    assert_eq!(host.api.status().await.unwrap().pid, pid);
    let after = host.wait(&long.id, |job| job.status == JobState::Running).await;
    assert_eq!(
        (after.pid, after.supervisor_pid, after.restarts),
        (before.pid, before.supervisor_pid, 0)
    );
    let here: Vec<_> = fs::read_dir(&place)
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    assert_eq!(here, ["flynn-host"], "nothing is left of them");
    let (ended, lines) = host.finish(&host.job(SHORT)).await;
    assert_eq!((ended.exit_status, lines.len()), (Some(EXIT), LINES));
    host.update(None).await.unwrap();
    host.api.stop_job(&long.id).await.unwrap();
    assert_eq!(host.end(&long.id).await.exit_status, Some(5));
    let lines = said(&host, &long.id).await;
    assert!(numbers(&lines).into_iter().eq(1..lines.len()), "{lines:?}");
}

pub(crate) async fn a_new_program_is_put_in_place() {
    let host = Host::new(|_| {});
    let place = host.state.join("bin");
    fs::create_dir(&place).unwrap();
    let (own, other) = (place.join("flynn-host"), place.join("other"));
    fs::copy(BINARY, &own).unwrap();
    fs::copy(BINARY, &other).unwrap();
    // As large a program with another end.
    let end = fs::OpenOptions::new().append(true).open(&other).unwrap();
    std::io::Write::write_all(&mut &end, b"new").unwrap();
    drop(end);
    host.start_program(&own).await;
    host.put_layer(&host.layer_file).await.unwrap();
    let updated = host.update(Some(&other)).await.unwrap();
    assert!(fs::read(&own).unwrap().ends_with(b"new"));
    assert_eq!(fs::read_link(format!("/proc/{}/exe", updated.pid)).unwrap(), own);
    host.finish(&host.job("true")).await;
    // What somebody else has put there is taken up as it is.
    let newer = place.join("newer");
    fs::copy(&other, &newer).unwrap();
    fs::rename(&newer, &own).unwrap();
    let again = host.update(None).await.unwrap();
    assert_eq!(fs::read_link(format!("/proc/{}/exe", again.pid)).unwrap(), own);
    host.finish(&host.job("true")).await;
}

/// A supervisor of another version: it says this of its job, and answers these wishes alone.
async fn pretend(listener: UnixListener, status: serde_json::Value, knows: &'static [&'static str]) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let status = status.clone();
        connections.spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            while stream.read_line(&mut line).await.is_ok_and(|length| length > 0) {
                let request: serde_json::Value = serde_json::from_str(&line).unwrap();
                let op = request["op"].as_str().unwrap().to_owned();
                line.clear();
                let answer = if op == "watch" {
                    status.clone()
                } else {
                    let known = knows.contains(&op.as_str());
                    json!({"error": (!known).then_some("what is that?"), "more": 1})
                };
                let answer = format!("{answer}\n");
                stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
            }
        });
    }
}

pub(crate) async fn supervisors_of_other_versions_are_understood() {
    let host = Host::boot().await;
    let model = host.job("sleep 1000");
    host.run(&model).await;
    let jobs = host.state.join("jobs");
    let read = |id: &str, file: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(jobs.join(id).join(file)).unwrap()).unwrap()
    };
    host.kill_daemon();
    for (id, knows) in [
        ("one-older", ["stop", "signal", "go"].as_slice()),
        ("one-newer", &["stop", "signal", "go", "pause"]),
    ] {
        let mut job = read(&model.id, "job.json");
        job["id"] = json!(id);
        let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let mut status = read(&model.id, "status.json");
        status["supervisor"] = json!(ProcessId::of(process.id().cast_signed()).unwrap());
        let fields = status.as_object_mut().unwrap();
        if id == "one-older" {
            fields.remove("protocol");
            fields.remove("paused");
        } else {
            fields.insert("protocol".into(), json!(99));
            fields.insert("mood".into(), json!("good"));
        }
        fs::create_dir(jobs.join(id)).unwrap();
        fs::write(jobs.join(id).join("job.json"), job.to_string()).unwrap();
        fs::write(jobs.join(id).join("status.json"), status.to_string()).unwrap();
        let listener = UnixListener::bind(format!("/run/flynn/jobs/{id}.sock")).unwrap();
        let pretending = tokio::spawn(pretend(listener, status, knows));
        host.start().await;
        let job = host.wait(id, |job| job.status == JobState::Running).await;
        assert_eq!(job.supervisor_pid, Some(process.id()));
        host.api.signal_job(id, 10).await.unwrap();
        let paused = host.api.pause_job(id).await;
        if id == "one-older" {
            let error = paused.unwrap_err();
            assert!(error.message.contains("earlier version"), "{error}");
        } else {
            paused.unwrap();
        }
        host.api.stop_job(id).await.unwrap();
        pretending.abort();
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(host.end(id).await.status, JobState::Done);
        host.kill_daemon();
    }
    host.start().await;
    // What a supervisor of ours does not know it refuses.
    let stream = UnixStream::connect(format!("/run/flynn/jobs/{}.sock", model.id))
        .await
        .unwrap();
    let mut stream = BufReader::new(stream);
    stream.get_mut().write_all(b"{\"op\":\"sing\"}\n").await.unwrap();
    let mut answer = String::new();
    stream.read_line(&mut answer).await.unwrap();
    assert!(answer.contains("does not know"), "{answer}");
}

/// Runs a job, whatever becomes of the daemon: asks again where that is to be expected (`asks_again`).
async fn run_whatever(host: &Host, job: &Job, asks_again: bool) -> Option<ActiveJob> {
    let mut asked = 0;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while let Err(error) = host.api.add_job(job).await {
        assert!(asks_again && is_away(&error), "{error}\n{}", host.log());
        assert!(tokio::time::Instant::now() < deadline, "{error}");
        asked += 1;
        sleep(Duration::from_millis(20)).await;
    }
    let ended = ended(host, &job.id, asks_again).await;
    // Its start was cut off before anybody was told of it.
    let cut = asked > 0 && ended.started_at.is_none();
    (!cut).then_some(ended)
}

fn is_away(error: &Error) -> bool {
    error.code == ErrorCode::Unavailable || error.message.starts_with("no answer")
}

async fn ended(host: &Host, id: &str, asks_again: bool) -> ActiveJob {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match host.api.job(id).await {
            Ok(job) if job.status.is_terminal() => return job,
            Ok(job) => assert!(tokio::time::Instant::now() < deadline, "{job:#?}\n{}", host.log()),
            Err(error) => assert!(asks_again && is_away(&error), "{error}\n{}", host.log()),
        }
        sleep(Duration::from_millis(5)).await;
    }
}

async fn lines_whatever(host: &Host, id: &str) -> Vec<String> {
    let lines = host.until(async || {
        let log = host.api.log(id, None, false).await.ok()?;
        let lines: Vec<_> = log.collect().await;
        lines.into_iter().map(|line| Some(line.ok()?.1.msg)).collect()
    });
    lines.await.unwrap()
}

/// What goes on all the time: jobs that come, speak and go, in either network. Gives how many there were.
async fn load(host: &Host, enough: &Cell<bool>, asks_again: bool) -> usize {
    let worker = async |in_host: bool| {
        let mut done = 0;
        while !enough.get() {
            let job = if in_host {
                host.job(SHORT)
            } else {
                networked(host, SHORT)
            };
            if let Some(ended) = run_whatever(host, &job, asks_again).await {
                assert_eq!(
                    (ended.status, ended.exit_status),
                    (JobState::Crashed, Some(EXIT)),
                    "{ended:#?}\n{}",
                    host.log()
                );
                let lines = numbers(&lines_whatever(host, &job.id).await);
                assert!(lines.iter().copied().eq(1..=LINES), "{}: {lines:?}", job.id);
                done += 1;
            }
        }
        done
    };
    join_all([true, false, false].map(worker)).await.into_iter().sum()
}

/// What is there for as long as the test is.
struct Standing {
    jobs: Vec<(Job, ActiveJob)>,
}

impl Standing {
    async fn begin(host: &Host) -> Self {
        host.api.configure_network(&config()).await.unwrap();
        let mut kept = networked(host, LONG);
        kept.resurrect = true;
        let mut jobs = Vec::new();
        for job in [host.job(LONG), networked(host, LONG), kept] {
            let running = host.run(&job).await;
            jobs.push((job, running));
        }
        Self { jobs }
    }

    async fn check(&self, host: &Host) {
        for (job, before) in &self.jobs {
            let after = host.wait(&job.id, |job| job.status == JobState::Running).await;
            assert_eq!(
                (
                    after.pid,
                    after.supervisor_pid,
                    after.started_at,
                    after.restarts,
                    after.internal_ip
                ),
                (
                    before.pid,
                    before.supervisor_pid,
                    before.started_at,
                    0,
                    before.internal_ip
                )
            );
        }
    }

    async fn end(self, host: &Host) {
        for (job, _) in &self.jobs {
            host.api.stop_job(&job.id).await.unwrap();
            assert_eq!(host.end(&job.id).await.exit_status, Some(5));
            let lines = said(host, &job.id).await;
            assert_eq!(lines.last().unwrap(), "bye");
            assert!(numbers(&lines).into_iter().eq(1..lines.len()), "{}", job.id);
        }
    }
}

pub(crate) async fn updates_under_load_lose_nothing() {
    let host = Host::boot().await;
    let tls = over_tls(&host);
    let standing = Standing::begin(&host).await;
    assert!(host.until(async || tls.status().await.ok()).await.is_some());
    let enough = Cell::new(false);
    let updates = async {
        for round in 0..rounds() {
            let before = host.daemon_pid();
            let updated = host.update(None).await;
            let updated = updated.unwrap_or_else(|error| panic!("update {round}: {error}\n{}", host.log()));
            assert_ne!(updated.pid, before);
            standing.check(&host).await;
        }
        enough.set(true);
    };
    // Others ask all the time, over connections that they keep and ones that they make.
    let asking = async {
        let mut asked = 0;
        while !enough.get() {
            for result in [tls.status().await, host.api.status().await, over_new().await] {
                result.unwrap_or_else(|error| panic!("{error}\n{}", host.log()));
                asked += 1;
            }
            sleep(Duration::from_millis(10)).await;
        }
        asked
    };
    let attaching = async {
        let mut attached = 0;
        while !enough.get() {
            let mut job = host.job("read line; echo got $line; exit 9");
            job.config.stdin = true;
            let wish = request(&job);
            let (client, added) = tokio::join!(host.api.attach(&wish), host.api.add_job(&job));
            added.unwrap_or_else(|error| panic!("{error}\n{}", host.log()));
            let mut client = client.unwrap_or_else(|error| panic!("{error}\n{}", host.log()));
            send(&mut client, attach::STDIN, b"it\n").await;
            let (out, _, exit) = read_all(&mut client).await;
            assert_eq!((out.as_slice(), exit), (b"got it\n".as_slice(), 9));
            attached += 1;
        }
        attached
    };
    let ((), asked, attached, done) = tokio::join!(updates, asking, attaching, load(&host, &enough, false));
    assert!(asked > 0 && attached > 0 && done > 0, "{asked} {attached} {done}");
    println!(
        "{} updates: {done} jobs, {attached} attached, {asked} calls",
        rounds()
    );
    standing.end(&host).await;
    assert!(lives(host.daemon_pid()));
}

async fn over_new() -> flynn_api::Result<flynn_api::host::HostStatus> {
    HostClient::new(Http::new("unix:/run/flynn/host.sock")?)
        .status()
        .await
}

pub(crate) async fn kills_under_load_lose_nothing() {
    let host = Host::boot().await;
    let standing = Standing::begin(&host).await;
    let enough = Cell::new(false);
    let kills = async {
        for round in 0..rounds() {
            // Each time another moment of what goes on.
            sleep(Duration::from_millis(u64::try_from(round * 37 % 250).unwrap())).await;
            host.kill_daemon();
            host.start().await;
            standing.check(&host).await;
        }
        enough.set(true);
    };
    let ((), done) = tokio::join!(kills, load(&host, &enough, true));
    assert!(done > 0);
    println!("{} kills: {done} jobs", rounds());
    standing.end(&host).await;
}
