//! Starting jobs, following their supervisors, and noting their end.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use flynn_api::host::{Job, JobEventKind, JobState};
use flynn_api::image::ImageManifest;
use flynn_api::{Digest, Error, ErrorCode, Result};
use jiff::Timestamp;
use tokio::time::{Instant, sleep, timeout};

use super::store::{self, Stored};
use super::table::Entry;
use super::{Daemon, disk_error};
use crate::cgroup::Group;
use crate::container::Place;
use crate::control::{Connection, Request};
use crate::launch::{self, Bind, Launch};
use crate::paths::Paths;
use crate::prepare;
use crate::status::{Status, boot_id};
use crate::supervisor::Backoff;
use crate::{disk, files, identities, volumes};

/// How long a supervisor may take to open its socket.
const SUPERVISOR_START: Duration = Duration::from_secs(10);

/// How long a supervisor may take to answer.
const SUPERVISOR_ANSWER: Duration = Duration::from_secs(10);

/// How long the killed may take to die.
const KILL: Duration = Duration::from_secs(10);

/// Jobs that are over and still shown.
const ENDED_JOBS: usize = 256;

impl Daemon {
    /// Takes a job and starts it; comes back when its supervisor has it.
    pub(super) async fn add(self: &Arc<Self>, job: Job) -> Result<()> {
        prepare::check(&job, &self.host_id)?;
        if let Some(there) = self.table.get(&job.id) {
            return already(&there, &job);
        }
        disk::check(self.paths.state())?;
        let status = Status::new(Timestamp::now(), boot_id());
        let id = job.id.clone();
        let job = Arc::new(job);
        let entry = Entry {
            job: Arc::clone(&job),
            status: status.clone(),
            ports: Vec::new(),
            attended: true,
        };
        if let Err(there) = self.table.insert(entry, Some(JobEventKind::Create)) {
            return already(&there, &job);
        }
        if let Err(error) = store::create(&self.paths, &job, &status) {
            self.table.remove(&id);
            return Err(disk_error("keep the job", &error));
        }
        // A task of its own: it goes on when the caller hangs up.
        let daemon = Arc::clone(self);
        let start = tokio::spawn(async move { daemon.start(&id).await });
        start
            .await
            .unwrap_or_else(|_| Err(Error::internal("the start of the job was cut off")))
    }

