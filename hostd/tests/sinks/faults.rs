//! What is lost, and what comes twice, when connections break, servers die and daemons restart.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use flynn_api::sink::Sink;
use flynn_hostd::logs::Writer;

use crate::host::{Host, say, syslog};
use crate::receiver::{Breaking, PATIENCE, Receiver, aggregator};

/// Three jobs log while the receiver breaks connections and the shipping is stopped and started.
fn each_line_arrives(receiver: &Receiver, sink: Sink) {
    const LINES: usize = 20_000;
    let host = Host::new();
    let mut sinks = host.sinks();
    host.put(&sinks, sink);
    let mut jobs: Vec<(String, Writer)> = (1..=3)
        .map(|number| format!("one-{number}"))
        .map(|id| (id.clone(), host.job(&id)))
        .collect();
    for line in 0..LINES {
        for (id, writer) in &mut jobs {
            say(writer, &line.to_string());
            if line % 100 == 0 {
                writer.flush();
            }
            if line % 7000 == 6999 {
                // Its supervisor starts anew.
                writer.flush();
                *writer = host.job(id);
            }
        }
        if line % 5000 == 2500 {
            host.stop(&sinks);
            sinks = host.sinks();
        }
        if line % 2000 == 1999 {
            // Some way is covered at each connection.
            receiver.until("some lines", |received| {
                jobs.iter().all(|(id, _)| received.of(id) > line - 1000)
            });
        }
    }
    for (_, writer) in &mut jobs {
        writer.flush();
    }
    receiver.until("the last lines", |received| {
        jobs.iter().all(|(id, _)| {
            let lines = received.lines.get(id).map(|(lines, _)| lines);
            lines.is_some_and(|lines| lines.last() == Some(&(LINES - 1).to_string()))
        })
    });
    let received = receiver.received.lock().unwrap();
    assert!(
        received.connections > 5 && received.twice > 0,
        "nothing was broken"
    );
    for (id, _) in &jobs {
        let (lines, _) = &received.lines[id];
        let numbers = lines.iter().map(|line| line.parse::<usize>().unwrap());
        assert!(
            numbers.eq(0..LINES),
            "{id}: a line is missing, or in a wrong place"
        );
    }
    drop(received);
    let status = &sinks.list()[0];
    assert_eq!((status.dropped_lines, status.waiting_bytes), (0, 0));
    host.stop(&sinks);
}

pub(crate) fn aggregators_get_each_line_once() {
    let receiver = Receiver::start(Breaking::After(6000), true);
    each_line_arrives(&receiver, aggregator(&receiver));
}

pub(crate) fn syslog_servers_get_each_line() {
    let receiver = Receiver::start(Breaking::After(6000), false);
    each_line_arrives(&receiver, syslog(&format!("syslog://{}", receiver.address)));
}

