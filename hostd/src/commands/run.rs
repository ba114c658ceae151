//! `flynn-host run`: a job from an image's manifest, attached.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use flynn_api::client::host::HostClient;
use flynn_api::client::terminal;
use flynn_api::host::{AttachRequest, ContainerConfig, Job, VolumeBinding};
use flynn_api::image::{Artifact, ImageManifest};
use flynn_api::resources::Resources;

use super::{attach, print_json, reach};

/// How to run a job by hand.
#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// A volume and where it is mounted; made when it is not there
    #[arg(long = "volume", value_name = "ID:PATH")]
    volumes: Vec<String>,
    /// A variable of its environment
    #[arg(long = "env", short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Limits, such as memory=512MB, cpu=1000 (thousandths of a core), `max_pids`, `max_fd`
    #[arg(long = "limit", value_name = "NAME=VALUE")]
    limits: Vec<String>,
    /// The directory to begin in
    #[arg(long)]
    workdir: Option<String>,
    /// Run in the host's network
    #[arg(long)]
    hostnet: bool,
    /// Do not stay attached; print the job's id
    #[arg(short, long)]
    detach: bool,
    /// Print it as JSON
    #[arg(long, requires = "detach")]
    json: bool,
    /// The image: its manifest, or an artifact that has one, as a JSON file
    image: PathBuf,
    /// Program and arguments, instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub(super) async fn run(host: &HostClient, args: RunArgs) -> anyhow::Result<ExitCode> {
    let host_id = reach(host.status().await)?.id;
    let tty = !args.detach && terminal::is_interactive();
    let job = args.job(&host_id, tty)?;
    let id = job.id.clone();
    reach(host.add_job(&job).await)?;
    if args.detach {
        if args.json {
            print_json(&serde_json::json!({ "id": id }))?;
        } else {
            println!("{id}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let request = AttachRequest {
        job_id: id,
        flags: ["stdin", "stdout", "stderr"].map(str::to_owned).into(),
        tty_size: job.config.tty_size,
        lines: 0,
    };
    attach::attach(host.attach(&request).await?, tty).await
}

impl RunArgs {
    fn job(&self, host_id: &str, tty: bool) -> anyhow::Result<Job> {
        let volume = |text: &String| {
            let (id, path) = text
                .split_once(':')
                .with_context(|| format!("--volume {text}: ID:PATH is wanted"))?;
            Ok(VolumeBinding {
                path: path.into(),
                volume_id: id.into(),
                delete_on_stop: false,
                limit: None,
            })
        };
        let variable = |text: &String| {
            let (name, value) = text
                .split_once('=')
                .with_context(|| format!("--env {text}: NAME=VALUE is wanted"))?;
            Ok((name.to_owned(), value.to_owned()))
        };
        Ok(Job {
            id: format!("{host_id}-{}", uuid::Uuid::new_v4()),
            artifacts: vec![self.artifact()?],
            resources: Resources::parse(self.limits.iter().map(String::as_str))
                .map_err(anyhow::Error::msg)
                .context("--limit")?,
            config: ContainerConfig {
                args: self.command.clone(),
                env: self.env.iter().map(variable).collect::<anyhow::Result<_>>()?,
                volumes: self.volumes.iter().map(volume).collect::<anyhow::Result<_>>()?,
                working_dir: self.workdir.clone(),
                host_network: self.hostnet,
                tty,
                tty_size: tty.then(terminal::size).flatten(),
                stdin: !self.detach,
                ..ContainerConfig::default()
            },
            ..Job::default()
        })
    }

    fn artifact(&self) -> anyhow::Result<Artifact> {
        let path = self.image.display();
        let json = std::fs::read(&self.image).with_context(|| format!("cannot read the image {path}"))?;
        if let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&json) {
            return Ok(Artifact::image(manifest, "", None));
        }
        serde_json::from_slice(&json).with_context(|| format!("{path} is neither a manifest nor an artifact"))
    }
}
