//! `flynn docker push`: an image to the cluster, and a release of it.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::sync::Arc;

use bytes::Bytes;
use clap::{Args, Subcommand};
use flynn_api::client::Body;
use flynn_api::client::receive::ReceiveClient;
use flynn_api::controller::{ProcessType, Processes, Release, ScaleRequest};
use flynn_api::host::{HealthCheck, Port, Service};
use flynn_api::receive::{DockerImage, NewImage};
use flynn_api::{Error, Meta};
use futures::{StreamExt as _, TryStreamExt as _};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::release::deploy;
use crate::archive::{Image, Layer};
use crate::context::{Context, Target};
use crate::failure::{Result, local, usage};
use crate::output::{self, note};
use crate::wait::{self, short};

/// The process type that an image becomes.
const WEB: &str = "web";
/// Where it listens unless the image says otherwise.
const PORT: u16 = 8080;
/// Layers that are sent at a time.
const PARALLEL: usize = 2;
/// Bytes of a layer that are read at a time, and how many of such pieces wait to be sent.
const PIECE: usize = 64 << 10;
const QUEUE: usize = 16;

#[derive(Args)]
pub(super) struct Docker {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Deploy an image: from the local engine, or from a docker-archive or OCI layout on disk
    Push(Push),
}

#[derive(Args)]
struct Push {
    /// File or directory: docker-archive or OCI layout, plain or compressed with gzip or zstd
    #[arg(long, value_name = "PATH")]
    archive: Option<PathBuf>,
    /// The image. With --archive only needed when there are several in it
    #[arg(required_unless_present = "archive")]
    image: Option<String>,
}

impl Docker {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let Command::Push(push) = self.command;
        push.run(context).await
    }
}

impl Push {
    async fn run(self, context: &Context) -> Result<()> {
        // The app first: an image of a gigabyte is not sent for a typing mistake.
        let target = context.target().await?;
        let receiver = context.images()?;
        let opening = tokio::task::spawn_blocking(move || match self.archive {
            Some(path) => Ok(Image::open(&path, self.image.as_deref())?),
            None => save(&self.image.unwrap_or_default()),
        });
        let image = opening
            .await
            .map_err(|_| Error::internal("the image could not be opened"))??;
        let image = Arc::new(image);
        send_layers(&receiver, &image).await?;

        let mut meta = Meta::new();
        if let Some(name) = &image.name {
            meta.insert("docker.image".into(), name.clone());
        }
        let artifact = receiver
            .create_artifact(&NewImage {
                config: image.config.clone(),
                meta,
            })
            .await?;
        let current = target.release().await?;
        let had_image = current
            .as_ref()
            .is_some_and(|release| !release.artifact_ids.is_empty());
        let release = release_of(current, &target.app.name, &artifact.id, &image.config);
        note("deploying");
        let release = deploy(&target, release).await?;
        if first_start(&target, &release, had_image).await? {
            let processes = Processes::from([(WEB.to_owned(), 1)]);
            let request = ScaleRequest {
                new_processes: Some(processes.clone()),
                ..ScaleRequest::default()
            };
            target
                .controller
                .scale(&target.app.id, &release.id, &request)
                .await?;
            note(format!("starting {WEB}"));
            wait::jobs(&target.controller, &target.app, &release, &processes).await?;
        }
        note(format!("{} runs release {}", target.app.name, short(&release.id)));
        if context.globals.json {
            output::json(&release)
        } else {
            output::line(&release.id)
        }
    }
}

/// Has the local engine save an image. Blocks.
fn save(image: &str) -> Result<Image> {
    if image.is_empty() || image.starts_with('-') {
        return Err(usage(format!("{image:?} is not the name of an image")));
    }
    note(format!("saving {image} from the local engine"));
    let child = Process::new("docker")
        .args(["save", image])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|why| {
        let advice = "install docker's client, or push an archive: flynn docker push --archive FILE";
        usage(format!("docker cannot be run: {why}; {advice}"))
    })?;
    let (output, complaints) = (child.stdout.take(), child.stderr.take());
    let listener = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(complaints) = complaints {
            // What is longer than this is cut.
            let _ = complaints.take(16 << 10).read_to_string(&mut text);
        }
        text
    });
    let opened = output.map(|output| Image::from_reader(output, None));
    let status = child.wait().map_err(|why| local("docker save", &why))?;
    let complaints = listener.join().unwrap_or_default();
    if !status.success() {
        return Err(usage(format!(
            "docker save {image} failed ({status}): {}",
            complaints.trim()
        )));
    }
    Ok(opened.ok_or_else(|| Error::internal("docker save gave nothing"))??)
}

/// Sends those layers that the cluster does not have.
async fn send_layers(receiver: &ReceiveClient, image: &Arc<Image>) -> Result<()> {
    let bars = Bars::new();
    // An image may have a layer twice; it is sent once.
    let mut layers = image.layers.clone();
    layers.sort_by(|a, b| a.id.cmp(&b.id));
    layers.dedup_by(|a, b| a.id == b.id);
    let sending = layers
        .into_iter()
        .map(|layer| send_layer(receiver, image, layer, &bars));
    let sent: Result<Vec<()>> = futures::stream::iter(sending)
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await;
    sent.map(drop)
}

