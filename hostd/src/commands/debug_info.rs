//! `flynn-host collect-debug-info`: what somebody needs who is to find out what is wrong with a host, in one file.
//!
//! Each piece is bounded, and what cannot be had is said in the place of what it is. Environments come redacted from
//! the daemon.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use flate2::Compression;
use flate2::write::GzEncoder;
use flynn_api::client::host::HostClient;
use flynn_api::host::ActiveJob;
use futures::StreamExt as _;
use serde::Serialize;

use super::{preflight, print_json};
use crate::config::HostConfig;
use crate::paths::Paths;

/// The longest piece; of what is longer the end is kept.
const PIECE: u64 = 1 << 20;

/// Jobs whose logs are kept: the last ones.
const JOBS: usize = 200;

/// Lines of a job's output.
const LINES: u32 = 200;

/// How long a program may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What programs say, by the name of the file.
const PROGRAMS: [(&str, &[&str]); 11] = [
    ("links", &["ip", "-statistics", "-details", "link"]),
    ("addresses", &["ip", "address"]),
    ("routes", &["ip", "route", "show", "table", "all"]),
    ("neighbours", &["ip", "neighbour"]),
    ("sockets", &["ss", "-lntup"]),
    ("firewall", &["nft", "list", "ruleset"]),
    ("disks", &["df", "-h"]),
    ("processes", &["ps", "-eo", "pid,ppid,stat,etime,rss,comm"]),
    ("kernel-log", &["dmesg"]),
    (
        "journal",
        &[
            "journalctl",
            "--unit",
            "flynn-host",
            "--lines",
            "2000",
            "--no-pager",
        ],
    ),
    ("service", &["systemctl", "status", "flynn-host", "--no-pager"]),
];

/// What the kernel says.
const FILES: [&str; 9] = [
    "/proc/version",
    "/proc/cmdline",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/mounts",
    "/proc/cgroups",
    "/proc/self/cgroup",
    "/proc/pressure/memory",
    "/etc/os-release",
];

/// `flynn-host collect-debug-info`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The file to make; in the working directory, after the host and the time, unless given
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What was made.
#[derive(Debug, Serialize)]
struct Collected {
    file: PathBuf,
    bytes: u64,
    /// Pieces that could not be had.
    missing: Vec<String>,
}

/// The archive as it grows.
struct Archive {
    tar: tar::Builder<GzEncoder<File>>,
    top: String,
    time: u64,
    missing: Vec<String>,
}

impl Archive {
    /// Adds a piece, or what was in the way.
    fn add(&mut self, name: &str, piece: anyhow::Result<Vec<u8>>) -> io::Result<()> {
        let bytes = piece.unwrap_or_else(|error| {
            self.missing.push(name.to_owned());
            format!("not to be had: {error:#}\n").into_bytes()
        });
        let limit = usize::try_from(PIECE).unwrap_or(usize::MAX);
        let bytes = &bytes[bytes.len().saturating_sub(limit)..];
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        self.tar
            .append_data(&mut header, format!("{}/{name}", self.top), bytes)
    }
}

pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    let now = jiff::Timestamp::now();
    let id = HostConfig::peek(&args.state).map_or_else(|| "host".to_owned(), |config| config.id);
    let top = format!("flynn-{id}-{}", now.strftime("%Y%m%dT%H%M%SZ"));
    let file = args.output.unwrap_or_else(|| format!("{top}.tar.gz").into());
    let made = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&file);
    let made = made.with_context(|| format!("cannot make {}: name another with --output", file.display()))?;
    let mut archive = Archive {
        tar: tar::Builder::new(GzEncoder::new(made, Compression::default())),
        top,
        time: u64::try_from(now.as_second()).unwrap_or_default(),
        missing: Vec::new(),
    };
    let collected = collect(host, &args.state, &mut archive).await;
    if let Err(error) = collected {
        let _ = std::fs::remove_file(&file);
        return Err(anyhow::Error::from(error).context(format!("cannot write {}", file.display())));
    }
    let missing = archive.missing;
    let finished = archive
        .tar
        .into_inner()
        .and_then(GzEncoder::finish)
        .and_then(|mut file| {
            file.flush()?;
            Ok(file.metadata()?.len())
        });
    let bytes = finished.with_context(|| format!("cannot write {}", file.display()))?;
    let collected = Collected { file, bytes, missing };
    if args.json {
        return print_json(&collected);
    }
    println!("{} has {} KiB", collected.file.display(), collected.bytes >> 10);
    if !collected.missing.is_empty() {
        println!("not to be had: {}", collected.missing.join(", "));
    }
    println!("Read it before you give it away: logs are in it as jobs have written them.");
    Ok(())
}

