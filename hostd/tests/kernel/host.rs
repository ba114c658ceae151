//! A host of its own for each test: mount and network namespaces, a cgroup subtree, a state directory. All of it goes
//! with the test.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flynn_api::Digest;
use flynn_api::client::Http;
use flynn_api::client::host::HostClient;
use flynn_api::host::{ActiveJob, ContainerConfig, Job, LogLine, Update, Updated};
use flynn_api::image::{Artifact, Entrypoint, ImageManifest, Layer};
use futures::StreamExt as _;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

/// How long anything may take: it is a safety limit, for disks that others keep busy.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_flynn-host");

/// What the machine lacks for these tests; none when it has all.
pub(crate) fn lacks() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("root is needed".into());
    }
    if busybox().is_none() {
        return Some("no static busybox (Debian: busybox-static)".into());
    }
    if Command::new("mksquashfs")
        .arg("-version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        return Some("no mksquashfs (Debian: squashfs-tools)".into());
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing = ["overlay", "squashfs"]
        .into_iter()
        .find(|name| !filesystems.contains(name));
    missing.map(|name| format!("the kernel has no {name}"))
}

fn busybox() -> Option<&'static Path> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(Path::new)
        .find(|path| path.exists())
}

/// A host whose daemon runs.
pub(crate) struct Host {
    pub(crate) state: PathBuf,
    pub(crate) api: HostClient,
    pub(crate) layer: Layer,
    pub(crate) layer_file: PathBuf,
    pub(crate) groups: Vec<PathBuf>,
    daemon: RefCell<Option<Child>>,
    /// The process of a daemon that has taken over from that one.
    successor: Cell<Option<u32>>,
    jobs: Cell<u32>,
    dir: tempfile::TempDir,
}

impl Host {
    /// Boots one with the test image in its store.
    pub(crate) async fn boot() -> Self {
        let host = Self::new(|_| {});
        host.start().await;
        host.put_layer(&host.layer_file).await.unwrap();
        host
    }

    /// Makes one whose daemon does not run yet. `prepare` may do something to its state directory.
    pub(crate) fn new(prepare: impl FnOnce(&Path)) -> Self {
        // SAFETY: these only change what this thread sees; no descriptor table is affected.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWNET) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let tmpfs = |path: &str| mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
        tmpfs("/run");
        mount("bpffs", "/sys/fs/bpf", "bpf", MountFlags::empty(), None).unwrap();
        // A sysfs of this network.
        for args in [
            ["link", "set", "lo", "up"].as_slice(),
            &["address", "add", "192.0.2.1/32", "dev", "lo"],
        ] {
            assert!(Command::new("ip").args(args).status().unwrap().success());
        }
        let dir = tempfile::Builder::new().prefix("flynn-hostd-").tempdir().unwrap();
        let state = dir.path().join("state");
        fs::create_dir(&state).unwrap();
        prepare(&state);
        let (layer_file, layer) = image(dir.path());
        Self {
            state,
            api: HostClient::new(Http::new("unix:/run/flynn/host.sock").unwrap()),
            layer,
            layer_file,
            groups: groups(dir.path().file_name().unwrap().to_str().unwrap()),
            daemon: RefCell::default(),
            successor: Cell::default(),
            jobs: Cell::new(0),
            dir,
        }
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) async fn start(&self) {
        self.start_program(Path::new(BINARY)).await;
    }

    /// The same, from this file.
    pub(crate) async fn start_program(&self, program: &Path) {
        let child = self.command(program).stdin(Stdio::null()).spawn().unwrap();
        self.daemon.replace(Some(child));
        let answered = self.until(async || self.api.status().await.ok()).await;
        assert!(answered.is_some(), "the daemon does not answer:\n{}", self.log());
    }

