//! The process that keeps one job: `flynn-host supervise <job directory>`.
//!
//! It has a session, a cgroup and (unless the job is in the host's network) a network namespace of its own, which
//! outlives restarts of the container. It waits on the job's socket for the daemon to say go, makes the container,
//! carries its output, watches its health, and leaves once the job is over and its status is on the disk.

mod backoff;
mod exec;
mod input;
mod inside;
mod output;
mod run;
mod server;
mod services;
mod streams;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::client::attach::Frame;
use flynn_api::host::{JobState, attach};
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

pub use self::backoff::Backoff;
pub use output::frame_of;

use self::inside::Inside;
use self::output::Output;
use self::run::{End, Prepared, Run};
use self::server::{Command, Server};
use crate::cgroup::{Group, Hierarchies};
use crate::container::{OwnLayer, Place, UserNamespace};
use crate::control::PROTOCOL;
use crate::launch::Launch;
use crate::status::{ProcessId, Status, boot_id};
use crate::sys;

/// How long a job that is over waits for the client that it was made for.
const LINGER: Duration = Duration::from_secs(10);

/// Between looks whether the job is still this supervisor's, while it waits for its network.
const ORPHAN_CHECK: Duration = Duration::from_secs(5);

/// How long clients may take nothing of what is left for them at the end; and the client that the job was made for, who may be
/// reading.
const FAREWELL: Duration = Duration::from_secs(5);
const CLIENT_FAREWELL: Duration = Duration::from_secs(30);

/// Where a supervisor logs, in its job's directory.
pub const LOG: &str = "supervisor.log";

/// Runs the supervisor of the job in `job_dir` to its end.
pub fn supervise(job_dir: &Path) -> io::Result<()> {
    detach()?;
    let job = Job::take(job_dir, false)?;
    let hierarchies = Hierarchies::find()?;
    crate::cgroup::enter_supervisors_group(&hierarchies)?;
    run(job, job_dir, &hierarchies)
}

/// Gets ready for a job that is not in the host's network, waits until standard input says its directory, and runs its
/// supervisor to its end. Without a word at the end of the input there is none.
pub fn wait_for_job() -> io::Result<()> {
    detach()?;
    make_network()?;
    rustix::io::write(rustix::stdio::stdout(), b"\n")?;
    let hierarchies = Hierarchies::find()?;
    crate::cgroup::enter_supervisors_group(&hierarchies)?;
    let mut line = Vec::new();
    io::stdin().lock().read_until(b'\n', &mut line)?;
    let Some(job_dir) = line.strip_suffix(b"\n") else {
        return Ok(());
    };
    let job_dir = Path::new(OsStr::from_bytes(job_dir));
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    run(Job::take(job_dir, true)?, job_dir, &hierarchies)
}

/// A job that this process keeps from here on.
struct Job {
    launch: Launch,
    status: Status,
    listener: UnixListener,
}

impl Job {
    /// Takes it. One that was made in advance (`spare`) has a network namespace, but no log. The daemon hears that the job is
    /// taken, and sees to the network from then on, or why not.
    fn take(job_dir: &Path, spare: bool) -> io::Result<Self> {
        let job = Self::open(job_dir, spare);
        match &job {
            Ok(_) => begun()?,
            // Its log may be on a disk that is full.
            Err(error) => drop(rustix::io::write(
                rustix::stdio::stdout(),
                error.to_string().as_bytes(),
            )),
        }
        job
    }

    fn open(job_dir: &Path, spare: bool) -> io::Result<Self> {
        let launch = Launch::read(job_dir)?;
        if spare {
            let log = File::options()
                .create(true)
                .append(true)
                .open(job_dir.join(LOG))?;
            rustix::stdio::dup2_stderr(log)?;
        } else if !launch.host_network {
            make_network()?;
        }
        let mut status = Status::read(job_dir)?.unwrap_or_else(|| Status::new(Timestamp::now(), boot_id()));
        status.supervisor = Some(ProcessId::own());
        status.protocol = PROTOCOL;
        status.boot_id = boot_id();
        status.write(job_dir)?;
        let listener = listen(&launch.socket)?;
        Ok(Self {
            launch,
            status,
            listener,
        })
    }
}