async fn collect(host: &HostClient, state: &Path, archive: &mut Archive) -> io::Result<()> {
    archive.add("version.txt", Ok(env!("CARGO_PKG_VERSION").into()))?;
    archive.add("preflight.json", pretty(&preflight::look(state)))?;
    archive.add("status.json", answer(host.status().await))?;
    let jobs = host.jobs().await;
    let mut known: Vec<ActiveJob> = jobs
        .as_ref()
        .map(|jobs| jobs.values().cloned().collect())
        .unwrap_or_default();
    archive.add("jobs.json", answer(jobs))?;
    archive.add("network.json", answer(host.network().await))?;
    archive.add("services.json", answer(host.services().await))?;
    archive.add("flows.json", answer(host.flows().await))?;
    archive.add("volumes.json", answer(host.volumes().await))?;
    archive.add("providers.json", answer(host.providers().await))?;
    let metrics = host.http().get_bytes("/metrics", 8 << 20).await;
    archive.add(
        "metrics.txt",
        metrics.map(|bytes| bytes.to_vec()).map_err(anyhow::Error::from),
    )?;
    known.sort_by_key(|job| std::cmp::Reverse(job.created_at));
    for job in known.iter().take(JOBS) {
        let id = &job.job.id;
        archive.add(&format!("jobs/{id}/output.log"), output(host, id).await)?;
        let log = Paths::at(state).job(id).join(crate::supervisor::LOG);
        archive.add(
            &format!("jobs/{id}/supervisor.log"),
            tail(&log).map_err(anyhow::Error::from),
        )?;
    }
    for file in FILES {
        let name = format!("kernel{}", file.replace('/', "-"));
        archive.add(&name, tail(Path::new(file)).map_err(anyhow::Error::from))?;
    }
    for (name, command) in PROGRAMS {
        archive.add(&format!("{name}.txt"), say(command))?;
    }
    Ok(())
}

fn pretty(value: &impl Serialize) -> anyhow::Result<Vec<u8>> {
    Ok(serde_json::to_vec_pretty(value)?)
}

fn answer(answer: flynn_api::Result<impl Serialize>) -> anyhow::Result<Vec<u8>> {
    pretty(&answer?)
}

async fn output(host: &HostClient, id: &str) -> anyhow::Result<Vec<u8>> {
    let mut lines = host.log(id, Some(LINES), false).await?;
    let mut text = Vec::new();
    while let Some(line) = lines.next().await {
        let (_, line) = line?;
        writeln!(text, "{} {:?} {}", line.timestamp, line.stream, line.msg)?;
    }
    Ok(text)
}

/// The end of a file. What the kernel makes up as it is read has no length.
fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    if length > PIECE {
        file.seek(SeekFrom::Start(length - PIECE))?;
    }
    let mut bytes = Vec::new();
    file.take(PIECE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What a program says; it is killed when it takes too long. Its output is a file, so that it waits for nobody.
fn say(command: &[&str]) -> anyhow::Result<Vec<u8>> {
    let (program, args) = command.split_first().context("no program")?;
    let mut said = unnamed_file()?;
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(said.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("{program} took longer than {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let length = said.metadata()?.len();
    said.seek(SeekFrom::Start(length.saturating_sub(PIECE)))?;
    let mut bytes = Vec::new();
    said.take(PIECE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// In memory, and nobody else's.
fn unnamed_file() -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    Ok(rustix::fs::memfd_create("flynn-host", flags)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_what_is_long_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let long = vec![b'x'; usize::try_from(PIECE).unwrap() + 10];
        std::fs::write(&path, [long, b"end".to_vec()].concat()).unwrap();
        let kept = tail(&path).unwrap();
        assert_eq!(kept.len() as u64, PIECE);
        assert!(kept.ends_with(b"end"));
        assert!(!tail(Path::new("/proc/version")).unwrap().is_empty());
    }

    #[test]
    fn programs_are_heard_or_it_is_said_why_not() {
        assert_eq!(
            say(&["sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap(),
            b"out\nerr\n"
        );
        assert!(
            say(&["no-such-program"])
                .unwrap_err()
                .to_string()
                .contains("cannot start")
        );
    }
}
