//! Clients that leave, and clients that take their time.

use std::fs;
use std::time::Duration;

use flynn_api::client::attach::read_frame;
use flynn_api::host::{ExecRequest, attach};
use flynn_hostd::paths::Paths;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::sleep;

use crate::attached::{read_all, request};
use crate::host::{Host, lives};

/// More than a supervisor has room for.
const MANY: usize = 70;

/// More than all pipes, queues and sockets on the way to a client hold together.
const BYTES: usize = 4_000_000;

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

/// Reads a little, and the rest when the program has been over for longer than anything else is waited for.
async fn slowly(stream: &mut (impl AsyncRead + Unpin)) -> (usize, i32) {
    let first = read_frame(stream).await.unwrap().unwrap();
    assert_eq!(first.kind, attach::STDOUT);
    sleep(Duration::from_secs(4)).await;
    let (rest, _, exit) = read_all(stream).await;
    (first.payload.len() + rest.len(), exit)
}

pub(crate) async fn who_is_slow_gets_it_all() {
    let host = Host::boot().await;
    let script = format!("head -c {BYTES} /dev/zero; exit 3");
    let standing = host.job("sleep 1000");
    host.run(&standing).await;
    let exec = ExecRequest {
        args: ["/bin/sh", "-c", &script].map(str::to_owned).into(),
        ..ExecRequest::default()
    };
    let mut beside = host.api.exec(&standing.id, &exec).await.unwrap();
    let mut job = host.job(&script);
    job.config.stdin = true;
    job.config.disable_log = true;
    host.run(&job).await;
    let mut own = host.api.attach(&request(&job)).await.unwrap();
    let both = tokio::join!(slowly(&mut beside), slowly(&mut own));
    assert_eq!(both, ((BYTES, 3), (BYTES, 3)));
}

/// A client that takes nothing any more is let go, what it had is given back, and another one gets all.
pub(crate) async fn who_stands_still_holds_up_no_end() {
    let host = Host::boot().await;
    let mut job = host.job("yes");
    job.config.stdin = true;
    let running = host.run(&job).await;
    let mut client = host.api.attach(&request(&job)).await.unwrap();
    let mut other = host.api.attach(&request(&job)).await.unwrap();
    let other = tokio::spawn(async move { read_all(&mut other).await });
    let first = read_frame(&mut client).await.unwrap().unwrap();
    assert_eq!(first.kind, attach::STDOUT);
    // Until all that is on the way is full, and the job waits.
    let log = host.state.join("jobs").join(&job.id).join("log");
    let logged = || {
        let files = fs::read_dir(&log).unwrap().flatten();
        files.map(|file| file.metadata().unwrap().len()).sum::<u64>()
    };
    let mut before = 0;
    let full = host.until(async || {
        sleep(Duration::from_millis(200)).await;
        (std::mem::replace(&mut before, logged()) == before).then_some(())
    });
    assert!(full.await.is_some());
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