/// Makes this process independent of the one that has started it.
fn detach() -> io::Result<()> {
    // Fails where the caller has made us a session's leader already.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    rustix::thread::set_name(c"flynn-supervise")?;
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGPIPE] {
        sys::ignore_signal(signal);
    }
    Ok(())
}

/// A network namespace of our own.
fn make_network() -> io::Result<()> {
    sys::unshare_network()?;
    sys::loopback_up()?;
    // Programs that are not root may bind low ports and ping: the namespace is theirs alone.
    for (name, value) in [
        ("ip_unprivileged_port_start", "0"),
        ("ping_group_range", "0 2147483647"),
    ] {
        let _ = std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value);
    }
    Ok(())
}

fn run(job: Job, job_dir: &Path, hierarchies: &Hierarchies) -> io::Result<()> {
    let launch = &job.launch;
    let (partition, id) = (launch.partition, &launch.job_id);
    let group = Group::of(hierarchies, partition, id);
    let make_group = || Group::create(hierarchies, partition, id, &launch.limits, job_dir).err();
    // What goes wrong is said when it is needed, and tried again.
    let users = launch
        .first_id()
        .and_then(|first| UserNamespace::create(first).ok());
    // While the daemon sees to the network, and of v1 while the kernel sees to the groups. A container of which something is
    // missing is made when it is needed, and what is wrong said then.
    let has_users = users.is_some() || launch.first_id().is_none();
    // What an earlier supervisor's container has left may take long to remove, and so may a disk to be made; and the daemon
    // waits for an answer.
    let is_quick = launch.temp_disk.is_none() && !job_dir.join("upper").exists();
    let begin = || {
        let begun = (has_users && is_quick).then(|| Prepared::begin(launch, job_dir, &group, users.as_ref()));
        begun.and_then(Result::ok)
    };
    let (unlimited, begun) = if group.cradle().is_some() {
        (make_group(), begin())
    } else {
        let begun = begin();
        (make_group(), begun)
    };
    let begun = begun.filter(|_| unlimited.is_none());
    let prepared = begun.and_then(|begun| begun.join(&group).ok());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    runtime.block_on(Supervisor::start(
        job,
        job_dir,
        (group, unlimited),
        users,
        prepared,
    ))
}

/// What the loop and the runs share.
struct Supervisor {
    launch: Launch,
    job_dir: Arc<Path>,
    group: Group,
    /// Why the job's limits cannot be set: then it does not start.
    unlimited: Option<io::Error>,
    /// Made before it is needed, and kept for all runs.
    users: Option<UserNamespace>,
    /// The first container, made in advance.
    prepared: Option<Prepared>,
    output: Arc<Output>,
    input: streams::Input,
    status: watch::Sender<Status>,
    place: watch::Sender<Place>,
    /// The container while the program runs.
    inside: watch::Sender<Option<Inside>>,
    commands: mpsc::Receiver<Command>,
    /// The host is going down: a stop that nobody asked for.
    terminate: tokio::signal::unix::Signal,
    terminated: bool,
}

impl Supervisor {
    async fn start(
        job: Job,
        job_dir: &Path,
        (group, unlimited): (Group, Option<io::Error>),
        users: Option<UserNamespace>,
        prepared: Option<Prepared>,
    ) -> io::Result<()> {
        let job_dir: Arc<Path> = job_dir.into();
        let Job {
            launch,
            status,
            listener,
        } = job;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let (stdin, input) = mpsc::unbounded_channel();
        let output = Arc::new(Output::new(&launch, &job_dir, stdin));
        let (commands_in, commands) = mpsc::channel(16);
        let status = watch::Sender::new(status);
        let (open, mut closed) = mpsc::channel::<()>(1);
        let (inside, place) = (watch::Sender::new(None), watch::Sender::new(Place::default()));
        let server = Server {
            job_dir: Arc::clone(&job_dir),
            commands: commands_in,
            status: status.subscribe(),
            output: Arc::clone(&output),
            inside: inside.subscribe(),
            place: place.subscribe(),
            clients: Server::clients(),
        };
        let accepting = tokio::spawn(server.run(listener, open));
        let socket = launch.socket.clone();
        let mut supervisor = Self {
            launch,
            job_dir,
            group,
            unlimited,
            users,
            prepared,
            output,
            input: Arc::new(tokio::sync::Mutex::new(input)),
            status,
            inside,
            place,
            commands,
            terminate: tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?,
            terminated: false,
        };
        let end = supervisor.keep().await;
        supervisor.finish(end).await;
        accepting.abort();
        let _ = accepting.await;
        let _ = std::fs::remove_file(&socket);
        let farewell = supervisor.client_patience();
        let Self {
            output,
            status,
            commands,
            ..
        } = supervisor;
        drop((status, commands));
        // Connections hold the sender; the channel ends with the last of them.
        loop {
            let before = output.written();
            if timeout(farewell, closed.recv()).await.is_ok() || output.written() == before {
                break;
            }
        }
        Ok(())
    }

