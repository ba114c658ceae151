//! One database server as an actor: it is told roles and tells how that went, and when the server ends by itself.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use flynn_api::server::disk;
use flynn_api::sirenia::DatabaseStatus;
use flynn_sirenia::{Event, Role};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::admin::Admin;
use crate::server::{self, Server};
use crate::user::User;
use crate::volume::Volume;
use crate::{Error, Options};

/// What others may ask about the database.
#[derive(Clone)]
pub(crate) struct Handle {
    admin: Admin,
    /// Where its data is.
    data: PathBuf,
    /// Why it does not run, or `None` while it does.
    down: Arc<Mutex<Option<String>>>,
}

impl Handle {
    /// How it does.
    pub(crate) async fn status(&self) -> DatabaseStatus {
        let down = self.down.lock().map_or(None, |down| down.clone());
        let mut status = match down {
            Some(error) => DatabaseStatus {
                error: Some(error),
                ..DatabaseStatus::default()
            },
            None => self.admin.status().await.unwrap_or_else(|error| DatabaseStatus {
                running: true,
                error: Some(error),
                ..DatabaseStatus::default()
            }),
        };
        // Without room for its log the server ends itself, and says so to its own log only.
        if let Some(error) = &mut status.error
            && let Ok(Some(free)) = disk::nearly_full(&self.data)
        {
            let _ = write!(
                error,
                "; the disk of its volume is full ({free} MiB left): make room on that host, and it comes back by itself"
            );
        }
        status
    }

    fn set_down(&self, why: Option<String>) {
        if let Ok(mut down) = self.down.lock() {
            *down = why;
        }
    }
}

/// The actor.
pub(crate) struct Database {
    volume: Volume,
    user: User,
    options: Arc<Options>,
    handle: Handle,
    server: Option<Server>,
}

impl Database {
    /// A database that is down.
    pub(crate) fn new(volume: Volume, user: User, options: Arc<Options>) -> Self {
        let admin = Admin {
            sockets: volume.sockets(),
            port: options.port,
        };
        let data = options.data.clone();
        let down = Arc::new(Mutex::new(Some("it has not been started yet".to_owned())));
        Self {
            volume,
            user,
            options,
            handle: Handle { admin, data, down },
            server: None,
        }
    }

    /// For questions.
    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Works until `stop`, then brings the server down.
    pub(crate) async fn run(
        mut self,
        mut roles: mpsc::Receiver<Role>,
        events: mpsc::Sender<Event>,
        stop: CancellationToken,
    ) {
        loop {
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(role) = roles.recv() => {
                    let result = tokio::select! {
                        result = self.reconfigure(role) => result,
                        () = stop.cancelled() => Err(Error::Stopped),
                    };
                    if let Err(error) = &result {
                        tracing::error!(%error, ?role, "the database cannot be brought into its role");
                        self.stop(error.to_string()).await;
                    }
                    Event::Reconfigured(result.is_ok())
                }
                ended = ended(&mut self.server) => {
                    let why = match ended {
                        Ok(status) => format!("the server ended by itself: {status}"),
                        Err(error) => error.to_string(),
                    };
                    tracing::error!("{why}");
                    self.server = None;
                    self.handle.set_down(Some(why));
                    Event::DatabaseDown
                }
            };
            // Nobody listens any more only when all is ending.
            let _ = events.send(event).await;
        }
        self.stop("it is stopping".into()).await;
    }

    async fn reconfigure(&mut self, role: Role) -> Result<(), Error> {
        if role != Role::Primary {
            self.stop(format!("this peer is not primary but {role:?}").to_lowercase())
                .await;
            return Ok(());
        }
        if self.server.is_some() {
            return Ok(());
        }
        let programs = &self.options.programs;
        if !self.volume.has_database() {
            tracing::info!("making the database");
            server::create(&self.volume, programs, &self.user).await?;
        }
        self.server = Some(Server::start(
            &self.volume,
            programs,
            self.options.server(),
            &self.user,
        )?);
        self.until_ready().await?;
        self.handle.admin.set_up(&self.options.password).await?;
        self.handle.set_down(None);
        tracing::info!("the database takes writes");
        Ok(())
    }

    /// Waits until the server takes connections, however long its recovery takes.
    async fn until_ready(&mut self) -> Result<(), Error> {
        let begun = tokio::time::Instant::now();
        let mut reported = 0;
        loop {
            tokio::select! {
                ended = ended(&mut self.server) => {
                    self.server = None;
                    let why = format!("{} before it took connections; its log says why", ended?);
                    return Err(Error::Program { program: "postgres", why });
                }
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            if self.handle.admin.connect("postgres").await.is_ok() {
                return Ok(());
            }
            let waited = begun.elapsed().as_secs() / 10;
            if waited > reported {
                reported = waited;
                tracing::info!(
                    seconds = begun.elapsed().as_secs(),
                    "waiting for the server to take connections"
                );
            }
        }
    }

    async fn stop(&mut self, why: String) {
        self.handle.set_down(Some(why));
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
    }
}

/// The end of the server; never, when there is none.
async fn ended(server: &mut Option<Server>) -> Result<std::process::ExitStatus, Error> {
    match server {
        Some(server) => server.ended().await,
        None => std::future::pending().await,
    }
}