    /// A daemon of this host's.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("daemon.log"))
            .unwrap();
        // Into its cgroups first; the paths are arguments, not text of the script.
        // A daemon before may have made room for jobs, and a leaf for itself.
        let enter = r#"while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || echo $$ > "$1/flynn-host/cgroup.procs"
            shift; done; shift; exec "$@""#;
        let mut command = Command::new("sh");
        command
            .args(["-euc", enter, "sh"])
            .args(&self.groups)
            .arg("--")
            .arg(program)
            .args(["daemon", "--id", "one", "--address", "192.0.2.1", "--state"])
            .arg(&self.state)
            .env("RUST_LOG", "debug")
            .stdout(Stdio::null())
            .stderr(log);
        command
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        let successor = self.successor.get();
        successor.unwrap_or_else(|| self.daemon.borrow().as_ref().unwrap().id())
    }

    /// Kills the daemon as the kernel would, and one before it that still has connections.
    pub(crate) fn kill_daemon(&self) {
        let mut child = self.daemon.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if let Some(pid) = self.successor.take() {
            kill(pid, 9);
            while lives(pid) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Has another program go on with the daemon's work; the same one when none is named.
    pub(crate) async fn update(&self, binary: Option<&Path>) -> flynn_api::Result<Updated> {
        let binary = binary.map(|path| path.to_str().unwrap().to_owned());
        let updated = self.api.update(&Update { binary }).await?;
        self.follow(&updated);
        Ok(updated)
    }

    /// Notes whose work the daemon's is now.
    pub(crate) fn follow(&self, updated: &Updated) {
        self.successor.set(Some(updated.pid));
    }

    /// Whether the daemon that was started, and not one that has taken over from it, has ended.
    pub(crate) fn first_daemon_ended(&self) -> bool {
        let mut daemon = self.daemon.borrow_mut();
        daemon.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    /// Stops the daemon as an operator would.
    pub(crate) fn stop_daemon(&self) {
        let mut child = self.daemon.take().unwrap();
        kill(child.id(), 15);
        assert!(child.wait().unwrap().success());
    }

    /// Waits for something; none when it does not come.
    pub(crate) async fn until<T>(&self, mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(found) = look().await {
                return Some(found);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        None
    }

    /// A job that runs this script in a shell, in the host's network.
    pub(crate) fn job(&self, script: &str) -> Job {
        self.jobs.set(self.jobs.get() + 1);
        Job {
            id: format!("one-{}", self.jobs.get()),
            artifacts: vec![self.artifact()],
            config: ContainerConfig {
                args: ["/bin/sh", "-c", script].map(str::to_owned).into(),
                host_network: true,
                ..ContainerConfig::default()
            },
            ..Job::default()
        }
    }

    pub(crate) fn artifact(&self) -> Artifact {
        Artifact::image(
            ImageManifest::new(Entrypoint::default(), vec![self.layer.clone()]),
            "",
            None,
        )
    }

    /// Adds a job and waits until it runs or is over.
    pub(crate) async fn run(&self, job: &Job) -> ActiveJob {
        if let Err(error) = self.api.add_job(job).await {
            panic!("{error}\n{}\n{}", self.log(), self.supervisor_log(&job.id));
        }
        self.wait(&job.id, |job| {
            job.started_at.is_some() || job.status.is_terminal()
        })
        .await
    }

    /// Waits for a state of a job.
    pub(crate) async fn wait(&self, id: &str, wanted: impl Fn(&ActiveJob) -> bool) -> ActiveJob {
        let mut last = None;
        let found = self
            .until(async || {
                last = self.api.job(id).await.ok();
                last.clone().filter(|job| wanted(job))
            })
            .await;
        found.unwrap_or_else(|| panic!("{last:#?}\n{}\n{}", self.log(), self.supervisor_log(id)))
    }

    fn supervisor_log(&self, id: &str) -> String {
        fs::read_to_string(self.state.join("jobs").join(id).join("supervisor.log")).unwrap_or_default()
    }

    /// Waits until a job is over.
    pub(crate) async fn end(&self, id: &str) -> ActiveJob {
        self.wait(id, |job| job.status.is_terminal()).await
    }

    /// Runs a script to its end; gives the job and its output.
    pub(crate) async fn script(&self, script: &str) -> (ActiveJob, Vec<String>) {
        let job = self.job(script);
        self.finish(&job).await
    }

    /// Runs a job to its end; gives it and its output.
    pub(crate) async fn finish(&self, job: &Job) -> (ActiveJob, Vec<String>) {
        self.run(job).await;
        let ended = self.end(&job.id).await;
        (
            ended,
            self.lines(&job.id)
                .await
                .into_iter()
                .map(|line| line.msg)
                .collect(),
        )
    }

    /// What `GET /metrics` says.
    pub(crate) async fn metrics(&self) -> String {
        use http_body_util::BodyExt as _;
        let request = http::Request::get("/metrics").body(flynn_api::client::full(""));
        let answer = self.api.http().send(request.unwrap()).await.unwrap();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    /// All lines of a job's log.
    pub(crate) async fn lines(&self, id: &str) -> Vec<LogLine> {
        let log = self.api.log(id, None, false).await.unwrap();
        log.map(|line| line.unwrap().1).collect().await
    }

    /// Waits until a job has said this.
    pub(crate) async fn says(&self, id: &str, text: &str) {
        let said = self
            .until(async || {
                self.lines(id)
                    .await
                    .iter()
                    .any(|line| line.msg.contains(text))
                    .then_some(())
            })
            .await;
        assert!(said.is_some(), "never said {text:?}: {:?}", self.lines(id).await);
    }

    /// Puts a file into the layer store under the digest of the test image.
    pub(crate) async fn put_layer(&self, file: &Path) -> flynn_api::Result<()> {
        self.put_layer_as(self.layer.id, fs::read(file).unwrap()).await
    }

    pub(crate) async fn put_layer_as(&self, digest: Digest, bytes: Vec<u8>) -> flynn_api::Result<()> {
        let request =
            http::Request::put(format!("/host/layers/{digest}")).body(flynn_api::client::full(bytes));
        self.api.http().send(request.unwrap()).await.map(drop)
    }

    /// The groups of a job that are there.
    pub(crate) fn job_groups(&self, id: &str) -> Vec<PathBuf> {
        let dirs = self.groups.iter().map(|group| group.join("flynn/user").join(id));
        dirs.filter(|dir| dir.exists()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let deadline = Instant::now() + PATIENCE;
        while self.groups.iter().any(|group| group.exists()) && Instant::now() < deadline {
            for group in &self.groups {
                let _ = fs::write(group.join("cgroup.kill"), "1");
                for pid in pids_below(group) {
                    kill(pid, 9);
                }
                remove_groups(group);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let unmount = |path: &Path| {
            let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
        };
        for entry in fs::read_dir("/run/flynn/layers").into_iter().flatten().flatten() {
            unmount(&entry.path());
        }
        // Some tests keep their state on a small disk of its own.
        unmount(&self.state);
    }
}

/// Sends a signal to a process that a test has started, or a job of its host.
pub(crate) fn kill(pid: u32, signal: i32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

/// Whether a process is there and no zombie.
pub(crate) fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

pub(crate) fn pids_below(group: &Path) -> Vec<u32> {
    let mut pids = Vec::new();
    let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pids.extend(pids_below(&entry.path()));
        }
    }
    pids
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// A group of the test's own in each hierarchy, below the one that the test is in.
fn groups(name: &str) -> Vec<PathBuf> {
    let all = flynn_hostd::cgroup::Hierarchies::find().unwrap();
    let make = |hierarchy: &flynn_hostd::cgroup::Hierarchy| {
        if hierarchy.is_v2() {
            // What systemd does for a unit with `Delegate=yes`.
            let there = fs::read_to_string(hierarchy.base.join("cgroup.controllers")).unwrap();
            for controller in there.split_whitespace() {
                let _ = fs::write(
                    hierarchy.base.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
        }
        let group = hierarchy.base.join(name);
        fs::create_dir(&group).unwrap();
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if hierarchy.has("cpuset") {
                fs::write(group.join(file), fs::read(hierarchy.base.join(file)).unwrap()).unwrap();
            }
        }
        group
    };
    all.iter().map(make).collect()
}

/// A root file system with busybox as every program.
fn image(dir: &Path) -> (PathBuf, Layer) {
    let root = dir.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    let busybox = busybox().unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let applets = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(applets.stdout).unwrap().lines() {
        if applet != "busybox" {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
    )
    .unwrap();
    // Where an image has links that lead out of it.
    std::os::unix::fs::symlink("/nowhere/resolv.conf", root.join("etc/resolv.conf")).unwrap();
    let file = dir.join("layer.squashfs");
    let made = Command::new("mksquashfs")
        .args([root.as_path(), file.as_path()])
        .args(["-quiet", "-no-progress", "-all-root", "-Xcompression-level", "1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    fs::remove_dir_all(root).unwrap();
    let bytes = fs::read(&file).unwrap();
    let length = fs::metadata(&file).unwrap().size();
    (file, Layer::squashfs(Digest::of(&bytes), length))
}

/// Loses what an I/O error says; tests only want to know that there was one.
pub(crate) fn is_gone(path: &Path) -> bool {
    matches!(fs::metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound)
}
