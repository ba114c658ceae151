//! Against syslog servers as they are deployed, each in a network namespace of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flynn_api::sink::Sink;
use flynn_api::tls::{Ca, PeerIdentity};
use rustix::thread::UnshareFlags;

use crate::host::{Host, say, syslog};
use crate::receiver::PATIENCE;

const PORT: u16 = 6514;

/// What the machine lacks for a test with this server; none when it has all.
pub(crate) fn lacks(server: &str) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("root is needed, for a network namespace".into());
    }
    let found = ["/usr/sbin", "/usr/bin", "/sbin"];
    let found = found.iter().any(|dir| Path::new(dir).join(server).exists());
    (!found).then(|| format!("no {server}: rsyslog and syslog-ng cannot both be installed"))
}

/// A server that runs, until the end of the test at the latest.
struct Server(Child);

impl Server {
    fn start(command: &[&str]) -> Self {
        let child = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self(child);
        let deadline = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(("127.0.0.1", PORT)).is_err() {
            assert!(Instant::now() < deadline, "{} does not listen", command[0]);
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn own_network() {
    // SAFETY: this only changes what this thread sees; no descriptor table is affected.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .unwrap();
    assert!(up.success());
}

/// Sends lines, has the server start anew in between, and looks at what it has written.
fn each_line_is_written(dir: &Path, command: &[&str], sink: Sink) {
    const LINES: usize = 2000;
    let host = Host::new();
    let server = Server::start(command);
    let sinks = host.sinks();
    host.put(&sinks, sink);
    let mut job = host.job("one-1");
    let long = "0123456789".repeat(5000);
    let odd = "tab\t quote\" bracket] backslash\\ \u{e4}";
    for line in 0..LINES {
        say(&mut job, &format!("line {line}"));
    }
    job.flush();
    written(dir, |lines| lines.len() >= LINES);
    server.stop();
    for line in LINES..2 * LINES {
        say(&mut job, &format!("line {line}"));
    }
    let mut framer = flynn_hostd::logs::Framer::default();
    framer.push(format!("{long}\n").as_bytes(), |piece, more| {
        job.add(flynn_api::host::LogStream::Stdout, piece, more);
    });
    say(&mut job, odd);
    job.flush();
    let server = Server::start(command);
    let lines = written(dir, |lines| lines.last().is_some_and(|line| line == odd));
    for (number, line) in lines[..2 * LINES].iter().enumerate() {
        assert_eq!(*line, format!("line {number}"));
    }
    assert_eq!(lines[2 * LINES..lines.len() - 1].concat(), long);
    assert!(lines.len() > 2 * LINES + 2, "the long line came in pieces");
    host.stop(&sinks);
    server.stop();
}

/// What the server has written, in the order of the records, each once.
fn written(dir: &Path, done: impl Fn(&[String]) -> bool) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(dir.join("out")).unwrap_or_default();
        let mut lines = BTreeMap::new();
        // The server may be in the middle of a line.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            let Some(line) = line.strip_prefix("one - one-1 ID1 [flynn run=\"") else {
                panic!("{line:?}");
            };
            let (run, line) = line.split_once("\" seq=\"").unwrap();
            let (seq, line) = line.split_once('"').unwrap();
            let (_, text) = line.split_once("] ").unwrap();
            let id: (u64, u64) = (run.parse().unwrap(), seq.parse().unwrap());
            lines.insert(id, text.to_owned());
        }
        let lines: Vec<String> = lines.into_values().collect();
        if done(&lines) {
            return lines;
        }
        assert!(
            Instant::now() < deadline,
            "{} lines: {:?}",
            lines.len(),
            lines.last()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn rsyslog_takes_logs() {
    own_network();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let config = format!(
        r#"global(workDirectory="{at}" parser.escapeControlCharactersOnReceive="off")
module(load="imtcp")
template(name="all" type="list") {{
  property(name="hostname") constant(value=" ") property(name="app-name") constant(value=" ")
  property(name="procid") constant(value=" ") property(name="msgid") constant(value=" ")
  property(name="structured-data") constant(value=" ") property(name="msg" droplastlf="on") constant(value="\n")
}}
input(type="imtcp" address="127.0.0.1" port="{PORT}")
action(type="omfile" file="{at}/out" template="all")
"#
    );
    fs::write(dir.path().join("conf"), config).unwrap();
    let (conf, pid) = (format!("{at}/conf"), format!("{at}/pid"));
    let command = ["rsyslogd", "-n", "-f", &conf, "-i", &pid];
    each_line_is_written(
        dir.path(),
        &command,
        syslog(&format!("syslog://127.0.0.1:{PORT}")),
    );
}

pub(crate) fn syslog_ng_takes_logs_over_tls() {
    own_network();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    flynn_api::tls::install_provider();
    let ca = Ca::create("logs").unwrap();
    let identity = ca
        .issue(&PeerIdentity::Host("logs".into()), &["127.0.0.1".to_owned()])
        .unwrap();
    identity.save(dir.path()).unwrap();
    let config = format!(
        r#"@version: current
options {{ keep-hostname(yes); stats-freq(0); }};
source s {{ syslog(ip("127.0.0.1") port({PORT}) transport("tls")
  tls(key-file("{at}/key.pem") cert-file("{at}/cert.pem") peer-verify(optional-untrusted))); }};
destination d {{ file("{at}/out" template("$HOST - $PID $MSGID $SDATA $MSG\n")); }};
log {{ source(s); destination(d); }};
"#
    );
    fs::write(dir.path().join("conf"), config).unwrap();
    let files = ["conf", "persist", "pid", "control"].map(|name| format!("{at}/{name}"));
    let [conf, persist, pid, control] = files.each_ref();
    let command = [
        "syslog-ng",
        "-F",
        "--no-caps",
        "-f",
        conf,
        "-R",
        persist,
        "-p",
        pid,
        "-c",
        control,
    ];
    let mut sink = syslog(&format!("syslog+tls://127.0.0.1:{PORT}"));
    sink.config["ca"] = ca.cert_pem().into();
    each_line_is_written(dir.path(), &command, sink);
}
