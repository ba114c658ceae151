//! Clients at a job.

use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::host::{AttachRequest, Job, TtySize, attach};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::host::{Host, PATIENCE};

fn request(job: &Job) -> AttachRequest {
    AttachRequest {
        job_id: job.id.clone(),
        flags: ["stdin", "stdout", "stderr"].map(str::to_owned).into(),
        ..AttachRequest::default()
    }
}

/// Reads to the end: standard output, standard error, exit status.
async fn read_all(stream: &mut (impl AsyncRead + Unpin)) -> (Vec<u8>, Vec<u8>, i32) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        let frame = timeout(PATIENCE, read_frame(stream))
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        match frame.kind {
            attach::STDOUT => out.extend(frame.payload),
            attach::STDERR => err.extend(frame.payload),
            attach::EXIT => return (out, err, i32::from_be_bytes(frame.payload.try_into().unwrap())),
            kind => panic!("kind {kind}: {}", String::from_utf8_lossy(&frame.payload)),
        }
    }
}

/// Reads on until the output has `wanted`; what follows it stays in `seen`.
async fn expect(stream: &mut (impl AsyncRead + Unpin), seen: &mut String, wanted: &str) {
    loop {
        if let Some(at) = seen.find(wanted) {
            seen.drain(..at + wanted.len());
            return;
        }
        let frame = timeout(PATIENCE, read_frame(stream)).await;
        let frame = frame
            .unwrap_or_else(|_| panic!("no {wanted:?} in {seen:?}"))
            .unwrap()
            .unwrap();
        seen.push_str(&String::from_utf8_lossy(&frame.payload));
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), kind: u8, payload: &[u8]) {
    write_frame(stream, kind, payload).await.unwrap();
}

pub(crate) async fn pipes_lose_nothing() {
    let host = Host::boot().await;
    let mut job = host.job("cat; echo done >&2; exit 6");
    job.config.stdin = true;
    job.config.disable_log = true;
    host.run(&job).await;
    let stream = host.api.attach(&request(&job)).await.unwrap();
    let (mut from, mut to) = tokio::io::split(stream);
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|number| (number % 251).to_le_bytes()[0])
        .collect();
    let sent = bytes.clone();
    let sender = tokio::spawn(async move {
        for piece in sent.chunks(50_000) {
            send(&mut to, attach::STDIN, piece).await;
        }
        send(&mut to, attach::STDIN, &[]).await;
        to
    });
    let (out, err, exit) = read_all(&mut from).await;
    assert!(out == bytes, "{} of {} bytes", out.len(), bytes.len());
    assert_eq!((err.as_slice(), exit), (&b"done\n"[..], 6));
    drop(sender.await.unwrap());
    host.end(&job.id).await;
}

pub(crate) async fn terminals_have_sizes_and_signals() {
    let host = Host::boot().await;
    let mut job = host.job(
        "trap 'echo winch; stty size' WINCH; trap 'echo int' INT; trap 'echo usr1' USR1; tty; stty size; \
                            while :; do read line && echo \"got $line\"; [ \"$line\" = end ] && exit 7; done",
    );
    job.config.tty = true;
    job.config.stdin = true;
    job.config.tty_size = Some(TtySize {
        columns: 99,
        lines: 33,
    });
    host.run(&job).await;
    let mut stream = host.api.attach(&request(&job)).await.unwrap();
    let mut seen = String::new();
    expect(&mut stream, &mut seen, "/dev/pts/0").await;
    expect(&mut stream, &mut seen, "33 99").await;
    let size = serde_json::to_vec(&TtySize {
        columns: 77,
        lines: 22,
    })
    .unwrap();
    send(&mut stream, attach::RESIZE, &size).await;
    // The trap runs at once, or when read has come back.
    send(&mut stream, attach::STDIN, b"\n").await;
    expect(&mut stream, &mut seen, "22 77").await;
    send(&mut stream, attach::STDIN, b"hello\n").await;
    expect(&mut stream, &mut seen, "got hello").await;
    // Control-C through the terminal, and a signal past it.
    send(&mut stream, attach::STDIN, b"\x03").await;
    expect(&mut stream, &mut seen, "int").await;
    send(&mut stream, attach::SIGNAL, &10_i32.to_be_bytes()).await;
    send(&mut stream, attach::STDIN, b"\n").await;
    expect(&mut stream, &mut seen, "usr1").await;
    send(&mut stream, attach::STDIN, b"end\n").await;
    assert_eq!(read_all(&mut stream).await.2, 7);
}

pub(crate) async fn attaches_before_and_after() {
    let host = Host::boot().await;
    // First the client, then the job.
    let mut job = host.job("echo hello; exit 8");
    job.config.stdin = true;
    let wish = request(&job);
    let (stream, ()) = tokio::join!(host.api.attach(&wish), async {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        host.api.add_job(&job).await.unwrap();
    });
    let (out, _, exit) = read_all(&mut stream.unwrap()).await;
    assert_eq!((out.as_slice(), exit), (&b"hello\n"[..], 8));

    // First the job's end, then the client.
    let mut job = host.job("echo hello; exit 9");
    job.config.stdin = true;
    host.run(&job).await;
    host.end(&job.id).await;
    let (out, _, exit) = read_all(&mut host.api.attach(&request(&job)).await.unwrap()).await;
    assert_eq!((out.as_slice(), exit), (&b"hello\n"[..], 9));

    // Of a job whose supervisor has left, the log.
    let (ended, _) = host.script("echo hello; exit 10").await;
    let supervisor = ended.supervisor_pid.unwrap();
    assert!(
        host.until(async || (!crate::host::lives(supervisor)).then_some(()))
            .await
            .is_some()
    );
    let wish = AttachRequest {
        lines: 10,
        ..request(&ended.job)
    };
    let (out, _, exit) = read_all(&mut host.api.attach(&wish).await.unwrap()).await;
    assert_eq!((out.as_slice(), exit), (&b"hello\n"[..], 10));
}
