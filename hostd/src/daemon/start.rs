//! Starting jobs: what they need first, then their supervisors.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use flynn_api::host::{Job, JobEventKind, JobState};
use flynn_api::image::ImageManifest;
use flynn_api::server::disk;
use flynn_api::{Digest, Error, ErrorCode, Result};
use jiff::Timestamp;
use tokio::io::AsyncReadExt as _;
use tokio::process::Child;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use super::gate::Pass;
use super::keep::call;
use super::table::Entry;
use super::{Daemon, disk_error, layers, store};
use crate::container::Place;
use crate::control::{Connection, Request};
use crate::launch::{self, Bind, Launch};
use crate::status::{Status, boot_id};
use crate::supervisor::Backoff;
use crate::volumes::{Wanted, is_volume_id};
use crate::{apparmor, files, identities, prepare};

/// How long a supervisor that was killed may take to die.
const KILL: Duration = Duration::from_secs(10);

/// How long a supervisor may take to open its socket.
pub(super) const SUPERVISOR_START: Duration = Duration::from_secs(10);

/// An address of a network, if there is one.
type Reserved = Option<(Arc<super::network::Up>, Ipv4Addr)>;

/// How much is heard of what is in a supervisor's way.
const COMPLAINT: u64 = 4096;

impl Daemon {
    /// Takes a job and starts it; comes back when its supervisor has it.
    pub(super) async fn add(self: &Arc<Self>, job: Job) -> Result<()> {
        prepare::check(&job, &self.host_id)?;
        check_devices(&job)?;
        if let Some(there) = self.table.get(&job.id) {
            return already(&there, &job);
        }
        // A host that has just joined gets its network in a moment: the same job may be put again.
        if !job.config.host_network {
            self.network_for_jobs()?;
        }
        disk::check(self.paths.state())?;
        let status = Status::new(Timestamp::now(), boot_id());
        let job = Arc::new(job);
        let entry = Entry {
            job: Arc::clone(&job),
            status: status.clone(),
            ports: Vec::new(),
            user_namespace: None,
            attended: true,
        };
        if let Err(there) = self.table.insert(entry, Some(JobEventKind::Create)) {
            return already(&there, &job);
        }
        // A task of its own: it goes on when the caller hangs up.
        let pass = self.gate.beside(&format!("the start of job {}", job.id));
        let start = tokio::spawn(Arc::clone(self).begin(job, status, pass));
        start
            .await
            .unwrap_or_else(|_| Err(Error::internal("the start of the job was cut off")))
    }

    /// Puts a job that is in the table on the disk, and starts it.
    async fn begin(self: Arc<Self>, job: Arc<Job>, status: Status, _pass: Pass) -> Result<()> {
        // Not awaited: it is done by the time that the supervisor has made the groups.
        let hierarchies = self.hierarchies.clone();
        drop(spawn_blocking(move || crate::cgroup::warm_up(&hierarchies)));
        let (paths, record) = (self.paths.clone(), Arc::clone(&job));
        let kept = spawn_blocking(move || store::create(&paths, &record, &status)).await;
        if let Err(error) = kept.map_err(io::Error::from).flatten() {
            self.table.remove(&job.id);
            return Err(disk_error("keep the job", &error));
        }
        self.start(&job.id).await
    }

    /// Prepares a job that is in the table and starts its supervisor.
    async fn start(self: &Arc<Self>, id: &str) -> Result<()> {
        match self.attempt(id).await {
            Ok(connection) => {
                tokio::spawn(Arc::clone(self).follow(id.to_owned(), Some(connection), Backoff::default()));
                self.refill_spares();
                Ok(())
            }
            Err(error) => {
                tracing::warn!(job = id, %error, "cannot start");
                self.give_up(id, &error.message).await;
                Err(error)
            }
        }
    }

    /// Starts a job again whose supervisor is gone, after `pause`, and tries on while that fails: the job is to be
    /// kept, and what it needs (its network, room on the disk, a port) may come.
    pub(super) async fn restart(
        self: &Arc<Self>,
        id: &str,
        mut backoff: Backoff,
        mut pause: Duration,
        pass: Pass,
    ) {
        self.change(id, |status| {
            status.state = JobState::Starting;
            status.restarts += 1;
            status.boot_id = boot_id();
            status.supervisor = None;
            status.address = None;
            status.pid = None;
            status.ended_at = None;
            status.healthy = false;
        });
        drop(pass);
        loop {
            let stopped = self.stopped_within(id, pause).await;
            let Some(_pass) = self.gate.enter(&format!("the start of job {id}")).await else {
                return;
            };
            if stopped {
                return self.give_up(id, "stopped before it was started again").await;
            }
            match self.attempt(id).await {
                Ok(connection) => {
                    tokio::spawn(Arc::clone(self).follow(id.to_owned(), Some(connection), backoff));
                    return;
                }
                Err(error) => {
                    tracing::warn!(job = id, %error, "cannot start it again; trying on");
                    self.change(id, |status| status.error = Some(error.message.clone()));
                    self.clean_up_container(id, None).await;
                    pause = backoff.after(Duration::ZERO);
                }
            }
        }
    }