    /// Starts the program, and again while it is to be kept; gives how it ended.
    async fn keep(&mut self) -> End {
        if let Some(end) = self.wait_for_go().await {
            return end;
        }
        if let Some(why) = &self.unlimited {
            return End::Failed(format!("its limits cannot be set: {why}"));
        }
        let mut backoff = Backoff::default();
        loop {
            let began = Instant::now();
            let end = Run::new(self).await;
            if !self.launch.resurrect || self.over() {
                return end;
            }
            let pause = backoff.after(began.elapsed());
            let why = end.describe();
            self.output
                .say(format!("{why}; starting it again in {} ms", pause.as_millis()));
            self.change(|status| {
                status.state = JobState::Starting;
                status.pid = None;
                status.healthy = false;
                status.paused = false;
                status.error = Some(why);
                status.exit_status = end.status();
                status.oom_killed = end.oom_killed();
                status.restarts += 1;
            })
            .await;
            let wake = Instant::now() + pause;
            while Instant::now() < wake && !self.over() {
                tokio::select! {
                    () = tokio::time::sleep_until(wake) => {}
                    Some(command) = self.commands.recv() => self.without_program(command).await,
                    _ = self.terminate.recv() => self.terminated = true,
                }
            }
            if self.over() {
                return end;
            }
        }
    }

    /// A container that has its place.
    fn container(&mut self) -> io::Result<Prepared> {
        if let Some(prepared) = self.prepared.take() {
            return Ok(prepared);
        }
        self.make_users()?;
        let begun = Prepared::begin(&self.launch, &self.job_dir, &self.group, self.users.as_ref())?;
        let made = begun.join(&self.group)?;
        made.place(&self.place.borrow());
        Ok(made)
    }

    /// Sees that the container's user namespace is there, if it is to have one.
    fn make_users(&mut self) -> io::Result<()> {
        if let (None, Some(first)) = (&self.users, self.launch.first_id()) {
            self.users = Some(UserNamespace::create(first).map_err(|error| {
                io::Error::new(error.kind(), format!("no user namespace can be made: {error}"))
            })?);
        }
        Ok(())
    }

    /// Whether the job is not to be started again.
    fn over(&self) -> bool {
        self.terminated || self.status.borrow().stop_requested
    }

    /// How long clients are waited for at the end.
    fn client_patience(&self) -> Duration {
        if self.launch.interactive() && !self.over() {
            CLIENT_FAREWELL
        } else {
            FAREWELL
        }
    }

    async fn wait_for_go(&mut self) -> Option<End> {
        let mut orphaned = tokio::time::interval(ORPHAN_CHECK);
        while !self.over() {
            tokio::select! {
                _ = orphaned.tick() => {
                    // The daemon died before it knew of this supervisor, and a later one has given the job up, or
                    // to another supervisor.
                    let stored = Status::read(&self.job_dir).ok().flatten();
                    if stored.is_none_or(|stored| stored.supervisor != Some(ProcessId::own())) {
                        sys::exit_now(0);
                    }
                }
                command = self.commands.recv() => match command? {
                    Command::Go(place) => {
                        let address = place.address;
                        self.place.send_replace(place.clone());
                        if let Some(prepared) = &self.prepared {
                            prepared.place(&place);
                            // It goes to the disk with the program's pid, in a moment.
                            self.status.send_modify(|status| status.address = address);
                        } else {
                            self.change(|status| status.address = address).await;
                        }
                        return None;
                    }
                    other => self.without_program(other).await,
                },
                _ = self.terminate.recv() => self.terminated = true,
            }
        }
        Some(End::Stopped)
    }

