//! `/bin/true` in the base image: by our daemon, asked over its socket, and by runc on the same root file system.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use flynn_api::client::host::HostClient;
use flynn_api::host::{ContainerConfig, Job, JobState};
use flynn_api::image::{Artifact, ImageManifest};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::samples::in_turns;

/// Milliseconds, each.
#[derive(Serialize, Deserialize)]
pub(crate) struct Times {
    pub(crate) ours: Vec<f64>,
    pub(crate) runc: Vec<f64>,
}

/// Where the host keeps its images.
const IMAGE: &str = "/var/lib/flynn/images/base.json";

enum Contender {
    Ours,
    Runc,
}

/// Starts containers in turns.
pub(crate) fn measure(rounds: u32) -> Result<Times> {
    let image: ImageManifest =
        serde_json::from_slice(&std::fs::read(IMAGE).context(IMAGE)?).context("the base image's manifest")?;
    let [layer] = image.layers() else {
        bail!("the base image has {} layers, not one", image.layers().len())
    };
    let (runtime, daemon) = (super::runtime()?, super::daemon()?);
    let host = runtime.block_on(daemon.status())?.id;
    // Ours first: it mounts the layer.
    let once = || runtime.block_on(ours(&daemon, &host, &image));
    once().context("our daemon")?;
    let rootfs = Path::new("/run/flynn/layers").join(layer.id.to_string());
    let bundle = bundle(&rootfs)?;
    runc(bundle.path()).context("runc")?;
    let mut samples = in_turns(
        &mut [Contender::Ours, Contender::Runc],
        rounds,
        |contender| match contender {
            Contender::Ours => once(),
            Contender::Runc => runc(bundle.path()),
        },
    )?;
    let runc = samples.pop().unwrap_or_default();
    Ok(Times {
        ours: samples.pop().unwrap_or_default(),
        runc,
    })
}

fn millis(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

/// From the request to the news of its end.
async fn ours(daemon: &HostClient, host: &str, image: &ImageManifest) -> Result<f64> {
    let id = format!("{host}-{}", uuid::Uuid::new_v4());
    let job = Job {
        id: id.clone(),
        artifacts: vec![Artifact::image(image.clone(), String::new(), None)],
        config: ContainerConfig {
            args: vec!["/bin/true".into()],
            ..ContainerConfig::default()
        },
        ..Job::default()
    };
    let mut events = daemon.job_events().await?;
    let begun = Instant::now();
    daemon.add_job(&job).await?;
    while let Some(event) = events.next().await {
        let (_, event) = event?;
        if event.job_id == id && event.job.status.is_terminal() {
            let took = millis(begun);
            ensure!(
                event.job.status == JobState::Done,
                "it ended as {:?}: {:?}",
                event.job.status,
                event.job.error
            );
            return Ok(took);
        }
    }
    bail!("the daemon's events ended")
}

fn runc(bundle: &Path) -> Result<f64> {
    let name = format!("bench-{}", uuid::Uuid::new_v4());
    let mut command = Command::new("runc");
    command
        .arg("run")
        .arg("--bundle")
        .arg(bundle)
        .arg(name)
        .stdin(Stdio::null());
    let begun = Instant::now();
    let output = command.output().context("cannot start runc")?;
    let took = millis(begun);
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(took)
}

/// A directory with runc's own defaults, and our root file system and command in it.
pub(crate) fn bundle(rootfs: &Path) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let spec = Command::new("runc")
        .arg("spec")
        .current_dir(dir.path())
        .output()
        .context("cannot start runc")?;
    ensure!(
        spec.status.success(),
        "runc spec: {}",
        String::from_utf8_lossy(&spec.stderr).trim()
    );
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["/bin/true"]);
    config["root"] = json!({ "path": rootfs, "readonly": true });
    std::fs::write(&path, serde_json::to_vec(&config)?)?;
    Ok(dir)
}