    async fn attempt(&self, id: &str) -> Result<Connection> {
        // Before it is this job's turn: what comes from far away keeps no other waiting.
        let entry = self.table.get(id).ok_or_else(|| Error::not_found("job", id))?;
        self.images(&entry.job).await?;
        // The semaphore is never closed.
        let _permit = self.starts.acquire().await;
        match self.try_start(id).await {
            Err(error) if layers::is_unmountable(&error) && self.set_damaged_aside(id)? => {
                self.images(&entry.job).await?;
                self.try_start(id).await
            }
            result => result,
        }
    }

    /// Whether somebody asks for a job's stop before this time is over.
    async fn stopped_within(&self, id: &str, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            if self.refuse_stopped(id).is_err() {
                return true;
            }
            if self.gate.is_left() {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            sleep(left.min(Duration::from_millis(100))).await;
        }
    }

    /// Ends a job that has no supervisor.
    async fn give_up(self: &Arc<Self>, id: &str, why: &str) {
        self.change(id, |status| {
            let state = if status.stop_requested {
                JobState::Done
            } else {
                JobState::Failed
            };
            status.end(state, Timestamp::now());
            status.error = Some(why.to_owned());
        });
        self.clean_up(id, None).await;
    }

    async fn try_start(&self, id: &str) -> Result<Connection> {
        let entry = self.table.get(id).ok_or_else(|| Error::not_found("job", id))?;
        let job = &entry.job;
        // Without its network the job would only wait.
        let network = if job.config.host_network {
            None
        } else {
            Some(self.network_for_jobs()?)
        };
        let manifests = self.images(job).await?;
        let layers = prepare::layers(&manifests)?;
        let certificates = self.certificates(job).await?;
        let launch = self.launch(job, &manifests, &layers, certificates)?;
        let job_dir = self.paths.job(id);
        serde_json::to_vec(&launch)
            .map_err(io::Error::from)
            .and_then(|bytes| files::write_for_boot(&job_dir.join(launch::FILE), &bytes))
            .map_err(|error| disk_error("keep the job", &error))?;
        self.table.note(id, |entry| {
            entry.ports.clone_from(&launch.ports);
            entry.user_namespace.clone_from(&launch.user_namespace);
        });
        self.refuse_stopped(id)?;

        let (mut child, has_network, reserved) = self.supervisor(&job_dir, network.is_some()).await?;
        // Before anybody waits for the supervisor: its pid may be another's once it is dead.
        let pid = child.id().map_or(0, u32::cast_signed);
        let attach = async |namespace: Option<File>| match (&reserved, &network, namespace) {
            (Some((network, address)), _, _) => self.occupy(network, job, *address).await.map(Some),
            (None, Some(network), Some(namespace)) => self.attach(network, job, &namespace).await.map(Some),
            _ => Ok(None),
        };
        let namespace = || (reserved.is_none()).then(|| network_namespace(pid)).transpose();
        let (connected, attached) = if has_network {
            let namespace = namespace()?;
            let both = tokio::join!(connect(&launch, &mut child), attach(namespace));
            (both.0, Some(both.1))
        } else {
            let connected = connect(&launch, &mut child).await;
            let attached = match &connected {
                Ok(_) => Some(attach(namespace()?).await),
                Err(_) => None,
            };
            (connected, attached)
        };
        if matches!(attached, Some(Err(_))) {
            // It would make a container, and wait in vain.
            let _ = child.start_kill();
        }
        let address = match attached.transpose() {
            Ok(address) => address.flatten(),
            Err(error) => {
                reap(child);
                return Err(error);
            }
        };
        let mut connection = match connected {
            Ok(connection) => connection,
            Err(error) => {
                reap(child);
                if let (Some(network), Some(address)) = (&network, address) {
                    self.network.detach(network, address).await;
                }
                return Err(error);
            }
        };
        self.table.note(id, |entry| entry.status.address = address);
        let place = Place {
            address,
            gateway: self.network.gateway(),
        };
        let result = call(&mut connection, &Request::Go(place))
            .await
            .and(self.refuse_stopped(id));
        if let Err(error) = result {
            if call(&mut connection, &Request::Stop).await.is_err() {
                // Or it would do later what it has heard.
                let _ = child.start_kill();
                let _ = timeout(KILL, child.wait()).await;
            }
            reap(child);
            if let (Some(network), Some(address)) = (&network, address) {
                self.network.detach(network, address).await;
            }
            return Err(error);
        }
        reap(child);
        Ok(connection)
    }

