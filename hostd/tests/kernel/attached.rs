//! Clients at a job.

use flynn_api::ErrorCode;
use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::host::{AttachRequest, ExecRequest, ForwardRequest, Job, TtySize, attach};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::host::{Host, PATIENCE};
use crate::network::{config, networked};

pub(crate) fn request(job: &Job) -> AttachRequest {
    AttachRequest {
        job_id: job.id.clone(),
        flags: ["stdin", "stdout", "stderr"].map(str::to_owned).into(),
        ..AttachRequest::default()
    }
}

/// Reads to the end: standard output, standard error, exit status.
pub(crate) async fn read_all(stream: &mut (impl AsyncRead + Unpin)) -> (Vec<u8>, Vec<u8>, i32) {
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
            attach::TAKEN => {}
            kind => panic!("kind {kind}: {}", String::from_utf8_lossy(&frame.payload)),
        }
    }
}

/// Reads on until the output has `wanted`; what follows it stays in `seen`.
pub(crate) async fn expect(stream: &mut (impl AsyncRead + Unpin), seen: &mut String, wanted: &str) {
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

pub(crate) async fn send(stream: &mut (impl AsyncWrite + Unpin), kind: u8, payload: &[u8]) {
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

fn shell(script: &str) -> ExecRequest {
    ExecRequest {
        args: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        stdin: true,
        ..ExecRequest::default()
    }
}

pub(crate) async fn programs_run_beside_the_job_s() {
    let host = Host::boot().await;
    let mut job = host.job("echo mine > /tmp/file; trap 'exit 0' TERM; while :; do sleep 0.05; done");
    job.config.env.insert("COLOR".into(), "blue".into());
    host.run(&job).await;

    // The container's files, environment and processes; input, output, errors and the exit status.
    let mut request = shell(
        "until [ -e /tmp/file ]; do sleep 0.05; done; cat /tmp/file; echo $COLOR $SIZE; pwd; cat; echo bad >&2; exit 9",
    );
    request.env.insert("SIZE".into(), "large".into());
    request.working_dir = Some("/tmp".into());
    let stream = host.api.exec(&job.id, &request).await.unwrap();
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
    let expected = [b"mine\nblue large\n/tmp\n".as_slice(), &bytes].concat();
    assert!(out == expected, "{} of {} bytes", out.len(), expected.len());
    assert_eq!((err.as_slice(), exit), (&b"bad\n"[..], 9));
    drop(sender.await.unwrap());

    // A terminal of its own.
    let mut request = shell("tty; stty size; read line; stty size; echo got $line; exit 4");
    request.tty = true;
    request.tty_size = Some(TtySize {
        columns: 99,
        lines: 33,
    });
    let mut stream = host.api.exec(&job.id, &request).await.unwrap();
    let mut seen = String::new();
    expect(&mut stream, &mut seen, "/dev/pts/").await;
    expect(&mut stream, &mut seen, "33 99").await;
    let size = serde_json::to_vec(&TtySize {
        columns: 77,
        lines: 22,
    })
    .unwrap();
    send(&mut stream, attach::RESIZE, &size).await;
    send(&mut stream, attach::STDIN, b"hello\n").await;
    expect(&mut stream, &mut seen, "22 77").await;
    expect(&mut stream, &mut seen, "got hello").await;
    assert_eq!(read_all(&mut stream).await.2, 4);

    // A signal is for it alone.
    let mut stream = host
        .api
        .exec(
            &job.id,
            &shell("trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done"),
        )
        .await
        .unwrap();
    let mut seen = String::new();
    expect(&mut stream, &mut seen, "up").await;
    send(&mut stream, attach::SIGNAL, &15_i32.to_be_bytes()).await;
    assert_eq!(read_all(&mut stream).await.2, 3);

    // What the job says is not what they say.
    assert!(host.lines(&job.id).await.is_empty());
    host.api.stop_job(&job.id).await.unwrap();
    assert_eq!(host.end(&job.id).await.exit_status, Some(0));
    assert!(host.job_groups(&job.id).is_empty());
}

pub(crate) async fn programs_end_with_their_client_or_their_job() {
    let host = Host::boot().await;
    let job = host.job("trap 'exit 0' TERM; while :; do sleep 0.05; done");
    host.run(&job).await;
    let count = || {
        let groups = host.job_groups(&job.id);
        let procs = std::fs::read_to_string(groups[0].join("cgroup.procs")).unwrap();
        procs.lines().count()
    };
    let before = count();
    let mut stream = host
        .api
        .exec(&job.id, &shell("echo up; sleep 1000"))
        .await
        .unwrap();
    expect(&mut stream, &mut String::new(), "up").await;
    assert!(count() > before);
    drop(stream);
    // The job's own shell has a sleep or has none.
    assert!(
        host.until(async || (count() <= before + 1).then_some(()))
            .await
            .is_some(),
        "it is left"
    );

    let failure = async |args: &[&str]| {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let request = ExecRequest {
            args,
            ..ExecRequest::default()
        };
        let mut stream = host.api.exec(&job.id, &request).await.unwrap();
        let frame = timeout(PATIENCE, read_frame(&mut stream))
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(frame.kind, attach::ERROR);
        String::from_utf8(frame.payload).unwrap()
    };
    assert!(failure(&["/no/such"]).await.contains("cannot start /no/such"));

    let mut stream = host
        .api
        .exec(
            &job.id,
            &shell("trap '' TERM HUP; echo up; while :; do sleep 0.05; done"),
        )
        .await
        .unwrap();
    expect(&mut stream, &mut String::new(), "up").await;
    host.api.stop_job(&job.id).await.unwrap();
    let frame = timeout(PATIENCE, read_frame(&mut stream))
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(matches!(frame.kind, attach::EXIT | attach::ERROR), "{frame:?}");
    host.end(&job.id).await;
    let over = host.api.exec(&job.id, &shell("true")).await.unwrap_err();
    assert_eq!(over.code, ErrorCode::Conflict);
    let none = host.api.exec("one-none", &shell("true")).await.unwrap_err();
    assert_eq!(none.code, ErrorCode::NotFound);
}

/// A port that is only on a job's loopback device, by way of the host; ports of the host are not the job's.
pub(crate) async fn ports_of_jobs_are_reached() {
    let host = Host::boot().await;
    host.api.configure_network(&config()).await.unwrap();
    let job = networked(&host, "exec httpd -f -p 127.0.0.1:7000 -h /etc");
    host.run(&job).await;
    let answered = host
        .until(async || {
            let request = ForwardRequest { port: 7000 };
            let mut port = host.api.forward(&job.id, &request).await.ok()?;
            port.write_all(b"GET /passwd HTTP/1.0\r\n\r\n").await.ok()?;
            let mut said = String::new();
            port.read_to_string(&mut said).await.ok()?;
            Some(said)
        })
        .await
        .unwrap();
    assert!(answered.contains("app:x:1000"), "{answered}");

    let of_host = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = of_host.local_addr().unwrap().port();
    let refused = host
        .api
        .forward(&job.id, &ForwardRequest { port })
        .await
        .unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(refused.message.contains("nothing listens"), "{refused}");

    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    let over = host
        .api
        .forward(&job.id, &ForwardRequest { port: 7000 })
        .await
        .unwrap_err();
    assert_eq!(over.code, ErrorCode::Conflict);
}
