//! The suite `dns`: what answering names costs discoverd, beside two name servers that are known for their speed.
//!
//! All three serve the same thousand names on the loopback device of a namespace made here, each kept to one CPU; the
//! load is on the other.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::thread::UnshareFlags;

use crate::row::{Goal, Row, Subject};
use crate::samples::in_turns;
use crate::suites::Thoroughness;

/// Names that are served.
pub(crate) const NAMES: u32 = 1_000;
const SERVER_CPU: &str = "0";
const LOAD_CPU: &str = "1";
/// Queries a second under which latency is measured.
const RATE: u32 = 30_000;
/// Between two queries whose latency is measured.
const PAUSE: Duration = Duration::from_micros(500);

const fn subject(name: &'static str, unit: &'static str, peer: &'static str, goal: Goal) -> Subject {
    Subject {
        suite: "dns",
        name,
        unit,
        peer: Some(peer),
        goal,
    }
}

const CPU_KNOT: Subject = subject("CPU of an answer", "µs", "knot", Goal::RatioAtMost(1.0));
const CPU_UNBOUND: Subject = subject("CPU of an answer", "µs", "unbound", Goal::RatioAtMost(1.0));
const LATENCY: Subject = subject(
    "99 of 100 answers at 30,000 a second within",
    "µs",
    "knot",
    Goal::AtMost(1_000.0),
);

/// The name with this number, without a dot at its end.
pub(crate) fn service(number: u32) -> String {
    format!("service-{number}")
}

/// Its address.
pub(crate) fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + number)
}

/// Takes all rows.
pub(crate) fn run(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    thread::spawn(move || measured(thoroughness))
        .join()
        .map_err(|_| anyhow::anyhow!("the benchmark's thread has panicked"))?
}

/// What one server did under one load.
struct Sample {
    /// Microseconds of CPU an answer.
    cpu: f64,
    rate: f64,
}

fn measured(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    flynn_lab::unshare(UnshareFlags::NEWNET).context("cannot make a namespace; this needs root")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    ensure!(up.success(), "cannot bring the loopback device up");
    let dir = tempfile::tempdir()?;
    let queries = dir.path().join("queries");
    std::fs::write(
        &queries,
        (0..NAMES).fold(String::new(), |mut text, number| {
            let _ = writeln!(text, "{}.discoverd A", service(number));
            text
        }),
    )?;
    let mut servers = [
        Server::ours(5301)?,
        Server::knot(5302, dir.path())?,
        Server::unbound(5303, dir.path())?,
    ];
    for server in &servers {
        server.wait()?;
    }
    let seconds = thoroughness.pick(3, 8);
    let samples = in_turns(&mut servers, thoroughness.pick(3, 9), |server| {
        let sample = server.load(&queries, seconds, None)?;
        eprintln!(
            "    {:<8} {:>8.0} answers/s, {:.2} µs of CPU each",
            server.name, sample.rate, sample.cpu
        );
        Ok(sample)
    })?;
    let cpu = |of: usize| -> Vec<f64> { samples[of].iter().map(|sample| sample.cpu).collect() };
    let late = in_turns(&mut servers, thoroughness.pick(3, 7), |server| {
        let late = server.latency(&queries, seconds)?;
        eprintln!("    {:<8} 99 of 100 answers within {late:.0} µs", server.name);
        Ok(late)
    })?;
    Ok(vec![
        CPU_KNOT.row(&cpu(0), &cpu(1)),
        CPU_UNBOUND.row(&cpu(0), &cpu(2)),
        LATENCY.row(&late[0], &late[1]),
    ])
}