    /// A supervisor for the job in `job_dir`; whether it has its network namespace already, and what address in which
    /// network.
    async fn supervisor(&self, job_dir: &Path, networked: bool) -> Result<(Child, bool, Reserved)> {
        let spare = if networked { self.take_spare().await } else { None };
        if let Some(mut spare) = spare {
            if let Ok(Ok(())) = timeout(SUPERVISOR_START, spare.assign(job_dir)).await {
                return Ok((spare.supervisor, true, spare.attached));
            }
            self.let_go(spare).await;
        }
        let child = self.executable.supervise(job_dir);
        let child =
            child.map_err(|error| Error::internal(format!("cannot start the job's supervisor: {error}")));
        Ok((child?, false, None))
    }

    fn refuse_stopped(&self, id: &str) -> Result<()> {
        match self.table.get(id) {
            Some(entry) if !entry.status.stop_requested => Ok(()),
            _ => Err(Error::conflict("the job was stopped before it was started")),
        }
    }

    /// Mounts the layers, makes the volumes, gives out ports.
    fn launch(
        &self,
        job: &Job,
        manifests: &[ImageManifest],
        layers: &[Digest],
        certificates: Option<Bind>,
    ) -> Result<Launch> {
        let free_port = || {
            let socket = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| socket.local_addr());
            socket
                .map(|address| address.port())
                .map_err(|error| Error::internal(format!("no free port: {error}")))
        };
        let ports = prepare::ports(&job.config, free_port)?;
        if job.config.host_network {
            for (port, number) in job.config.ports.iter().zip(&ports) {
                check_port(*number, &port.proto)?;
            }
        }
        let mut launch = prepare::launch(job, &self.as_host(), manifests, &ports, Vec::new())?;
        let mut binds = Vec::new();
        for volume in &job.config.volumes {
            let wanted = Wanted {
                id: volume.volume_id.clone(),
                limit: volume.limit,
                meta: super::volumes::labels(job),
                owner: (launch.uid, launch.gid),
            };
            let source = tokio::task::block_in_place(|| self.volumes.ensure(&wanted))?;
            binds.push(Bind {
                source,
                target: volume.path.clone().into(),
                writable: true,
                ids_of_container: true,
            });
        }
        binds.extend(certificates);
        launch.binds.splice(0..0, binds);
        self.mounts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .acquire(&self.paths, &job.id, layers)
            .map_err(|error| layers::unmountable(&error))?;
        if launch.user_namespace.is_none() {
            launch.user_namespace = Some(self.ids.give(&launch)?);
        }
        launch.check_ids()?;
        if self.apparmor && prepare::is_ordinary(job, &launch) {
            apparmor::keep().map_err(|error| {
                Error::unavailable(format!(
                    "the AppArmor profile for jobs was removed, and cannot be loaded again: {error}"
                ))
            })?;
            launch.apparmor = true;
        }
        Ok(launch)
    }

    /// The certificates of a system app's job, on a host of a cluster: the first job of an app that comes here has
    /// them signed.
    async fn certificates(&self, job: &Job) -> Result<Option<Bind>> {
        let app = job
            .metadata
            .get(flynn_api::host::label::APP_NAME)
            .filter(|_| prepare::is_system(job));
        // It becomes part of a path.
        let Some(app) = app.filter(|app| is_volume_id(app)) else {
            return Ok(None);
        };
        // Two jobs that ask at once would write the halves of two pairs.
        let _signing = self.signing.lock().await;
        let source = match self.discovery() {
            Some(discoverd) => identities::ensure_app(self.paths.state(), app, &discoverd).await?,
            None => return Ok(None),
        };
        Ok(Some(Bind {
            source,
            target: "/etc/flynn/tls".into(),
            writable: false,
            ids_of_container: false,
        }))
    }

    /// The network, for a job that needs it.
    pub(super) fn network_for_jobs(&self) -> Result<Arc<super::network::Up>> {
        match self.lost_lease() {
            None => self.network.get(),
            Some(why) => Err(Error::conflict(why)),
        }
    }

    /// Has the job be in a namespace that has an address; the address is given back when that fails.
    async fn occupy(&self, network: &super::network::Up, job: &Job, address: Ipv4Addr) -> Result<Ipv4Addr> {
        let occupied = match self.attached(job).await {
            Ok(attached) => self.network.occupy(network, address, attached).await,
            Err(error) => Err(error),
        };
        if let Err(error) = occupied {
            self.network.detach(network, address).await;
            return Err(error);
        }
        Ok(address)
    }

    pub(super) async fn attach(
        &self,
        network: &super::network::Up,
        job: &Job,
        namespace: &File,
    ) -> Result<Ipv4Addr> {
        let attached = self.attached(job).await?;
        self.network.attach(network, namespace, attached).await
    }
}

