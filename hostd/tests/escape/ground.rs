//! Where tricks are tried: in an ordinary job's container, made as its supervisor makes it, and outside, as root in
//! namespaces of its own.
//!
//! This program is executed anew for each part: a container is made by a process with one thread.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use flynn_api::Env;
use flynn_api::host::{Partition, UserNamespace};
use flynn_hostd::caps::Set;
use flynn_hostd::cgroup::{Group, Hierarchies, Limits};
use flynn_hostd::container::{self, Container, Execution, FromInit, IDS, OwnLayer, Pipes, Place};
use flynn_hostd::launch::{self, Bind, Launch};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use crate::cases::{CASES, Case};
use crate::tricks;

/// How this program is called in the container.
const PROGRAM: &str = "/escape";

/// The directory of one attempt: the image, the job's directory, and what must not be reached. Goes with its groups.
pub(crate) struct Ground {
    dir: tempfile::TempDir,
    pub(crate) launch: Launch,
    /// Sockets of the host, one with a path and one with only a name.
    _sockets: [UnixListener; 2],
}

impl Ground {
    /// An ordinary job's that runs this program with these arguments.
    pub(crate) fn new(args: &[&str]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("flynn-escape-")
            .tempdir()
            .unwrap();
        for name in [
            "layer",
            "job",
            "job/upper",
            "job/work",
            "job/root",
            "host",
            "scratch",
        ] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("host/secret"), "of the host").unwrap();
        // Root's alone.
        let secret = fs::Permissions::from_mode(0o600);
        fs::set_permissions(dir.path().join("host/secret"), secret).unwrap();
        let host = dir.path().join("host");
        let name = <SocketAddr as SocketAddrExt>::from_abstract_name(host.as_os_str().as_encoded_bytes());
        let sockets = [
            UnixListener::bind(host.join("socket")).unwrap(),
            UnixListener::bind_addr(&name.unwrap()).unwrap(),
        ];
        let own = std::env::current_exe().unwrap();
        let bind = |source: PathBuf, target: PathBuf| Bind {
            source,
            target,
            writable: false,
            ids_of_container: false,
        };
        let mut binds = vec![bind(own, PROGRAM.into())];
        binds.extend(libraries().into_iter().map(|(from, to)| bind(from, to)));
        let host = host.to_str().unwrap();
        let variables = [
            ("LD_LIBRARY_PATH", "/lib"),
            (tricks::SCRATCH, "/tmp"),
            (tricks::DEVICES, "/dev"),
            (tricks::HOST, host),
        ];
        let launch = Launch {
            version: 1,
            job_id: "escape".into(),
            process_type: String::new(),
            app_id: String::new(),
            socket: dir.path().join("socket"),
            host_ip: std::net::Ipv4Addr::LOCALHOST,
            args: std::iter::once(PROGRAM)
                .chain(args.iter().copied())
                .map(str::to_owned)
                .collect(),
            env: variables
                .map(|(name, value)| (name.into(), value.into()))
                .into_iter()
                .collect::<Env>(),
            working_dir: "/".into(),
            uid: 0,
            gid: 0,
            capabilities: Set::default_container(),
            ambient: Set::default(),
            tty: false,
            tty_size: None,
            stdin: false,
            disable_log: false,
            layers: vec![dir.path().join("layer")],
            binds,
            hostname: "escape".into(),
            host_network: false,
            host_pid_namespace: false,
            user_namespace: None,
            apparmor: false,
            partition: Partition::User,
            limits: Limits {
                memory: 256 << 20,
                swap: 0,
                cpu: 1000,
                cpu_weight: 100,
                cpuset: String::new(),
                pids: 64,
                io_weight: 100,
                io_read: 0,
                io_write: 0,
            },
            temp_disk: None,
            max_files: 1024,
            ports: Vec::new(),
            services: Vec::new(),
            instance_meta: flynn_api::Meta::default(),
            stop_timeout: 1,
            resurrect: false,
        };
        Self {
            dir,
            launch,
            _sockets: sockets,
        }
    }

    /// The same, with a user namespace of its own.
    pub(crate) fn with_users(mut self) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Each its own range, of those that the daemon takes.
        let range = NEXT.fetch_add(1, Ordering::Relaxed) % 4000;
        self.launch.user_namespace = Some(UserNamespace::FirstId(0x7000_0000 + range * IDS));
        self
    }

    /// Why the machine cannot do that; none when it can.
    pub(crate) fn lacks_users() -> Option<String> {
        static LACKS: OnceLock<Option<String>> = OnceLock::new();
        let ask = || {
            let said = Self::new(&[]).with_users().run("--map", &[]);
            (said != ["mapped"]).then(|| format!("no user namespaces: {said:?}"))
        };
        LACKS.get_or_init(ask).clone()
    }

    /// The image's root directory.
    pub(crate) fn layer(&self) -> PathBuf {
        self.dir.path().join("layer")
    }

    /// The job's directory.
    pub(crate) fn job(&self) -> PathBuf {
        self.dir.path().join("job")
    }

    /// A directory of the host's that no container has, with a file `secret`.
    pub(crate) fn host(&self) -> PathBuf {
        self.dir.path().join("host")
    }

    /// Runs the job; gives what was said: by it, and about its start and end.
    pub(crate) fn contain(&self) -> Vec<String> {
        self.run("--contain", &[])
    }

    /// The same, and this beside it once it runs.
    pub(crate) fn execute(&self, args: &[&str]) -> Vec<String> {
        self.run("--contain", args)
    }

    /// Runs the job, and says who its processes are outside: the user, group and rights of each.
    pub(crate) fn who(&self) -> Vec<String> {
        self.run("--contain", &["--who"])
    }

    /// Runs this program as root of the job's user namespace, outside of any container.
    pub(crate) fn in_users_alone(&self, case: &Case) -> Vec<String> {
        // Where it may make files: the others' directory it cannot even enter.
        self.run_with("--outside", &["own", case.name, "users"], &std::env::temp_dir())
    }

    /// Runs this program as root outside of any container, in namespaces of its own.
    pub(crate) fn outside(&self, case: &Case) -> Vec<String> {
        let network = if case.same_network { "same" } else { "own" };
        self.run("--outside", &[network, case.name])
    }

    fn run(&self, role: &str, args: &[&str]) -> Vec<String> {
        self.run_with(role, args, &self.dir.path().join("scratch"))
    }

    fn run_with(&self, role: &str, args: &[&str], scratch: &Path) -> Vec<String> {
        let job = self.dir.path().join("job");
        fs::write(job.join(launch::FILE), serde_json::to_vec(&self.launch).unwrap()).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .arg(role)
            .arg(self.dir.path())
            .args(args)
            .env(tricks::SCRATCH, scratch)
            .env(tricks::DEVICES, scratch)
            .env(tricks::HOST, self.host())
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        said.lines().map(str::to_owned).collect()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let name = self.dir.path().file_name().unwrap_or_default();
        for hierarchy in &Hierarchies::find().unwrap_or_default() {
            remove_groups(&hierarchy.base.join(name));
        }
    }
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    // The kernel needs a moment after a group's last process.
    for _ in 0..1000 {
        match fs::remove_dir(group) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            _ => return,
        }
    }
}