    /// Prepares a job that is in the table and starts its supervisor.
    async fn start(self: &Arc<Self>, id: &str) -> Result<()> {
        match self.attempt(id).await {
            Ok(connection) => {
                tokio::spawn(Arc::clone(self).follow(id.to_owned(), Some(connection), Backoff::default()));
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
    async fn restart(self: &Arc<Self>, id: &str, mut backoff: Backoff, mut pause: Duration) {
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
        loop {
            if self.stopped_within(id, pause).await {
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
        // The semaphore is never closed.
        let _permit = self.starts.acquire().await;
        self.try_start(id).await
    }

    /// Whether somebody asks for a job's stop before this time is over.
    async fn stopped_within(&self, id: &str, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            if self.refuse_stopped(id).is_err() {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            sleep(left.min(Duration::from_millis(100))).await;
        }
    }

    /// Ends a job that has no supervisor.
    async fn give_up(&self, id: &str, why: &str) {
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
            Some(self.network.get()?)
        };
        let manifests = self.images(job).await?;
        let layers = prepare::layers(&manifests)?;
        let launch = self.launch(job, &manifests, &layers)?;
        let job_dir = self.paths.job(id);
        files::write_json(&job_dir.join(launch::FILE), &launch)
            .map_err(|error| disk_error("keep the job", &error))?;
        self.table.note(id, |entry| entry.ports.clone_from(&launch.ports));
        self.refuse_stopped(id)?;

        let mut child = self
            .executable
            .supervise(&job_dir)
            .map_err(|error| Error::internal(format!("cannot start the job's supervisor: {error}")))?;
        let pid = child.id().map_or(0, u32::cast_signed);
        let connected = connect(&launch, &mut child).await;
        // Whoever is left when it ends: a zombie would look like a process.
        tokio::spawn(async move { child.wait().await });
        let mut connection = connected?;
        let address = match &network {
            Some(network) => Some(self.attach(network, pid).await?),
            None => None,
        };
        let place = Place {
            address,
            gateway: self.network.gateway(),
        };
        let result = call(&mut connection, &Request::Go(place))
            .await
            .and(self.refuse_stopped(id));
        if let Err(error) = result {
            let _ = call(&mut connection, &Request::Stop).await;
            if let (Some(network), Some(address)) = (&network, address) {
                network.detach(address).await;
            }
            return Err(error);
        }
        Ok(connection)
    }

    fn refuse_stopped(&self, id: &str) -> Result<()> {
        match self.table.get(id) {
            Some(entry) if !entry.status.stop_requested => Ok(()),
            _ => Err(Error::conflict("the job was stopped before it was started")),
        }
    }

    async fn images(&self, job: &Job) -> Result<Vec<ImageManifest>> {
        let mut manifests = Vec::new();
        for artifact in &job.artifacts {
            let manifest = self.manifest(artifact).await?;
            for layer in manifest.layers() {
                self.layer(layer, artifact.layer_url_template.as_deref()).await?;
            }
            manifests.push(manifest);
        }
        Ok(manifests)
    }

    /// Mounts the layers, makes the volumes, gives out ports.
    fn launch(&self, job: &Job, manifests: &[ImageManifest], layers: &[Digest]) -> Result<Launch> {
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
            let source = volumes::ensure(&self.paths, &volume.volume_id, launch.uid, launch.gid)
                .map_err(|error| disk_error("make the volume", &error))?;
            binds.push(Bind {
                source,
                target: volume.path.clone().into(),
                writable: true,
            });
        }
        binds.extend(self.certificates(job));
        launch.binds.splice(0..0, binds);
        self.mounts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .acquire(&self.paths, &job.id, layers)
            .map_err(|error| Error::internal(error.to_string()))?;
        Ok(launch)
    }

    /// The certificates of a system app's job, when the cluster has any yet.
    fn certificates(&self, job: &Job) -> Option<Bind> {
        let app = job
            .metadata
            .get(flynn_api::host::label::APP_NAME)
            .filter(|_| prepare::is_system(job))?;
        // It becomes part of a path.
        if !prepare::is_volume_id(app) {
            return None;
        }
        let source = identities::app_dir(self.paths.state(), app);
        let target = "/etc/flynn/tls".into();
        source.is_dir().then_some(Bind {
            source,
            target,
            writable: false,
        })
    }

    async fn attach(&self, network: &super::network::Up, pid: i32) -> Result<Ipv4Addr> {
        let address = network.allocate()?;
        match network.attach(pid, address).await {
            Ok(()) => Ok(address),
            Err(error) => {
                network.detach(address).await;
                Err(error)
            }
        }
    }

    /// Follows a supervisor to its end, and the job to the next start if there is to be one. Boxed, since a start
    /// follows and what is followed may start.
    fn follow(
        self: Arc<Self>,
        id: String,
        connection: Option<Connection>,
        backoff: Backoff,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.follow_to_end(id, connection, backoff))
    }

    async fn follow_to_end(
        self: Arc<Self>,
        id: String,
        connection: Option<Connection>,
        mut backoff: Backoff,
    ) {
        let began = Instant::now();
        let mut connection = connection;
        loop {
            if let Some(connection) = connection.take() {
                self.watch(&id, connection).await;
            }
            let Some(entry) = self.table.get(&id) else { return };
            let stored = || Status::read(&self.paths.job(&id)).ok().flatten()?.supervisor;
            let supervisor = entry.status.supervisor.or_else(stored);
            if !supervisor.is_some_and(crate::status::ProcessId::is_alive) {
                break;
            }
            // It lives, and its socket does not answer: on its way out, or stopped by someone.
            sleep(Duration::from_millis(50)).await;
            if !entry.status.state.is_terminal() {
                connection = Connection::open(&Paths::socket(&id)).await.ok();
            }
        }
        // What was left of the container goes before anybody hears that the job is over.
        self.kill_container(&id).await;
        let resurrect = self.end_of(&id);
        let address = self.table.get(&id).and_then(|entry| entry.status.address);
        if resurrect {
            let pause = backoff.after(began.elapsed());
            tracing::warn!(job = id, ?pause, "the supervisor is gone; starting the job again");
            self.clean_up_container(&id, address).await;
            self.restart(&id, backoff, pause).await;
        } else {
            self.clean_up(&id, address).await;
        }
    }

    async fn watch(&self, id: &str, mut connection: Connection) {
        if connection.watch().await.is_err() {
            return;
        }
        while let Ok(Some(status)) = connection.next_status().await {
            self.table.update(id, status);
        }
    }

    /// Notes the end of a job whose supervisor is gone, by what that has written last. Whether it is to be started
    /// again.
    fn end_of(&self, id: &str) -> bool {
        let Some(entry) = self.table.get(id) else {
            return false;
        };
        let mut stored = Status::read(&self.paths.job(id))
            .ok()
            .flatten()
            .unwrap_or(entry.status.clone());
        stored.stop_requested |= entry.status.stop_requested;
        if is_to_be_kept(&entry.job, &stored) {
            self.table.note(id, |entry| entry.status = stored);
            return true;
        }
        if stored.state.is_terminal() {
            self.table.update(id, stored);
            return false;
        }
        self.table.note(id, |entry| entry.status = stored);
        self.change(id, |status| {
            let state = if status.stop_requested {
                JobState::Done
            } else {
                JobState::Crashed
            };
            status.end(state, Timestamp::now());
            status.error = Some("its supervisor was killed, and the container with it".into());
        });
        false
    }

    /// Changes a status that no supervisor owns: on the disk, then in the table.
    fn change(&self, id: &str, change: impl FnOnce(&mut Status)) {
        let Some(entry) = self.table.get(id) else { return };
        let mut status = entry.status;
        change(&mut status);
        if let Err(error) = status.write(&self.paths.job(id)) {
            tracing::error!(job = id, %error, "cannot write the job's status");
        }
        self.table.update(id, status);
    }

    /// Kills what is in a job's groups, and waits until it is dead.
    async fn kill_container(&self, id: &str) {
        let Some(entry) = self.table.get(id) else { return };
        let group = Group::of(&self.hierarchies, entry.job.partition, id);
        let killed = async {
            while !group.pids().is_empty() {
                if let Err(error) = group.kill() {
                    tracing::warn!(job = id, %error, "cannot kill what is left of it");
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        if timeout(KILL, killed).await.is_err() {
            tracing::error!(job = id, "what is left of it does not die");
        }
    }

    /// Removes what a container leaves when its supervisor could not.
    async fn clean_up_container(&self, id: &str, address: Option<Ipv4Addr>) {
        let Some(entry) = self.table.get(id) else { return };
        self.kill_container(id).await;
        let group = Group::of(&self.hierarchies, entry.job.partition, id);
        let removed = tokio::task::spawn_blocking(move || group.remove(Duration::from_secs(2))).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(job = id, %error, "cannot remove its cgroups");
        }
        let _ = files::remove_all(&Paths::socket(id));
        if let (Some(network), Some(address)) = (self.network.peek(), address) {
            network.detach(address).await;
        }
    }

    /// After a job's end: all but its record and its log goes.
    async fn clean_up(&self, id: &str, address: Option<Ipv4Addr>) {
        self.clean_up_container(id, address).await;
        self.mounts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .release(id);
        store::tidy(&self.paths, id);
        let Some(entry) = self.table.get(id) else { return };
        for volume in entry
            .job
            .config
            .volumes
            .iter()
            .filter(|volume| volume.delete_on_stop)
        {
            if let Err(error) = volumes::remove(&self.paths, &volume.volume_id) {
                tracing::warn!(job = id, volume = volume.volume_id, %error, "cannot remove its volume");
            }
        }
        self.table.note(id, |entry| entry.attended = false);
        self.forget_oldest();
    }

    /// Bounds the number of jobs that are over.
    fn forget_oldest(&self) {
        let mut ended: Vec<Entry> = self.table.all();
        ended.retain(|entry| entry.status.state.is_terminal() && !entry.attended);
        ended.sort_by_key(|entry| entry.status.ended_at);
        let surplus = ended.len().saturating_sub(ENDED_JOBS);
        for entry in &ended[..surplus] {
            match files::remove_all(&self.paths.job(&entry.job.id)) {
                Ok(()) => self.table.remove(&entry.job.id),
                Err(error) => tracing::warn!(job = entry.job.id, %error, "cannot forget"),
            }
        }
    }

    /// Takes over what an earlier daemon, or an earlier boot, has left.
    pub(super) fn adopt(self: &Arc<Self>, stored: Vec<Stored>) {
        let boot = boot_id();
        for Stored {
            job,
            mut status,
            launch,
        } in stored
        {
            let id = job.id.clone();
            let alive =
                status.boot_id == boot && status.supervisor.is_some_and(crate::status::ProcessId::is_alive);
            let resurrect = is_to_be_kept(&job, &status);
            if !alive {
                // Bringing the network up has taken it back; by now it may be another's.
                status.address = None;
                if status.state.is_terminal() && !resurrect {
                    self.take_in(job, status, Vec::new(), false);
                    continue;
                }
            }
            let ports = launch
                .as_ref()
                .map(|launch| launch.ports.clone())
                .unwrap_or_default();
            let layers: Vec<Digest> = launch
                .iter()
                .flat_map(|launch| &launch.layers)
                .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
                .collect();
            self.take_in(job, status.clone(), ports, true);
            if alive {
                let held = self
                    .mounts
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .acquire(&self.paths, &id, &layers);
                if let Err(error) = held {
                    tracing::warn!(job = id, %error, "an adopted job's layers");
                }
                tokio::spawn(Arc::clone(self).resume(id));
            } else if resurrect {
                self.start_again(id);
            } else {
                let why = if status.boot_id == boot {
                    "its supervisor was killed while the daemon was down"
                } else {
                    "host restarted"
                };
                self.change(&id, |status| {
                    let state = if status.stop_requested {
                        JobState::Done
                    } else {
                        JobState::Crashed
                    };
                    status.end(state, Timestamp::now());
                    status.error = Some(why.into());
                });
                let daemon = Arc::clone(self);
                tokio::spawn(async move { daemon.clean_up(&id, None).await });
            }
        }
    }

    fn take_in(&self, job: Job, status: Status, ports: Vec<u16>, attended: bool) {
        let entry = Entry {
            job: Arc::new(job),
            status,
            ports,
            attended,
        };
        // Ids are names of directories, and so taken once.
        let _ = self.table.insert(entry, None);
    }

    fn start_again(self: &Arc<Self>, id: String) {
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            daemon.clean_up_container(&id, None).await;
            daemon.restart(&id, Backoff::default(), Duration::ZERO).await;
        });
    }

    /// Follows a supervisor that was there before this daemon. One that still waits for its network gets it.
    async fn resume(self: Arc<Self>, id: String) {
        let mut connection = Connection::open(&Paths::socket(&id)).await.ok();
        if let (Some(connection), Some(entry)) = (&mut connection, self.table.get(&id))
            && let Err(error) = self.plumb(connection, &entry).await
        {
            tracing::warn!(job = id, %error, "cannot give an adopted job its network");
        }
        self.follow(id, connection, Backoff::default()).await;
    }

    async fn plumb(&self, connection: &mut Connection, entry: &Entry) -> Result<()> {
        let (status, config) = (&entry.status, &entry.job.config);
        let mut place = Place {
            address: status.address,
            gateway: self.network.gateway(),
        };
        if !config.host_network && status.address.is_none() {
            let pid = status.supervisor.map_or(0, |supervisor| supervisor.pid);
            let network = self.network.get()?;
            place.address = Some(self.attach(&network, pid).await?);
        }
        call(connection, &Request::Go(place)).await
    }

    /// Stops a job; comes back when it is stopping.
    pub(super) async fn stop(&self, id: &str) -> Result<()> {
        let entry = self.table.get(id).ok_or_else(|| Error::not_found("job", id))?;
        if entry.status.state.is_terminal() {
            return Ok(());
        }
        // For a start that is under way, and for one that would follow.
        self.table.note(id, |entry| entry.status.stop_requested = true);
        match Connection::open(&Paths::socket(id)).await {
            Ok(mut connection) => call(&mut connection, &Request::Stop).await,
            Err(_) => Ok(()),
        }
    }

    /// Says something to a running job's supervisor.
    pub(super) async fn tell(&self, id: &str, request: &Request) -> Result<()> {
        let entry = self.table.get(id).ok_or_else(|| Error::not_found("job", id))?;
        if entry.status.state.is_terminal() {
            return Err(Error::conflict(format!("job {id} is over")));
        }
        let mut connection = Connection::open(&Paths::socket(id)).await.map_err(|error| {
            Error::unavailable(format!("the supervisor of job {id} does not answer: {error}"))
        })?;
        call(&mut connection, request).await
    }

    /// Tells the supervisors of jobs in the host's network of the gateway address.
    pub(super) async fn announce_gateway(&self) {
        for entry in self.table.all() {
            if entry.job.config.host_network && !entry.status.state.is_terminal() {
                let place = Place {
                    address: None,
                    gateway: self.network.gateway(),
                };
                if let Err(error) = self.tell(&entry.job.id, &Request::Go(place)).await {
                    tracing::debug!(job = entry.job.id, %error, "cannot tell of the gateway");
                }
            }
        }
    }
}

/// Whether a job without a supervisor is started again. One that is over although nobody stopped it was ended by its
/// host's end; one that could never be started is its maker's to start anew.
fn is_to_be_kept(job: &Job, status: &Status) -> bool {
    job.resurrect && !status.stop_requested && status.state != JobState::Failed
}

fn already(there: &Entry, job: &Job) -> Result<()> {
    if *there.job == *job {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::ObjectExists,
        format!(
            "there is another job {}; a job never changes: choose a new id",
            job.id
        ),
    ))
}

async fn call(connection: &mut Connection, request: &Request) -> Result<()> {
    match timeout(SUPERVISOR_ANSWER, connection.call(request)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::conflict(format!("the job's supervisor: {error}"))),
        Err(_) => Err(Error::new(
            ErrorCode::Timeout,
            "the job's supervisor does not answer; is it stopped?",
        )),
    }
}

/// Connects to a supervisor that was just started.
async fn connect(launch: &Launch, child: &mut tokio::process::Child) -> Result<Connection> {
    let deadline = Instant::now() + SUPERVISOR_START;
    loop {
        if let Ok(connection) = Connection::open(&launch.socket).await {
            return Ok(connection);
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(Error::internal(format!(
                "the job's supervisor ended at once ({status}); supervisor.log in the job's directory says why"
            )));
        }
        if Instant::now() > deadline {
            let _ = child.start_kill();
            return Err(Error::new(
                ErrorCode::Timeout,
                "the job's supervisor did not begin in time",
            ));
        }
        sleep(Duration::from_millis(2)).await;
    }
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
