//! `cargo xtask up` is killed half way, and `down` leaves nothing of it.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_cluster_tests::{Artifacts, until};

use crate::fixture::Cluster;
use crate::traces;

/// What it says last before it is killed, and how much longer it lives.
const MOMENTS: [(&str, u64); 5] = [
    ("Booting a host", 0),
    ("Booting a host", 60),
    ("starting discoverd", 0),
    ("starting postgres", 200),
    ("Deploying the example app", 300),
];

/// A lab of our own, on ports of its own.
struct Lab {
    artifacts: Artifacts,
    name: String,
    dir: PathBuf,
}

pub(crate) fn killed(cluster: &mut Cluster) -> Result<()> {
    let artifacts = cluster.artifacts()?.clone();
    let name = format!("up-{}", std::process::id());
    let dir = artifacts.labs.join(&name);
    let lab = Lab { artifacts, name, dir };
    let outcome = lab.killed_and_up_again();
    if outcome.is_err() {
        // Whatever it came to, nothing of it stays.
        let _ = lab.xtask("down", &[]).status();
    }
    outcome
}

impl Lab {
    fn killed_and_up_again(&self) -> Result<()> {
        for (word, more) in MOMENTS {
            eprintln!("    killed {more} ms after {word:?}");
            self.kill_at(word, Duration::from_millis(more))?;
            self.down()?;
        }
        self.port_in_use()?;
        let output = self.up().stderr(Stdio::inherit()).output()?;
        ensure!(
            output.status.success(),
            "up does not work afterwards: {}",
            output.status
        );
        let url = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let answer = Command::new("curl")
            .args(["--silent", "--show-error", &url])
            .output()?;
        let said = String::from_utf8_lossy(&answer.stdout);
        ensure!(said.starts_with("Hello from "), "{url} says {said:?}");
        self.down()
    }

    fn port_in_use(&self) -> Result<()> {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = taken.local_addr()?.port().to_string();
        let output = self.up_at(&port).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && said.contains(&port) && said.contains("--http-port"),
            "with port {port} taken it says: {said}"
        );
        traces::none(&self.name, &self.dir)
    }

    fn xtask(&self, command: &str, args: &[&str]) -> Command {
        let mut xtask = Command::new(&self.artifacts.xtask);
        xtask
            .args([command, "--lab", &self.name])
            .args(args)
            .env("CARGO_TARGET_DIR", self.target())
            .stdin(Stdio::null());
        xtask
    }

    fn target(&self) -> &Path {
        self.artifacts.labs.parent().unwrap_or(Path::new("."))
    }

    fn up(&self) -> Command {
        self.up_at("0")
    }

    fn up_at(&self, http_port: &str) -> Command {
        let mut up = self.xtask("up", &["--yes", "--http-port", http_port, "--https-port", "0"]);
        // What is built already.
        if self.artifacts.is_debug {
            up.arg("--debug");
        }
        up
    }

    /// Kills it some time after it has said this.
    fn kill_at(&self, word: &str, more: Duration) -> Result<()> {
        let mut child = self.up().stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stderr.take().context("no stderr")?).lines();
        let mut said = Vec::new();
        while let Some(line) = lines.next().transpose()? {
            let there = line.contains(word);
            said.push(line);
            if there {
                break;
            }
        }
        std::thread::sleep(more);
        let ended = child.try_wait()?;
        child.kill()?;
        child.wait()?;
        ensure!(ended.is_none(), "it ended before it could be killed: {said:#?}");
        Ok(())
    }

    fn down(&self) -> Result<()> {
        let output = self.xtask("down", &[]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "down failed: {}", said.trim());
        // Killed processes go in their own time.
        until(Duration::from_secs(5), "nothing is left", || {
            traces::none(&self.name, &self.dir).map(Some)
        })
    }
}
