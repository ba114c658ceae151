//! Clients that leave, and clients that take their time.

use std::fs;
use std::time::Duration;

use flynn_api::client::attach::read_frame;
use flynn_api::host::{ExecRequest, Job, attach};
use flynn_hostd::paths::Paths;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::sleep;

use crate::attached::{read_all, request, send};
use crate::host::{Host, lives, pids_below};

/// More than a supervisor has room for.
const MANY: usize = 70;

/// Numbers its lines until nobody takes them any more, and keeps the number of the last that was taken.
const TALK: &str = "i=0; while :; do i=$((i+1)); echo $i $FILL; echo $i > /taken; done";

/// A job that does as `TALK`, and whoever runs in it.
fn talker(host: &Host, script: &str) -> Job {
    let mut job = host.job(script);
    job.config.env.insert("FILL".into(), "x".repeat(1000));
    job.config.stdin = true;
    job
}

/// Waits until nothing more is taken of what `TALK` says: how many lines were.
async fn stuck(host: &Host, job: &Job) -> usize {
    let file = host.state.join("jobs").join(&job.id).join("upper/taken");
    let (mut before, mut equal) = (0, 0);
    let taken = host.until(async || {
        let now: usize = fs::read_to_string(&file).ok()?.trim().parse().ok()?;
        equal = if now == before { equal + 1 } else { 0 };
        before = now;
        // Half a second.
        (equal == 50).then_some(now)
    });
    taken.await.expect("it is never stuck")
}

/// However many come, look and leave, there is room for who has a word for the job.
pub(crate) async fn who_leaves_makes_room() {
    let host = Host::boot().await;
    let job = host.job("sleep 1000");
    let running = host.run(&job).await;
    for _ in 0..MANY {
        let mut socket = UnixStream::connect(Paths::socket(&job.id)).await.unwrap();
        socket.write_all(b"{\"op\":\"watch\"}\n").await.unwrap();
        assert_eq!(socket.read_u8().await.unwrap(), b'{');
    }
    for _ in 0..MANY {
        // It is noticed in a moment that the one before has left.
        let attached = host
            .until(async || host.api.attach(&request(&job)).await.ok())
            .await;
        assert!(attached.is_some(), "{}", host.log());
    }
    // Nor do those who stay keep it from being stopped.
    let mut staying = Vec::new();
    while let Ok(client) = host.api.attach(&request(&job)).await {
        staying.push(client);
        assert!(staying.len() < MANY);
    }
    assert!(staying.len() > 40, "{}", staying.len());
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    let gone = host.until(async || (!lives(running.supervisor_pid.unwrap())).then_some(()));
    assert!(gone.await.is_some());
}

/// Kills the program that says what nobody takes, and reads that when the program has been dead for longer than anything else is
/// waited for.
async fn killed(host: &Host, job: &Job, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let taken = stuck(host, job).await;
    send(stream, attach::SIGNAL, &9_i32.to_be_bytes()).await;
    let talks = [b"/bin/sh\0-c\0", TALK.as_bytes()].concat();
    let over = host.until(async || programs(host, job, &talks).is_empty().then_some(()));
    assert!(over.await.is_some(), "it lives");
    // Not a wait for anything: so long does the client take its time.
    sleep(Duration::from_secs(4)).await;
    let (said, _, exit) = read_all(stream).await;
    assert_eq!(exit, 128 + 9);
    let said = String::from_utf8(said).unwrap();
    let numbers = said.lines().map(|line| line.split(' ').next().unwrap());
    let numbers: Vec<usize> = numbers.map(|number| number.parse().unwrap()).collect();
    assert!(numbers.iter().copied().eq(1..=numbers.len()), "some are missing");
    assert!(numbers.len() >= taken, "{} of {taken}", numbers.len());
}

/// Processes of a job with such a command line.
fn programs(host: &Host, job: &Job, begins: &[u8]) -> Vec<u32> {
    let groups = host.job_groups(&job.id);
    let mut pids = groups.first().map(|group| pids_below(group)).unwrap_or_default();
    pids.retain(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|args| args.starts_with(begins)));
    pids
}

pub(crate) async fn who_is_slow_gets_it_all() {
    let host = Host::boot().await;
    let standing = talker(&host, "sleep 1000");
    host.run(&standing).await;
    let exec = ExecRequest {
        args: ["/bin/sh", "-c", TALK].map(str::to_owned).into(),
        ..ExecRequest::default()
    };
    let mut beside = host.api.exec(&standing.id, &exec).await.unwrap();
    let mut job = talker(&host, TALK);
    job.config.disable_log = true;
    host.run(&job).await;
    let mut own = host.api.attach(&request(&job)).await.unwrap();
    tokio::join!(
        killed(&host, &standing, &mut beside),
        killed(&host, &job, &mut own)
    );
}

/// What a client sends behind a window of input that nobody reads arrives, and so does the news that it has left.
pub(crate) async fn who_reads_no_input_holds_up_nothing_else() {
    let host = Host::boot().await;
    let mut job = host.job("sleep 1000");
    job.config.stdin = true;
    host.run(&job).await;
    let exec = ExecRequest {
        args: ["/bin/sleep", "1001"].map(str::to_owned).into(),
        stdin: true,
        ..ExecRequest::default()
    };
    let window = vec![b'x'; attach::WINDOW];
    let mut left = host.api.exec(&job.id, &exec).await.unwrap();
    send(&mut left, attach::STDIN, &window).await;
    let mut beside = host.api.exec(&job.id, &exec).await.unwrap();
    send(&mut beside, attach::STDIN, &window).await;
    let run = host.until(async || (programs(&host, &job, b"/bin/sleep\x001001\0").len() == 2).then_some(()));
    assert!(run.await.is_some());
    drop(left);
    let ended =
        host.until(async || (programs(&host, &job, b"/bin/sleep\x001001\0").len() == 1).then_some(()));
    assert!(ended.await.is_some(), "it outlives its client");
    send(&mut beside, attach::SIGNAL, &9_i32.to_be_bytes()).await;
    assert_eq!(read_all(&mut beside).await.2, 128 + 9);

    let mut own = host.api.attach(&request(&job)).await.unwrap();
    send(&mut own, attach::STDIN, &window).await;
    send(&mut own, attach::SIGNAL, &9_i32.to_be_bytes()).await;
    assert_eq!(read_all(&mut own).await.2, 128 + 9);
}

/// A client that takes nothing any more is let go, what it had is given back, and another one gets all.
pub(crate) async fn who_stands_still_holds_up_no_end() {
    let host = Host::boot().await;
    let job = talker(&host, TALK);
    let running = host.run(&job).await;
    let mut client = host.api.attach(&request(&job)).await.unwrap();
    let mut other = host.api.attach(&request(&job)).await.unwrap();
    let other = tokio::spawn(async move { read_all(&mut other).await });
    let first = read_frame(&mut client).await.unwrap().unwrap();
    assert_eq!(first.kind, attach::STDOUT);
    stuck(&host, &job).await;
    host.api.stop_job(&job.id).await.unwrap();
    let ended = host.end(&job.id).await;
    let (_, _, exit) = other.await.unwrap();
    assert_eq!(Some(exit), ended.exit_status);
    let gone = host.until(async || (!lives(running.supervisor_pid.unwrap())).then_some(()));
    assert!(gone.await.is_some(), "{}", host.log());
    // What was on its way comes, and then the end: never one that says that this was all.
    let mut last = None;
    while let Ok(Some(frame)) = read_frame(&mut client).await {
        last = Some(frame.kind);
    }
    assert_ne!(last, Some(attach::EXIT));
}
