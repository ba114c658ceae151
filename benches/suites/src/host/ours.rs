//! A host of ours for one part of the suite: namespaces, cgroups and a state directory of its own, all gone with it.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flynn_api::Digest;
use flynn_api::client::Http;
use flynn_api::client::host::HostClient;
use flynn_api::discovery::NetworkLeases;
use flynn_api::host::{ActiveJob, ContainerConfig, Job, JobState, NetworkConfig, VolumeBinding};
use flynn_api::image::{Artifact, Entrypoint, ImageManifest, Layer};
use flynn_hostd::cgroup::{Hierarchies, Hierarchy};
use futures::StreamExt as _;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::UnshareFlags;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::expected::{Expected, Words};

/// How long anything may take.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

/// Where jobs find the volume in which they speak up.
pub(super) const PROBE: &str = "/probe";
/// The FIFO in it.
pub(super) const FIFO: &str = "up";

const ID: &str = "bench";
const ADDRESS: &str = "192.0.2.1";
/// Room for a thousand containers.
const SUBNET: &str = "100.100.8.0/22";

/// What has every process as a child of a group's that a daemon is started in.
const ENTER: &str = r#"while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@""#;

/// A host whose daemon runs, with a network and one image.
pub(super) struct Host {
    pub(super) runtime: Runtime,
    pub(super) api: HostClient,
    pub(super) image: ImageManifest,
    pub(super) groups: Vec<PathBuf>,
    words: Option<Words>,
    ends: Expected<ActiveJob>,
    jobs: Cell<u64>,
    daemon: Child,
    dir: tempfile::TempDir,
}

/// A job whose process has said that it runs.
pub(super) struct Started {
    pub(super) id: String,
    /// From the call until its word was read.
    pub(super) took: Duration,
    end: oneshot::Receiver<ActiveJob>,
}

/// Boots a host in namespaces that a new thread has to itself, and measures on it.
pub(super) fn on_a_host<T: Send>(
    binary: &Path,
    measure: impl FnOnce(&Host) -> Result<T> + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        let measured = scope.spawn(|| {
            let host = Host::boot(binary)?;
            measure(&host).inspect_err(|_| host.say_last_words())
        });
        let panicked = |_| Err(anyhow::anyhow!("the benchmark's thread has panicked"));
        measured.join().unwrap_or_else(panicked)
    })
}

