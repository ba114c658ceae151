//! One sample: two processes, an end of the load each, between two namespaces.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flynn_lab::netns;

use crate::inside::traffic::{Pattern, Seen};

/// Two places that can reach each other.
pub(super) struct Pair {
    pub(super) name: &'static str,
    pub(super) client: OwnedFd,
    pub(super) server: OwnedFd,
    /// The server's address, as the client sees it.
    pub(super) address: Ipv4Addr,
}

/// What is sent, and from which CPUs.
#[derive(Clone, Copy)]
pub(super) struct Measure {
    pub(super) pattern: Pattern,
    pub(super) client_cpu: usize,
    pub(super) server_cpu: usize,
}

/// What came of it.
#[derive(Clone, Copy)]
pub(super) struct Sample {
    /// Exchanges, or bits, a second.
    pub(super) rate: f64,
    /// CPU seconds of both ends, packets and all, for each of them.
    pub(super) cpu: f64,
}

/// How much longer than told a sample may take.
const PATIENCE: Duration = Duration::from_secs(10);

impl Pair {
    /// Takes one sample.
    pub(super) fn sample(&self, measure: Measure, time: Duration) -> Result<Sample> {
        self.try_sample(measure, time)
            .with_context(|| format!("{}: {}", self.name, measure.pattern.name()))
    }

    fn try_sample(&self, measure: Measure, time: Duration) -> Result<Sample> {
        let deadline = Instant::now() + time + PATIENCE;
        let cpu = measure.server_cpu.to_string();
        let server = End::start(&self.server, &["answer", "--cpu", &cpu], measure.pattern)?;
        let (port, server) = server.line(deadline)?;
        let to = SocketAddr::from((self.address, port.trim().parse().context("the server's port")?));
        let (cpu, millis, to) = (
            measure.client_cpu.to_string(),
            time.as_millis().to_string(),
            to.to_string(),
        );
        let args = ["ask", "--cpu", &cpu, "--millis", &millis, "--to", &to];
        let client = End::start(&self.client, &args, measure.pattern)?;
        let asked = client.seen(deadline).context("the client")?;
        let answered = server.seen(deadline).context("the server")?;
        ensure!(
            asked.count == answered.count && asked.count > 0,
            "{} were sent, and {} arrived",
            asked.count,
            answered.count
        );
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let count = match measure.pattern {
            Pattern::Stream => asked.count as f64 * 8.0,
            Pattern::Requests | Pattern::Connections => asked.count as f64,
        };
        Ok(Sample {
            rate: count / asked.seconds,
            cpu: (asked.cpu_seconds + answered.cpu_seconds) / count,
        })
    }
}

/// A process that dies with this value.
struct End {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl End {
    fn start(namespace: &OwnedFd, args: &[&str], pattern: Pattern) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut child = netns::inside(namespace.as_fd(), || {
            Command::new(program)
                .arg("inside")
                .args(args)
                .args(["--pattern", pattern.name()])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .context("cannot start an end of the load")
        })?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, output })
    }

    /// The next line that it says.
    fn line(mut self, deadline: Instant) -> Result<(String, Self)> {
        self.wait(deadline)?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok((line, self))
    }

    /// What it says at its end.
    fn seen(mut self, deadline: Instant) -> Result<Seen> {
        self.wait(deadline)?;
        let mut said = Vec::new();
        self.output.read_to_end(&mut said)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "it failed: {status}; why is said above");
        serde_json::from_slice(&said).context("what it said cannot be read")
    }

    /// Waits until it says something, or ends.
    fn wait(&self, deadline: Instant) -> Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let left = deadline.saturating_duration_since(Instant::now());
        let mut output = [PollFd::new(self.output.get_ref(), PollFlags::IN)];
        if poll(&mut output, Some(&left.try_into()?))? == 0 {
            bail!("it has hung");
        }
        Ok(())
    }
}