/// The network namespace of a process that is ours, or was seen to live since.
pub(super) fn network_namespace(pid: i32) -> Result<File> {
    File::open(format!("/proc/{pid}/ns/net"))
        .map_err(|error| Error::internal(format!("cannot open the job's network namespace: {error}")))
}

/// What is said to whoever puts a job that is here: the same as the first time.
fn already(there: &Entry, job: &Job) -> Result<()> {
    if *there.job == *job {
        return match &there.status.error {
            Some(why) if there.status.state == JobState::Failed && there.status.started_at.is_none() => {
                Err(Error::conflict(format!("the job could not be started: {why}")))
            }
            _ => Ok(()),
        };
    }
    Err(Error::new(
        ErrorCode::ObjectExists,
        format!(
            "there is another job {}; a job never changes: choose a new id",
            job.id
        ),
    ))
}

/// Sees to it that nothing is left of a supervisor when it ends: a zombie would look like a process.
fn reap(mut child: Child) {
    tokio::spawn(async move { child.wait().await });
}

/// Connects to a supervisor that was just started. It closes its standard output once its socket is there; before it says
/// there what is in the way, if anything is.
async fn connect(launch: &Launch, child: &mut Child) -> Result<Connection> {
    let begun = async {
        if let Some(output) = child.stdout.take() {
            let mut said = Vec::new();
            let _ = output.take(COMPLAINT).read_to_end(&mut said).await;
            if !said.is_empty() {
                let why = String::from_utf8_lossy(&said);
                return Err(Error::internal(format!(
                    "the job's supervisor cannot begin: {why}"
                )));
            }
        }
        match Connection::open(&launch.socket).await {
            Ok(connection) => Ok(connection),
            Err(error) => {
                let status = child
                    .wait()
                    .await
                    .map_or(error.to_string(), |status| status.to_string());
                Err(Error::internal(format!(
                    "the job's supervisor ended at once ({status}); supervisor.log in the job's directory says why"
                )))
            }
        }
    };
    if let Ok(result) = timeout(SUPERVISOR_START, begun).await {
        return result;
    }
    let _ = child.start_kill();
    Err(Error::new(
        ErrorCode::Timeout,
        "the job's supervisor did not begin in time",
    ))
}

/// Whether jobs may use the devices that this one has mounted: the program that limits them refuses all others without a
/// word.
fn check_devices(job: &Job) -> Result<()> {
    for mount in &job.config.mounts {
        // What is not there is complained of when it is to be mounted.
        let Ok(file) = std::fs::metadata(&mount.target) else {
            continue;
        };
        let is_device = file.file_type().is_char_device() || file.file_type().is_block_device();
        if is_device && !crate::cgroup::allows_device(&file) {
            return Err(Error::invalid_field(
                "config.mounts",
                format!(
                    "{} is a device that jobs cannot use: of the host's they have null, zero, full, random, urandom, \
                     tty and terminals",
                    mount.target
                ),
            ));
        }
    }
    Ok(())
}

/// Whether a port of the host is free.
fn check_port(port: u16, proto: &str) -> Result<()> {
    let address = (Ipv4Addr::UNSPECIFIED, port);
    let taken = match proto {
        "udp" => UdpSocket::bind(address).err(),
        _ => TcpListener::bind(address).err(),
    };
    match taken {
        None => Ok(()),
        Some(error) => Err(Error::conflict(format!(
            "port {port}/{proto} of this host cannot be had ({error}): find who listens on it with \
             ss -lnp '( sport = :{port} )' and stop it, or give the job another port"
        ))),
    }
}
