//! Connections, one after the other, from a process to another that stays.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_lab::netns;

use super::number;
use crate::inside::traffic::{Pattern, Seen};

/// A server, until it is dropped.
pub(super) struct Load(Child);

impl Load {
    /// Has a process in a namespace answer at a port.
    pub(super) fn answer(namespace: &OwnedFd, cpu: usize, port: u16) -> Result<Self> {
        let (cpu, port) = (cpu.to_string(), port.to_string());
        let args = ["answer", "--cpu", &cpu, "--port", &port, "--stay"];
        let mut child = start(namespace, &args)?;
        let output = child.stdout.take().context("no output")?;
        let load = Self(child);
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(!line.is_empty(), "the server does not start; why is said above");
        Ok(load)
    }

    /// Has another one ask for so long: connections a second.
    #[expect(clippy::unused_self, reason = "there must be somebody who answers")]
    pub(super) fn ask(&self, namespace: &OwnedFd, cpu: usize, to: SocketAddr, time: Duration) -> Result<f64> {
        let (cpu, millis, to) = (cpu.to_string(), time.as_millis().to_string(), to.to_string());
        let child = start(
            namespace,
            &["ask", "--cpu", &cpu, "--millis", &millis, "--to", &to],
        )?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "the client failed: {}", output.status);
        let seen: Seen =
            serde_json::from_slice(&output.stdout).context("what the client said cannot be read")?;
        Ok(number(seen.count) / seen.seconds)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(namespace: &OwnedFd, args: &[&str]) -> Result<Child> {
    let program = std::env::current_exe()?;
    netns::inside(namespace.as_fd(), || {
        Command::new(program)
            .arg("inside")
            .args(args)
            .args(["--pattern", Pattern::Connections.name()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start an end of the load")
    })
}