impl Host {
    fn boot(binary: &Path) -> Result<Self> {
        namespaces()?;
        let dir = crate::discovery::disk()?;
        let name = dir.path().file_name().and_then(|name| name.to_str());
        let groups = groups(&format!("flynn-bench{}", name.unwrap_or_default()))?;
        let log = fs::File::create(dir.path().join("daemon.log"))?;
        let daemon = Command::new("sh")
            .args(["-euc", ENTER, "sh"])
            .args(&groups)
            .arg("--")
            .arg(binary)
            .args(["daemon", "--id", ID, "--address", ADDRESS, "--state"])
            .arg(dir.path().join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start the daemon")?;
        let (image, layer) = make_image(dir.path(), "first")?;
        let mut host = Self {
            runtime: crate::inside::runtime()?,
            api: HostClient::new(Http::new(&format!("unix:{}", flynn_api::host::SOCKET))?),
            image,
            groups,
            words: None,
            ends: Expected::default(),
            jobs: Cell::new(0),
            daemon,
            dir,
        };
        let prepared = host.prepare(&layer);
        prepared.inspect_err(|_| host.say_last_words())?;
        Ok(host)
    }

    fn prepare(&mut self, layer: &Path) -> Result<()> {
        let volume = self.runtime.block_on(self.prepared(layer))?;
        self.words = Some(Words::listen(&volume.join(FIFO))?);
        // One subscriber for all, as a scheduler is.
        let mut events = self.runtime.block_on(self.api.job_events())?;
        let ends = self.ends.clone();
        self.runtime.spawn(async move {
            while let Some(Ok((_, event))) = events.next().await {
                if event.job.status.is_terminal() {
                    ends.came(&event.job_id, event.job);
                }
            }
        });
        Ok(())
    }

    /// Gives it what a host has that is bootstrapped, and a job that keeps image and volume in use.
    async fn prepared(&self, layer: &Path) -> Result<PathBuf> {
        self.until("the daemon to answer", async || self.api.status().await.ok())
            .await?;
        self.put(&self.image, layer).await?;
        self.api
            .configure_network(&NetworkConfig {
                network: "100.100.0.0/16".into(),
                subnet: SUBNET.into(),
                network6: NetworkLeases::default_network6(),
            })
            .await?;
        let script = format!("mkfifo -m 666 {PROBE}/{FIFO} && exec sleep 1000000");
        let job = self.job_of(&self.image, ["/bin/sh", "-c", &script]);
        self.api.add_job(&job).await?;
        self.until("the first job's FIFO", async || {
            let pid = self.api.job(&job.id).await.ok()?.pid?;
            let volume = PathBuf::from(format!("/proc/{pid}/root{PROBE}"));
            volume.join(FIFO).exists().then_some(volume)
        })
        .await
    }

    /// What `look` finds, once it finds something.
    pub(super) async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> Result<T> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(found) = look().await {
                return Ok(found);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bail!("waited in vain for {what}")
    }

    /// Makes another image and stores it; nothing of its layer is mounted or in the page cache.
    pub(super) fn cold_image(&self, name: &str) -> Result<ImageManifest> {
        let (image, layer) = make_image(self.dir.path(), name)?;
        self.runtime.block_on(self.put(&image, &layer))?;
        for layer in image.layers() {
            let stored = self
                .dir
                .path()
                .join(format!("state/layers/{}.squashfs", layer.id));
            rustix::fs::fadvise(fs::File::open(stored)?, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(image)
    }

    async fn put(&self, image: &ImageManifest, file: &Path) -> Result<()> {
        let [layer] = image.layers() else {
            bail!("an image of one layer is wanted")
        };
        let body = flynn_api::client::full(fs::read(file)?);
        let request = hyper::Request::put(format!("/host/layers/{}", layer.id)).body(body)?;
        self.api.http().send(request).await?;
        Ok(fs::remove_file(file)?)
    }

    /// A new job as an app has it, with the volume.
    pub(super) fn job_of<'a>(&self, image: &ImageManifest, args: impl Into<Vec<&'a str>>) -> Job {
        self.jobs.set(self.jobs.get() + 1);
        Job {
            id: format!("{ID}-{}", self.jobs.get()),
            artifacts: vec![Artifact::image(image.clone(), String::new(), None)],
            config: ContainerConfig {
                args: args.into().into_iter().map(str::to_owned).collect(),
                volumes: vec![VolumeBinding {
                    path: PROBE.into(),
                    volume_id: "probe".into(),
                    delete_on_stop: false,
                    limit: None,
                }],
                ..ContainerConfig::default()
            },
            stop_timeout: Some(10),
            ..Job::default()
        }
    }

    /// A new job whose shell's first deed is to say the job's id, which then does what `then` says, and which ends well
    /// when it is stopped.
    pub(super) fn speaking(&self, image: &ImageManifest, then: &str) -> Job {
        let mut job = self.job_of(image, ["/bin/sh", "-c"]);
        let script = format!("trap 'exit 0' TERM; echo {} >{PROBE}/{FIFO}; {then}", job.id);
        job.config.args.push(script);
        job
    }

    /// Waits for a word that a job's process is to say.
    pub(super) fn expect(&self, word: &str) -> Result<oneshot::Receiver<Instant>> {
        Ok(self.words.as_ref().context("nobody listens yet")?.expect(word))
    }

    /// Starts a job of [`Self::speaking`]; comes back when its process runs.
    pub(super) async fn start(&self, job: &Job) -> Result<Started> {
        let (word, end) = (self.expect(&job.id)?, self.ends.expect(&job.id));
        let begun = Instant::now();
        let running = async {
            let running = timeout(PATIENCE, word).await;
            Ok(running.with_context(|| format!("the process of {} does not run", job.id))??)
        };
        let added = async { self.api.add_job(job).await.map_err(anyhow::Error::from) };
        let ((), running) = tokio::try_join!(added, running)?;
        Ok(Started {
            id: job.id.clone(),
            took: running.duration_since(begun),
            end,
        })
    }

    /// Waits for a job's end, which is to be a good one.
    pub(super) async fn end(&self, started: Started) -> Result<()> {
        let ended = timeout(PATIENCE, started.end).await;
        let ended = ended.with_context(|| format!("{} does not end", started.id))??;
        ensure!(
            ended.status == JobState::Done && ended.exit_status == Some(0),
            "{} ended as {:?} with {:?}: {:?}",
            started.id,
            ended.status,
            ended.exit_status,
            ended.error
        );
        Ok(())
    }

    /// Stops a job and waits for its end.
    pub(super) async fn stop(&self, started: Started) -> Result<()> {
        self.api.stop_job(&started.id).await?;
        self.end(started).await
    }

    /// The host's way to the volume that all jobs have.
    pub(super) fn probe(&self) -> PathBuf {
        self.dir.path().join("state/volumes/probe/data")
    }

    /// How many files there are of the kind that only living containers need.
    pub(super) fn working_files(&self) -> usize {
        let jobs = fs::read_dir(self.dir.path().join("state/jobs"));
        let of_living = ["upper", "work", "temp", "temp.ext4", "root", "launch.json"];
        let jobs = jobs.into_iter().flatten().flatten();
        jobs.map(|job| {
            of_living
                .iter()
                .filter(|name| job.path().join(name).exists())
                .count()
        })
        .sum()
    }

    /// A directory on a disk, which goes with the host.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn daemon_pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Where the image's layer is mounted.
    pub(super) fn mounted_layer(&self) -> Result<PathBuf> {
        let [layer] = self.image.layers() else {
            bail!("an image of one layer is wanted")
        };
        Ok(Path::new("/run/flynn/layers").join(layer.id.to_string()))
    }

    /// Shows what the daemon has logged last, beside an error.
    fn say_last_words(&self) {
        let log = fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(5)..] {
            eprintln!("    daemon: {line}");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let begun = Instant::now();
        while self.groups.iter().any(|group| group.exists()) && begun.elapsed() < PATIENCE {
            for group in &self.groups {
                let _ = fs::write(group.join("cgroup.kill"), "1");
                remove_groups(group);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for entry in fs::read_dir("/run/flynn/layers").into_iter().flatten().flatten() {
            let _ = unmount(entry.path(), UnmountFlags::DETACH);
        }
    }
}

/// Namespaces of this thread's own, and what a host finds in them.
fn namespaces() -> Result<()> {
    flynn_lab::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET)
        .context("cannot make namespaces; this needs root")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None)?;
    mount("bpf", "/sys/fs/bpf", "bpf", MountFlags::empty(), None)?;
    for args in [
        ["link", "set", "lo", "up"].as_slice(),
        &["address", "add", &format!("{ADDRESS}/32"), "dev", "lo"],
    ] {
        let done = Command::new("ip").args(args).status()?;
        ensure!(done.success(), "ip {} failed", args.join(" "));
    }
    Ok(())
}

/// A group in each hierarchy, below the one that this process is in.
fn groups(name: &str) -> Result<Vec<PathBuf>> {
    let make = |hierarchy: &Hierarchy| {
        let group = hierarchy.base.join(name);
        fs::create_dir(&group).with_context(|| format!("cannot make {}", group.display()))?;
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if hierarchy.has("cpuset") {
                fs::write(group.join(file), fs::read(hierarchy.base.join(file))?)?;
            }
        }
        Ok(group)
    };
    Hierarchies::find()?.iter().map(make).collect()
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// An image of one layer, busybox as every program, that no image of another name shares; and the layer's file.
fn make_image(dir: &Path, name: &str) -> Result<(ImageManifest, PathBuf)> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .context("there is no static busybox (Debian: busybox-static)")?;
    let root = dir.join("root");
    for made in ["bin", "dev", "etc", "probe", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(made))?;
    }
    fs::write(root.join("etc/image"), name)?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    let applets = Command::new(busybox).arg("--list").output()?;
    let applets = String::from_utf8(applets.stdout)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let file = dir.join(format!("{name}.squashfs"));
    let made = Command::new("mksquashfs")
        .args([root.as_path(), file.as_path()])
        .args(["-quiet", "-no-progress", "-all-root", "-Xcompression-level", "1"])
        .stdout(Stdio::null())
        .status()
        .context("cannot run mksquashfs")?;
    ensure!(made.success(), "mksquashfs failed");
    fs::remove_dir_all(root)?;
    let bytes = fs::read(&file)?;
    let layer = Layer::squashfs(Digest::of(&bytes), bytes.len() as u64);
    Ok((ImageManifest::new(Entrypoint::default(), vec![layer]), file))
}
