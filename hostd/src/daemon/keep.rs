//! Following supervisors, speaking to them, and noting the end of their jobs.

use std::io;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use flynn_api::host::{Job, JobState};
use flynn_api::{Error, ErrorCode, Result};
use jiff::Timestamp;
use tokio::time::{Instant, sleep, timeout};

use super::table::Entry;
use super::{Daemon, store};
use crate::cgroup::Group;
use crate::container::Place;
use crate::control::{Connection, Request};
use crate::files::{self, disk_error};
use crate::paths::Paths;
use crate::status::Status;
use crate::supervisor::Backoff;

/// How long a supervisor may take to answer.
const SUPERVISOR_ANSWER: Duration = Duration::from_secs(10);

/// How long the killed may take to die.
const KILL: Duration = Duration::from_secs(10);

/// Between attempts to write a status when the disk is full.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

/// Jobs that are over and still shown.
const ENDED_JOBS: usize = 256;

/// More of them, for what sinks have yet to take of their logs.
const AWAITED_JOBS: usize = 768;

impl Daemon {
    /// Follows a supervisor to its end, and the job to the next start if there is to be one. Boxed, since a start
    /// follows and what is followed may start.
    pub(super) fn follow(
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
                tokio::select! {
                    () = self.watch(&id, connection) => {}
                    // Another daemon watches: a supervisor has room for so many connections.
                    () = self.gate.left() => return,
                }
            }
            let Some(entry) = self.table.get(&id) else { return };
            let stored = || Status::read(&self.paths.job(&id)).ok().flatten()?.supervisor;
            let supervisor = entry.status.supervisor.or_else(stored);
            if !supervisor.is_some_and(crate::status::ProcessId::is_alive) {
                break;
            }
            // It lives, and its socket does not answer: on its way out, or stopped by someone.
            sleep(Duration::from_millis(50)).await;
            if self.gate.is_left() {
                return;
            }
            if !entry.status.state.is_terminal() {
                connection = Connection::open(&Paths::socket(&id)).await.ok();
            }
        }
        let Some(pass) = self.gate.enter(&format!("the end of job {id}")).await else {
            return;
        };
        // What was left of the container goes before anybody hears that the job is over.
        self.kill_container(&id).await;
        let resurrect = self.end_of(&id);
        let address = self.table.get(&id).and_then(|entry| entry.status.address);
        if resurrect {
            let pause = backoff.after(began.elapsed());
            tracing::warn!(job = id, ?pause, "the supervisor is gone; starting the job again");
            self.clean_up_container(&id, address).await;
            self.restart(&id, backoff, pause, pass).await;
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
    fn end_of(self: &Arc<Self>, id: &str) -> bool {
        let Some(entry) = self.table.get(id) else {
            return false;
        };
        let mut stored = Status::read(&self.paths.job(id))
            .ok()
            .flatten()
            .unwrap_or(entry.status.clone());
        stored.stop_requested |= entry.status.stop_requested;
        // The supervisor may have been killed before it wrote where it was.
        stored.address = stored.address.or(entry.status.address);
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
    pub(super) fn change(self: &Arc<Self>, id: &str, change: impl FnOnce(&mut Status)) {
        let Some(entry) = self.table.get(id) else { return };
        let mut status = entry.status;
        change(&mut status);
        let written = status.write(&self.paths.job(id));
        let is_over = status.state.is_terminal();
        self.table.update(id, status);
        if let Err(error) = written {
            tracing::error!(job = id, %error, "cannot write the job's status");
            if is_over {
                tokio::spawn(Arc::clone(self).write_late(id.to_owned()));
            }
        }
    }

    /// Writes the end of a job down as soon as there is room: it must not be taken for one that goes on.
    async fn write_late(self: Arc<Self>, id: String) {
        loop {
            sleep(WRITE_AGAIN).await;
            let Some(_pass) = self.gate.enter(&format!("the status of job {id}")).await else {
                return;
            };
            let Some(entry) = self.table.get(&id) else { return };
            if !entry.status.state.is_terminal() || entry.status.write(&self.paths.job(&id)).is_ok() {
                return;
            }
        }
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
    pub(super) async fn clean_up_container(&self, id: &str, address: Option<Ipv4Addr>) {
        let Some(entry) = self.table.get(id) else { return };
        self.kill_container(id).await;
        let group = Group::of(&self.hierarchies, entry.job.partition, id);
        let removed = tokio::task::spawn_blocking(move || group.remove(Duration::from_secs(2))).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(job = id, %error, "cannot remove its cgroups");
        }
        let _ = files::remove_all(&Paths::socket(id));
        if let (Some(network), Some(address)) = (self.network.peek(), address) {
            self.network.detach(&network, address).await;
        }
    }

    /// After a job's end: all but its record and its log goes.
    pub(super) async fn clean_up(&self, id: &str, address: Option<Ipv4Addr>) {
        self.clean_up_container(id, address).await;
        self.mounts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .release(&self.paths, id);
        let entry = self.table.get(id);
        let volumes = entry.iter().flat_map(|entry| &entry.job.config.volumes);
        for volume in volumes.filter(|volume| volume.delete_on_stop) {
            let others = |volume: &str| {
                let mut jobs = self.users(volume);
                jobs.retain(|job| job != id);
                jobs
            };
            let removed = tokio::task::block_in_place(|| self.volumes.remove(&volume.volume_id, &others));
            if let Err(error) = removed
                && error.code != ErrorCode::NotFound
            {
                tracing::warn!(job = id, volume = volume.volume_id, %error, "cannot remove its volume");
            }
        }
        // Last what says that there was something to do; it can be much.
        tokio::task::block_in_place(|| store::tidy(&self.paths, id));
        self.ids.release(id);
        self.table.note(id, |entry| entry.attended = false);
        self.forget_oldest();
    }

    /// Bounds the number of jobs that are over.
    fn forget_oldest(&self) {
        let mut ended: Vec<Entry> = self.table.all();
        ended.retain(|entry| entry.status.state.is_terminal() && !entry.attended);
        ended.sort_by_key(|entry| entry.status.ended_at);
        let surplus = ended.len().saturating_sub(ENDED_JOBS);
        let sinks = self.sinks().ok();
        for (index, entry) in ended[..surplus].iter().enumerate() {
            // What a sink has yet to take is kept, unless that has become too many.
            let many = surplus - index > AWAITED_JOBS;
            if !many && sinks.is_some_and(|sinks| sinks.awaited(&entry.job.id)) {
                continue;
            }
            match tokio::task::block_in_place(|| files::remove_all(&self.paths.job(&entry.job.id))) {
                Ok(()) => self.table.remove(&entry.job.id),
                Err(error) => tracing::warn!(job = entry.job.id, %error, "cannot forget"),
            }
        }
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
            // Nobody but us knows, who may be killed before the job is given up.
            Err(_) => match Status::request_stop(&self.paths.job(id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(disk_error("write down that the job is to stop", &error))
                }
                _ => Ok(()),
            },
        }
    }

    /// Says something to a running job's supervisor.
    pub(super) async fn tell(&self, id: &str, request: &Request) -> Result<()> {
        let entry = self.table.get(id).ok_or_else(|| Error::not_found("job", id))?;
        if entry.status.state.is_terminal() {
            return Err(Error::conflict(format!("job {id} is over")));
        }
        entry.understands(request)?;
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
pub(super) fn is_to_be_kept(job: &Job, status: &Status) -> bool {
    job.resurrect && !status.stop_requested && status.state != JobState::Failed
}

pub(super) async fn call(connection: &mut Connection, request: &Request) -> Result<()> {
    match timeout(SUPERVISOR_ANSWER, connection.call(request)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::conflict(format!("the job's supervisor: {error}"))),
        Err(_) => Err(Error::new(
            ErrorCode::Timeout,
            "the job's supervisor does not answer; is it stopped?",
        )),
    }
}