/// The shared libraries of this program, and where it finds them in the container.
fn libraries() -> Vec<(PathBuf, PathBuf)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut found: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().nth(5).map(PathBuf::from))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().contains(".so"))
        })
        .collect();
    found.sort();
    found.dedup();
    let place = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_owned();
        let is_loader = name.to_string_lossy().starts_with("ld-");
        let dir = if is_loader { "/lib64" } else { "/lib" };
        (path, Path::new(dir).join(name))
    };
    found.into_iter().map(place).collect()
}

/// What this program does when it is not called as a test: none if it is.
pub(crate) fn role() -> Option<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["--contain", dir, executed @ ..] => contain(Path::new(dir), executed),
        ["--outside", dir, network, case, users @ ..] => outside(Path::new(dir), network, case, users),
        ["--first", case] => first(case),
        ["--first", case, dir] => first_in_users(case, Path::new(dir)),
        ["--map", dir] => map(Path::new(dir)),
        ["--make-setuid", path] => make_setuid(Path::new(path)),
        ["--try", case] => {
            attempt(case);
            Ok(())
        }
        ["--try", cases @ ..] => each(cases),
        ["--wait"] => {
            // Until the job's other program is done, which ends this one.
            loop {
                std::thread::park();
            }
        }
        ["--look", paths @ ..] => {
            for path in paths {
                look(path);
            }
            Ok(())
        }
        _ => return None,
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cannot: {error}");
            ExitCode::FAILURE
        }
    })
}

