//! Taking over what an earlier daemon, or an earlier boot, has left.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use flynn_api::host::{Job, JobState};
use flynn_api::image::ImageManifest;
use flynn_api::{Digest, Error, Result};
use jiff::Timestamp;
use tokio::time::sleep;

use super::Daemon;
use super::gate::Pass;
use super::keep::{call, is_to_be_kept};
use super::start::network_namespace;
use super::store::Stored;
use super::table::Entry;
use crate::container::Place;
use crate::control::{Connection, Request};
use crate::launch::Launch;
use crate::paths::Paths;
use crate::status::{Status, boot_id};
use crate::supervisor::Backoff;

impl Daemon {
    /// Takes over what an earlier daemon, or an earlier boot, has left.
    pub(super) fn adopt(self: &Arc<Self>, stored: Vec<Stored>) {
        let boot = boot_id();
        let lives = |stored: Stored| {
            let supervisor = stored.status.supervisor;
            let alive =
                stored.status.boot_id == boot && supervisor.is_some_and(crate::status::ProcessId::is_alive);
            (stored, alive)
        };
        let stored: Vec<_> = stored.into_iter().map(lives).collect();
        // Before anything is started that could be given what these have.
        for launch in stored
            .iter()
            .filter_map(|(stored, alive)| stored.launch.as_ref().filter(|_| *alive))
        {
            self.ids.adopt(launch);
        }
        let mut over = Vec::new();
        for (
            Stored {
                job,
                mut status,
                launch,
            },
            alive,
        ) in stored
        {
            let id = job.id.clone();
            if !alive && status.boot_id == boot {
                // It may have ended since its status was read, and have said how.
                status = Status::read(&self.paths.job(&id))
                    .ok()
                    .flatten()
                    .unwrap_or(status);
            }
            let resurrect = is_to_be_kept(&job, &status);
            if !alive {
                // Bringing the network up has taken it back; by now it may be another's.
                status.address = None;
                if status.state.is_terminal() && !resurrect {
                    // What goes last when a job is cleaned up after is there: nobody has, or not to the end.
                    let is_left = launch.is_some();
                    self.take_in(job, status, None, is_left);
                    if is_left {
                        over.push(id);
                    }
                    continue;
                }
            }
            let layers: Vec<Digest> = launch
                .iter()
                .flat_map(|launch| &launch.layers)
                .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
                .collect();
            // What is to be started again stays as well, before anybody collects.
            let named = job
                .artifacts
                .iter()
                .filter_map(|artifact| artifact.manifest.as_ref());
            let named = named.flat_map(ImageManifest::layers).map(|layer| layer.id);
            self.mounts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .hold(&id, layers.iter().copied().chain(named));
            self.take_in(job, status.clone(), launch.as_ref(), true);
            if alive {
                let held = self
                    .mounts
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .acquire(&self.paths, &id, &layers);
                if let Err(error) = held {
                    tracing::warn!(job = id, %error, "an adopted job's layers");
                }
                let pass = self.gate.beside(&format!("the start of job {id}"));
                tokio::spawn(Arc::clone(self).resume(id, pass));
            } else if resurrect {
                self.start_again(id);
            } else {
                let why = match status.boot_id.as_str() {
                    "" => "host restarted, and what was known of the job was lost",
                    id if id == boot => "its supervisor was killed while the daemon was down",
                    _ => "host restarted",
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
                over.push(id);
            }
        }
        // Once it is known who else uses what they have used.
        for id in over {
            self.clean_up_later(id);
        }
    }

    fn clean_up_later(self: &Arc<Self>, id: String) {
        let daemon = Arc::clone(self);
        let pass = self.gate.beside(&format!("the end of job {id}"));
        tokio::spawn(async move {
            daemon.clean_up(&id, None).await;
            drop(pass);
        });
    }

    fn take_in(&self, job: Job, status: Status, launch: Option<&Launch>, attended: bool) {
        let entry = Entry {
            job: Arc::new(job),
            status,
            ports: launch.map(|launch| launch.ports.clone()).unwrap_or_default(),
            user_namespace: launch.and_then(|launch| launch.user_namespace.clone()),
            attended,
        };
        // Ids are names of directories, and so taken once.
        let _ = self.table.insert(entry, None);
    }

    fn start_again(self: &Arc<Self>, id: String) {
        let daemon = Arc::clone(self);
        let pass = self.gate.beside(&format!("the start of job {id}"));
        tokio::spawn(async move {
            daemon.clean_up_container(&id, None).await;
            daemon
                .restart(&id, Backoff::default(), Duration::ZERO, pass)
                .await;
        });
    }

    /// Follows a supervisor that was there before this daemon. One that still waits for its network gets it.
    async fn resume(self: Arc<Self>, id: String, pass: Pass) {
        let mut pass = Some(pass);
        let mut backoff = Backoff::default();
        let connection = loop {
            let mut connection = Connection::open(&Paths::socket(&id)).await.ok();
            let (Some(own), Some(entry)) = (&mut connection, self.table.get(&id)) else {
                break connection;
            };
            let Err(error) = self.plumb(own, &entry).await else {
                break connection;
            };
            tracing::warn!(job = id, %error, "cannot give an adopted job its network");
            let has_place = entry.job.config.host_network || entry.status.address.is_some();
            let supervisor = entry.status.supervisor;
            if has_place || !supervisor.is_some_and(crate::status::ProcessId::is_alive) {
                break connection;
            }
            // The network may come up yet, and the supervisor waits for it.
            drop(pass.take());
            sleep(backoff.after(Duration::ZERO)).await;
            pass = self.gate.enter(&format!("the start of job {id}")).await;
            if pass.is_none() {
                return;
            }
        };
        drop(pass);
        self.follow(id, connection, Backoff::default()).await;
    }

    async fn plumb(&self, connection: &mut Connection, entry: &Entry) -> Result<()> {
        let (status, config) = (&entry.status, &entry.job.config);
        let mut place = Place {
            address: status.address,
            gateway: self.network.gateway(),
        };
        if !config.host_network && status.address.is_none() {
            let network = self.network_for_jobs()?;
            let supervisor = status.supervisor;
            let namespace = network_namespace(supervisor.map_or(0, |supervisor| supervisor.pid))?;
            // Looked at last: what was opened is its namespace, and not that of a later process.
            if !supervisor.is_some_and(crate::status::ProcessId::is_alive) {
                return Err(Error::conflict("its supervisor is gone"));
            }
            let address = self.attach(&network, &entry.job, &namespace).await?;
            place.address = Some(address);
            let told = call(connection, &Request::Go(place)).await;
            if told.is_err() {
                // The next attempt gives it another one.
                self.network.detach(&network, address).await;
            }
            return told;
        }
        call(connection, &Request::Go(place)).await
    }
}
