//! The peer: `runc create` and `runc start` of the same root file system, which is mounted already and read-only; no
//! network but an empty one, and no filter of system calls, as its own defaults are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::expected::Words;
use super::ours::{FIFO, Host, PATIENCE, PROBE};

/// A bundle whose process speaks up as ours do.
pub(super) struct Runc {
    bundle: tempfile::TempDir,
    words: Words,
    number: u32,
}

impl Runc {
    /// Prepares a bundle of the host's image.
    pub(super) fn prepare(host: &Host) -> Result<Self> {
        let bundle = crate::inside::containers::bundle(&host.mounted_layer()?)?;
        let probe = bundle.path().join("probe");
        fs::create_dir(&probe)?;
        let made = Command::new("mkfifo").arg(probe.join(FIFO)).status()?;
        ensure!(made.success(), "mkfifo failed");
        let words = Words::listen(&probe.join(FIFO))?;
        change(bundle.path(), |config| {
            if let Some(mounts) = config["mounts"].as_array_mut() {
                mounts.push(json!({
                    "destination": PROBE, "type": "bind", "source": probe, "options": ["bind", "rw"],
                }));
            }
        })?;
        Ok(Self {
            bundle,
            words,
            number: 0,
        })
    }

    /// From the first command until the process has spoken.
    pub(super) fn start(&mut self, host: &Host) -> Result<Duration> {
        self.number += 1;
        let word = format!("runc-{}-{}", std::process::id(), self.number);
        let script = format!("trap 'exit 0' TERM; echo {word} >{PROBE}/{FIFO}");
        change(self.bundle.path(), |config| {
            config["process"]["args"] = json!(["/bin/sh", "-c", script]);
        })?;
        let running = self.words.expect(&word);
        let begun = Instant::now();
        let started = self
            .run(&["create", "--bundle", &path(self.bundle.path()), &word])
            .and_then(|()| self.run(&["start", &word]));
        let running = started.and_then(|()| {
            let running = host.runtime.block_on(async { timeout(PATIENCE, running).await });
            Ok(running.context("runc's process does not run")??)
        });
        self.run(&["delete", "--force", &word])?;
        Ok(running?.duration_since(begun))
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        // Not its output but a file's: the container has it as well, and would keep a pipe open.
        let log = self.bundle.path().join("runc.log");
        let status = Command::new("runc")
            .arg("--root")
            .arg(self.bundle.path().join("state"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .status()
            .context("cannot start runc")?;
        ensure!(
            status.success(),
            "runc {}: {}",
            args[0],
            fs::read_to_string(&log).unwrap_or_default().trim()
        );
        Ok(())
    }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn change(bundle: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let file: PathBuf = bundle.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&file)?)?;
    change(&mut config);
    Ok(fs::write(file, serde_json::to_vec(&config)?)?)
}