/// Tries one after the other: each may change the process that does it.
fn each(cases: &[&str]) -> io::Result<()> {
    cases
        .iter()
        .try_for_each(|case| Command::new(PROGRAM).args(["--try", case]).status().map(drop))
}

/// Tries a trick and says what came of it.
fn attempt(name: &str) {
    let Some(case) = CASES.iter().find(|case| case.name == name) else {
        return println!("{name}: unknown");
    };
    match (case.trick)() {
        Ok(()) => println!("{name}: worked"),
        Err(error) => match error.raw_os_error() {
            Some(number) => println!("{name}: refused {number} {error}"),
            None => println!("{name}: broken: {error}"),
        },
    }
}

/// Says what is behind a path, `cwd` for the working directory and `fd` for what is open.
fn look(path: &str) {
    match path {
        "fd" => {
            let open: Vec<_> = fs::read_dir("/proc/self/fd")
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| fs::read_link(entry.path()).unwrap_or_default())
                .collect();
            println!("fd: {open:?}");
        }
        "cwd" => println!("cwd: {:?}", std::env::current_dir()),
        "uid" => println!("uid: {}", rustix::process::geteuid().as_raw()),
        _ => match fs::File::open(path) {
            Ok(mut file) => {
                let mut text = String::new();
                let _ = io::Read::take(&mut file, 64).read_to_string(&mut text);
                println!("{path}: {text:?}");
            }
            Err(error) => println!("{path}: refused {}", error.raw_os_error().unwrap_or_default()),
        },
    }
}

/// Enters the attempt's own group of each hierarchy.
fn enter_groups(dir: &Path) -> io::Result<()> {
    for hierarchy in &Hierarchies::find()? {
        let group = hierarchy.base.join(dir.file_name().unwrap_or_default());
        match fs::create_dir(&group) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if hierarchy.has("cpuset") {
                fs::write(group.join(file), fs::read(hierarchy.base.join(file))?)?;
            }
        }
        fs::write(group.join("cgroup.procs"), std::process::id().to_string())?;
    }
    Ok(())
}

fn unshare(what: UnshareFlags) -> io::Result<()> {
    // SAFETY: this process has one thread, and no descriptor table is shared.
    Ok(unsafe { rustix::thread::unshare_unsafe(what) }?)
}

/// Does what a supervisor does, once.
fn contain(dir: &Path, executed: &[&str]) -> io::Result<()> {
    enter_groups(dir)?;
    unshare(UnshareFlags::NEWNET)?;
    let job_dir = dir.join("job");
    let launch = Launch::read(&job_dir)?;
    let hierarchies = Hierarchies::find()?;
    flynn_hostd::cgroup::prepare(&hierarchies)?;
    let group = Group::create(
        &hierarchies,
        launch.partition,
        &launch.job_id,
        &launch.limits,
        Path::new("/"),
    )?;
    let place = Place::default();
    let users = launch
        .first_id()
        .map(container::UserNamespace::create)
        .transpose()?;
    let own = OwnLayer::make(&launch, &job_dir)?;
    let container = Container::create(&launch, &job_dir, &own, users.as_ref(), None)?;
    group.add(container.pid)?;
    container.go()?;
    container.place(&place)?;
    let mut said = Ok(());
    while let Some(word) = container::receive(&container.init)? {
        match word {
            FromInit::Running if executed == ["--who"] => {
                said = group.pids().into_iter().try_for_each(who);
                group.kill()?;
            }
            FromInit::Running if !executed.is_empty() => {
                said = execute(&launch, &group, &place, &container, executed);
                group.kill()?;
            }
            FromInit::Failed(why) => println!("failed: {why}"),
            _ => {}
        }
    }
    let ended = rustix::process::WaitIdOptions::EXITED;
    rustix::process::waitid(rustix::process::WaitId::PidFd(container.pidfd.as_fd()), ended)?;
    if let Some(pipes) = container.pipes {
        relay(pipes)?;
    }
    group.remove(Duration::from_secs(5))?;
    said
}