async fn send_layer(receiver: &ReceiveClient, image: &Arc<Image>, layer: Layer, bars: &Bars) -> Result<()> {
    let name = short(layer.id.trim_start_matches("sha256:")).to_owned();
    if receiver.layer(&layer.id).await?.is_some() {
        bars.tell(&format!("layer {name}: already there"));
        return Ok(());
    }
    let bar = bars.add(&name, layer.size);
    let id = layer.id.clone();
    let result = receiver
        .put_layer(&id, body(Arc::clone(image), layer, bar.clone()))
        .await;
    bar.finish_and_clear();
    result?;
    bars.tell(&format!("layer {name}: sent"));
    Ok(())
}

/// A layer as a body, read as it is sent.
fn body(image: Arc<Image>, layer: Layer, bar: ProgressBar) -> Body {
    type Piece = Result<Frame<Bytes>, Box<dyn std::error::Error + Send + Sync>>;
    let (sender, receiver) = mpsc::channel::<Piece>(QUEUE);
    tokio::task::spawn_blocking(move || {
        let mut reader = match image.read(&layer) {
            Ok(reader) => reader,
            Err(why) => {
                // Nobody waits for it any more: the call has ended.
                let _ = sender.blocking_send(Err(why.into()));
                return;
            }
        };
        loop {
            let mut piece = vec![0; PIECE];
            match reader.read(&mut piece) {
                Ok(0) => return,
                Ok(read) => {
                    piece.truncate(read);
                    bar.inc(read as u64);
                    if sender.blocking_send(Ok(Frame::data(piece.into()))).is_err() {
                        return;
                    }
                }
                Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
                Err(why) => {
                    let _ = sender.blocking_send(Err(why.into()));
                    return;
                }
            }
        }
    });
    StreamBody::new(ReceiverStream::new(receiver)).boxed_unsync()
}

/// The release that an image becomes: what the app's present one says, with the new image.
fn release_of(current: Option<Release>, app: &str, artifact: &str, image: &DockerImage) -> Release {
    let mut release = current.unwrap_or_default();
    release.artifact_ids = vec![artifact.to_owned()];
    if release.processes.is_empty() {
        // An image that says where it listens is believed; others are told by $PORT.
        let port = match image.tcp_ports().as_slice() {
            [only] => *only,
            _ => PORT,
        };
        let service = format!("{app}-{WEB}");
        let check = HealthCheck {
            kind: "tcp".into(),
            ..HealthCheck::default()
        };
        let port = Port {
            port,
            proto: "tcp".into(),
            service: Some(Service {
                name: service.clone(),
                create: true,
                check: Some(check),
                ..Service::default()
            }),
        };
        let web = ProcessType {
            ports: vec![port],
            service,
            ..ProcessType::default()
        };
        release.processes.insert(WEB.into(), web);
    }
    release
}

/// Whether nothing ran of an image before: a release before this one, if there was one, was without any.
async fn first_start(target: &Target, release: &Release, had_image: bool) -> Result<bool> {
    if had_image || !release.processes.contains_key(WEB) {
        return Ok(false);
    }
    let formations = target.controller.formations(&target.app.id).await?;
    Ok(formations
        .iter()
        .all(|formation| formation.processes.values().all(|count| *count == 0)))
}

/// Progress: bars on a terminal, plain lines elsewhere.
struct Bars(Option<MultiProgress>);

impl Bars {
    fn new() -> Self {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        Self(terminal.then(MultiProgress::new))
    }

    fn add(&self, name: &str, size: u64) -> ProgressBar {
        let Some(bars) = &self.0 else {
            note(format!("layer {name}: sending {} KiB", size.div_ceil(1024)));
            return ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::hidden());
        };
        let style =
            ProgressStyle::with_template("layer {prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}");
        let bar = bars.add(ProgressBar::new(size)).with_prefix(name.to_owned());
        bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    }

    fn tell(&self, text: &str) {
        match &self.0 {
            // When nobody listens there, nothing is lost.
            Some(bars) => drop(bars.println(text)),
            None => note(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn image(ports: &serde_json::Value) -> DockerImage {
        serde_json::from_value(json!({"config": {"ExposedPorts": ports}, "rootfs": {"diff_ids": []}}))
            .unwrap()
    }

    #[test]
    fn a_first_release_has_a_web_type_and_later_ones_keep_what_they_have() {
        let first = release_of(None, "shop", "a1", &image(&json!(null)));
        let port = &first.processes["web"].ports[0];
        assert_eq!(
            (port.port, port.service.as_ref().unwrap().name.as_str()),
            (8080, "shop-web")
        );
        assert_eq!(
            release_of(None, "shop", "a1", &image(&json!({"80/tcp": {}}))).processes["web"].ports[0].port,
            80
        );
        assert_eq!(
            release_of(None, "s", "a", &image(&json!({"80/tcp": {}, "81/tcp": {}}))).processes["web"].ports
                [0]
            .port,
            8080
        );
        let mut changed = first;
        changed.env.insert("A".into(), "1".into());
        changed.processes.insert("worker".into(), ProcessType::default());
        let second = release_of(Some(changed.clone()), "shop", "a2", &image(&json!(null)));
        assert_eq!(second.artifact_ids, ["a2"]);
        assert_eq!((second.env, second.processes), (changed.env, changed.processes));
    }
}