/// A server's kernel has taken bytes long ago that its program never read.
pub(crate) fn what_a_dead_server_had_not_read_comes_again() {
    let host = Host::new();
    let sinks = host.sinks();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    host.put(
        &sinks,
        syslog(&format!("syslog://{}", listener.local_addr().unwrap())),
    );
    let (stalled, _) = listener.accept().unwrap();
    let mut job = host.job("one-1");
    for line in 0..500 {
        say(&mut job, &line.to_string());
    }
    job.flush();
    // Longer than after which it counts as read.
    let deadline = std::time::Instant::now() + PATIENCE;
    while sinks.awaited("one-1") {
        assert!(std::time::Instant::now() < deadline, "{:?}", sinks.list());
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(stalled);
    let (mut stream, _) = listener.accept().unwrap();
    let mut first = [0; 200];
    std::io::Read::read_exact(&mut stream, &mut first).unwrap();
    let text = String::from_utf8_lossy(&first);
    assert!(text.contains("seq=\"1\"] 0"), "{text}");
    host.stop(&sinks);
}

pub(crate) fn a_loud_job_holds_up_no_other() {
    let host = Host::new();
    let sinks = host.sinks();
    let receiver = Receiver::start(Breaking::Never, true);
    let mut loud = host.job("one-1");
    let line = "x".repeat(1000);
    for _ in 0..60_000 {
        say(&mut loud, &line);
    }
    loud.flush();
    let mut quiet = host.job("one-2");
    say(&mut quiet, "a word");
    quiet.flush();
    host.put(&sinks, aggregator(&receiver));
    receiver.until("the quiet job's word", |received| received.of("one-2") == 1);
    let loud = receiver.received.lock().unwrap().of("one-1");
    assert!(loud < 10_000, "it came after {loud} lines of the loud job");
    host.stop(&sinks);
}

/// Nor does one that never stops keep out who comes while it talks.
pub(crate) fn who_comes_later_has_a_turn() {
    let host = Host::new();
    let sinks = host.sinks();
    let receiver = Receiver::start(Breaking::Never, false);
    host.put(&sinks, syslog(&format!("syslog://{}", receiver.address)));
    let (over, mut loud) = (AtomicBool::new(false), host.job("one-1"));
    let line = "x".repeat(1000);
    std::thread::scope(|scope| {
        let _ended = Ended(&over);
        scope.spawn(|| {
            // Always a backlog ahead of what the receiver takes.
            while !over.load(Ordering::Relaxed) {
                for _ in 0..1000 {
                    say(&mut loud, &line);
                }
                loud.flush();
            }
        });
        receiver.until("the loud job's lines", |received| received.of("one-1") > 20_000);
        let mut late = host.job("one-2");
        say(&mut late, "a word");
        late.flush();
        receiver.until("the word of a job that came later", |received| {
            received.of("one-2") == 1
        });
    });
    host.stop(&sinks);
}

/// Says so when it goes, also with a test that has failed.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// With nobody to take them, lines go once there are too many; what is left says how many.
pub(crate) fn what_is_dropped_is_said() {
    const LINES: usize = 25_000;
    let host = Host::new();
    let sinks = host.sinks();
    let gone = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    host.put(&sinks, syslog(&format!("syslog://{gone}")));
    let mut job = host.job("one-1");
    wait_for(&host.jobs().join("one-1/log/held.syslog"));
    let line = "x".repeat(7000);
    for _ in 1..LINES {
        say(&mut job, &line);
        job.flush();
    }
    say(&mut job, "last");
    job.flush();
    let log = std::fs::read_dir(host.jobs().join("one-1/log")).unwrap();
    let size: u64 = log.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(size > 100 << 20 && size <= 128 << 20, "{size}");

    let receiver = Receiver::start(Breaking::Never, false);
    host.put(&sinks, syslog(&format!("syslog://{}", receiver.address)));
    receiver.until("the last line", |received| {
        let lines = received.lines.get("one-1").map(|(lines, _)| lines);
        lines
            .and_then(|lines| lines.last())
            .is_some_and(|line| line == "last")
    });
    let received = receiver.received.lock().unwrap();
    let (lines, _) = &received.lines["one-1"];
    let dropped: usize = lines[0].split(' ').next().unwrap().parse().unwrap();
    assert_eq!(lines.len() - 1 + dropped, LINES, "{}", lines[0]);
    assert_eq!(sinks.list()[0].dropped_lines, dropped as u64);
    drop(received);
    host.stop(&sinks);
}

fn wait_for(path: &std::path::Path) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !path.exists() {
        assert!(
            std::time::Instant::now() < deadline,
            "there is no {}",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn sinks_are_kept_and_checked() {
    let host = Host::new();
    let sinks = host.sinks();
    for (id, config) in [
        ("one", serde_json::json!({"url": "http://logs"})),
        (
            "one",
            serde_json::json!({"url": "syslog://logs", "colour": "red"}),
        ),
        (
            "one",
            serde_json::json!({"url": "syslog+tls://logs", "ca": "nonsense"}),
        ),
        ("../one", serde_json::json!({"url": "syslog://logs"})),
        ("", serde_json::json!({"url": "syslog://logs"})),
    ] {
        let sink = Sink {
            id: id.into(),
            config,
            ..syslog("")
        };
        assert!(
            host.runtime.block_on(sinks.put(sink.clone())).is_err(),
            "{sink:?}"
        );
    }
    host.put(&sinks, syslog("syslog://127.0.0.1:1"));
    let mut job = host.job("one-1");
    say(&mut job, "a word");
    job.flush();
    let held = host.jobs().join("one-1/log/held.syslog");
    wait_for(&held);
    host.stop(&sinks);
    let sinks = host.sinks();
    assert_eq!(sinks.list().len(), 1);
    assert!(
        sinks
            .metrics()
            .contains("flynn_log_sink_connected{sink=\"syslog\"} 0")
    );
    host.runtime.block_on(sinks.remove("syslog")).unwrap();
    assert!(host.runtime.block_on(sinks.remove("syslog")).is_err());
    assert!(!held.exists(), "nothing is held for a sink that is gone");
    assert!(host.sinks().list().is_empty());
}