/// A name server, until dropped.
struct Server {
    name: &'static str,
    port: u16,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(name: &'static str, port: u16, program: &Path, args: &[&str]) -> Result<Self> {
        let child = Command::new("taskset")
            .args(["--cpu-list", SERVER_CPU])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, port, child })
    }

    fn ours(port: u16) -> Result<Self> {
        let program = std::env::current_exe()?;
        Self::start(
            "ours",
            port,
            &program,
            &["inside", "dns", "--port", &port.to_string()],
        )
    }

    fn knot(port: u16, dir: &Path) -> Result<Self> {
        let mut zone =
            "$ORIGIN discoverd.\n$TTL 0\n@ SOA ns hostmaster 1 60 10 600 0\n@ NS ns\nns A 127.0.0.1\n"
                .to_owned();
        for number in 0..NAMES {
            writeln!(zone, "{} A {}", service(number), address(number))?;
        }
        std::fs::write(dir.join("zone"), zone)?;
        let dir = dir.display();
        let config = format!(
            "server:\n  listen: 127.0.0.1@{port}\n  rundir: {dir}\n  udp-workers: 1\n  tcp-workers: 1\n  \
             background-workers: 1\ndatabase:\n  storage: {dir}\nzone:\n- domain: discoverd\n  file: {dir}/zone\n"
        );
        let path = format!("{dir}/knot.conf");
        std::fs::write(&path, config)?;
        Self::start("knot", port, Path::new("knotd"), &["--config", &path])
    }

    fn unbound(port: u16, dir: &Path) -> Result<Self> {
        let dir = dir.display();
        let mut config = format!(
            "server:\n  interface: 127.0.0.1@{port}\n  directory: \"{dir}\"\n  chroot: \"\"\n  username: \"\"\n  \
             pidfile: \"{dir}/unbound.pid\"\n  num-threads: 1\n  use-syslog: no\n  do-daemonize: no\n  \
             module-config: \"iterator\"\n  local-zone: \"discoverd.\" static\nremote-control:\n  control-enable: no\n\
             server:\n"
        );
        for number in 0..NAMES {
            writeln!(
                config,
                "  local-data: \"{}.discoverd. 0 IN A {}\"",
                service(number),
                address(number)
            )?;
        }
        let path = format!("{dir}/unbound.conf");
        std::fs::write(&path, config)?;
        Self::start("unbound", port, Path::new("unbound"), &["-d", "-c", &path])
    }

    fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Waits until it answers.
    fn wait(&self) -> Result<()> {
        let prober = Prober::new(self.addr())?;
        let begun = Instant::now();
        while prober.ask(0).is_err() {
            ensure!(
                begun.elapsed() < Duration::from_secs(10),
                "{} does not answer within 10 s",
                self.name
            );
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Seconds of CPU that it has had.
    fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .context("not a stat")?
            .1
            .split_whitespace()
            .collect();
        let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("no such field")?.parse()?) };
        #[expect(clippy::cast_precision_loss, reason = "it is 100")]
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        Ok((ticks(11)? + ticks(12)?) / per_second)
    }

    /// Puts load on it, as much as goes or at a rate, and sees to it that every answer was right.
    fn load(&self, queries: &Path, seconds: u32, rate: Option<u32>) -> Result<Sample> {
        let before = self.cpu()?;
        let mut command = Command::new("taskset");
        command
            .args(["--cpu-list", LOAD_CPU, "dnsperf", "-s", "127.0.0.1"])
            .args(["-p", &self.port.to_string(), "-l", &seconds.to_string(), "-d"])
            .arg(queries)
            .args(["-c", "16", "-q", "512", "-T", "1"]);
        if let Some(rate) = rate {
            command.args(["-Q", &rate.to_string()]);
        }
        let output = command.output().context("cannot run dnsperf")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let number = |label: &str| -> Result<f64> {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(label));
            let word = line.and_then(|rest| rest.split_whitespace().next());
            Ok(word
                .with_context(|| format!("dnsperf says nothing of {label}"))?
                .parse()?)
        };
        let completed = number("Queries completed:")?;
        let good = number("Response codes:       NOERROR")?;
        if completed < 1_000.0 || good < completed || number("Queries lost:")? > completed / 100.0 {
            bail!("{} did not answer as it should:\n{text}", self.name);
        }
        Ok(Sample {
            cpu: (self.cpu()? - before) * 1e6 / completed,
            rate: number("Queries per second:")?,
        })
    }

    /// Microseconds within which 99 of 100 answers are there, under load.
    fn latency(&self, queries: &Path, seconds: u32) -> Result<f64> {
        let addr = self.addr();
        thread::scope(|scope| {
            let asked = scope.spawn(move || -> Result<Vec<f64>> {
                let prober = Prober::new(addr)?;
                // The load takes a moment to begin.
                thread::sleep(Duration::from_millis(500));
                let until = Instant::now() + Duration::from_secs(u64::from(seconds) - 1);
                let mut took = Vec::new();
                while Instant::now() < until {
                    let begun = Instant::now();
                    prober.ask(took.len())?;
                    took.push(begun.elapsed().as_secs_f64() * 1e6);
                    thread::sleep(PAUSE);
                }
                Ok(took)
            });
            self.load(queries, seconds, Some(RATE))?;
            let mut took = asked
                .join()
                .map_err(|_| anyhow::anyhow!("the prober has panicked"))??;
            took.sort_by(f64::total_cmp);
            took.get(took.len() * 99 / 100)
                .copied()
                .context("nothing was asked")
        })
    }
}

/// Asks one query after the other.
struct Prober(UdpSocket);

impl Prober {
    fn new(to: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self(socket))
    }

    /// Asks for one of the names and waits for the answer, or for a second where a datagram was dropped: then that is how
    /// long it took.
    fn ask(&self, turn: usize) -> Result<()> {
        let number = u32::try_from(turn)? % NAMES;
        let [.., high, low] = turn.to_be_bytes();
        let mut query = vec![high, low, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in [service(number).as_str(), "discoverd"] {
            query.push(u8::try_from(label.len())?);
            query.extend_from_slice(label.as_bytes());
        }
        query.extend_from_slice(&[0, 0, 1, 0, 1]);
        self.0.send(&query)?;
        let mut answer = [0; 512];
        loop {
            let length = match self.0.recv(&mut answer) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                received => received?,
            };
            // One that was given up may come late.
            if answer[..2] == [high, low] {
                ensure!(
                    answer[..length].ends_with(&address(number).octets()),
                    "not the address of {}",
                    service(number)
                );
                return Ok(());
            }
        }
    }
}