/// Says who a process is.
fn who(pid: i32) -> io::Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.unwrap_or_default().to_owned()
    };
    println!("{} {} {}", line("Uid:"), line("Gid:"), line("CapBnd:"));
    Ok(())
}

/// Tries whether the image can be shown with other ids.
fn map(dir: &Path) -> io::Result<()> {
    let launch = Launch::read(&dir.join("job"))?;
    let users = container::UserNamespace::create(launch.first_id().unwrap_or_default())?;
    users.tree(&launch.layers[0])?;
    println!("mapped");
    Ok(())
}

/// Makes a program of root's that has the rights of its owner, whoever starts it.
fn make_setuid(path: &Path) -> io::Result<()> {
    fs::copy(PROGRAM, path)?;
    std::os::unix::fs::chown(path, Some(0), Some(0))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o4755))?;
    println!("made");
    Ok(())
}

/// Passes on what a program has said that is dead.
fn relay(pipes: Pipes) -> io::Result<()> {
    let mut all = Vec::new();
    fs::File::from(pipes.stdout).read_to_end(&mut all)?;
    fs::File::from(pipes.stderr).read_to_end(&mut all)?;
    io::stdout().write_all(&all)
}

/// Runs another program in the container, to its end.
fn execute(
    launch: &Launch,
    group: &Group,
    place: &Place,
    container: &Container,
    args: &[&str],
) -> io::Result<()> {
    let launch = Launch {
        args: std::iter::once(PROGRAM)
            .chain(args.iter().copied())
            .map(str::to_owned)
            .collect(),
        ..launch.clone()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(async {
        let mut execution = Execution::create(&launch, place, container.pidfd.as_fd(), None)?;
        group.add(execution.pid)?;
        execution.go()?;
        loop {
            let mut ready = execution.keeper().readable().await?;
            match ready.try_io(|keeper| container::receive(keeper.get_ref())) {
                Ok(Ok(Some(FromInit::Running))) | Err(_) => {}
                Ok(Ok(Some(FromInit::Failed(why)))) => {
                    println!("failed: {why}");
                    break;
                }
                Ok(_) => break,
            }
        }
        execution.pipes.take().map_or(Ok(()), relay)
    })
}

/// Tries a trick where it has to work.
fn outside(dir: &Path, network: &str, case: &str, users: &[&str]) -> io::Result<()> {
    enter_groups(dir)?;
    let mut namespaces =
        UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    namespaces.set(UnshareFlags::NEWNET, network == "own");
    unshare(namespaces)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let status = Command::new(std::env::current_exe()?)
        .args(["--first", case])
        .args((!users.is_empty()).then_some(dir))
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(status.to_string()))
    }
}

/// Tries a trick where nothing refuses it but the user namespace that this process is root of, with all rights there.
fn first_in_users(case: &str, dir: &Path) -> io::Result<()> {
    rustix::mount::mount("proc", "/proc", "proc", rustix::mount::MountFlags::empty(), None)?;
    let launch = Launch::read(&dir.join("job"))?;
    container::UserNamespace::create(launch.first_id().unwrap_or_default())?.enter()?;
    attempt(case);
    Ok(())
}

/// Is process 1 there.
fn first(case: &str) -> io::Result<()> {
    rustix::mount::mount("proc", "/proc", "proc", rustix::mount::MountFlags::empty(), None)?;
    // Keys of its own. Not every kernel has any.
    let _ = tricks::call(libc::SYS_keyctl, [1, 0]);
    let status = Command::new(std::env::current_exe()?)
        .args(["--try", case])
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(status.to_string()))
    }
}