    /// Takes note of another place in the network, as a daemon tells it that finds the job without its interface.
    async fn move_to(&mut self, place: Place) {
        let address = place.address;
        self.place.send_replace(place);
        if self.status.borrow().address != address {
            self.change(|status| status.address = address).await;
        }
    }

    /// Answers a command while there is no program.
    async fn without_program(&mut self, command: Command) {
        match command {
            Command::Go(place) => self.move_to(place).await,
            Command::Stop => self.change(|status| status.stop_requested = true).await,
            Command::Signal(_, reply) | Command::Pause(_, reply) => {
                drop(reply.send(Some("the job's program is not running".into())));
            }
            Command::Deregister(reply) => drop(reply.send(None)),
        }
    }

    /// Changes the status: on the disk first, then for those who watch. An end waits for room on the disk: it must not be
    /// lost. What goes on waits for nobody: the next change writes it as well.
    async fn change(&self, change: impl FnOnce(&mut Status)) {
        let mut status = self.status.borrow().clone();
        change(&mut status);
        let mut said = false;
        while let Err(error) = status.write(&self.job_dir) {
            self.status.send_replace(status.clone());
            if !std::mem::replace(&mut said, true) {
                tracing::error!(%error, "cannot write the job's status; trying on");
                if status.state.is_terminal() {
                    // The job itself may have filled the disk.
                    self.remove_own_layer().await;
                    continue;
                }
            }
            if !status.state.is_terminal() {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
        self.status.send_replace(status);
    }

    /// Removes what the container has written beside its volumes, once that is over.
    async fn remove_own_layer(&self) {
        let dir = Arc::clone(&self.job_dir);
        let removal = move || {
            for name in OwnLayer::NAMES {
                if let Err(error) = crate::files::remove_all(&dir.join(name)) {
                    tracing::error!(%error, name, "cannot be removed");
                }
            }
        };
        let _ = tokio::task::spawn_blocking(removal).await;
    }

    /// Notes the end, and gives everyone who is connected the time to hear of it.
    async fn finish(&mut self, end: End) {
        let _ = self.group.kill();
        let stop_requested = self.status.borrow().stop_requested;
        let (state, mut error) = match &end {
            End::Failed(why) => (JobState::Failed, Some(why.clone())),
            // One that was ended for its health has failed, however well it took it.
            End::Stopped
            | End::Exited {
                status: 0, why: None, ..
            } => (JobState::Done, None),
            End::Exited { .. } if stop_requested => (JobState::Done, None),
            End::Exited { oom_killed: true, .. } => (JobState::Crashed, Some(end.describe())),
            End::Exited { why, .. } => (JobState::Crashed, why.clone()),
        };
        if self.terminated {
            error = Some("the host was shut down".into());
        }
        let exit_status = end.status();
        let oom_killed = end.oom_killed();
        self.change(|status| {
            status.end(state, Timestamp::now());
            status.exit_status = exit_status;
            status.error.clone_from(&error);
            status.oom_killed = oom_killed;
        })
        .await;
        // After the status, since the kernel takes its time.
        let _ = self.group.remove(Duration::from_secs(2));
        let last = match exit_status {
            Some(exit) => Frame::new(attach::EXIT, exit.to_be_bytes()),
            None => Frame::new(
                attach::ERROR,
                error.unwrap_or_else(|| "the job was stopped".into()),
            ),
        };
        self.output.finish(last, self.client_patience()).await;
        if self.launch.interactive() && !self.over() {
            let _ = timeout(LINGER, self.output.first_client()).await;
        }
    }
}

/// Tells the daemon that the socket is there, by closing its end of our standard output.
fn begun() -> io::Result<()> {
    let null = File::options().write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdout(null)?)
}

/// A root-only socket, which is there as soon as it takes connections, and not before.
pub(crate) fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        crate::files::private_dir(dir)?;
    }
    let new = socket.with_extension("new");
    crate::files::remove_all(&new)?;
    let listener = UnixListener::bind(&new)?;
    listener.set_nonblocking(true)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(new, socket)?;
    Ok(listener)
}
