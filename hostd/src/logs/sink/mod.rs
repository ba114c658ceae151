//! Sinks: who takes the jobs' logs, and how far each has.
//!
//! Each sink has a thread of its own ([`shipper`]), for it reads files, that sends what the jobs have logged in order. How far a sink has read is kept on the disk and never ahead of it: after
//! a crash, or on a new connection, the last seconds may come again, with the same numbers, and nothing is missing.
//! [`flynn_api::sink`] says what is sent.

mod connection;
mod cursors;
mod form;
mod shipper;
mod status;
mod watch;
mod window;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use flynn_api::sink::{LogAggregatorConfig, Sink, SinkKind, SinkStatus, SyslogConfig};
use flynn_api::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use self::connection::Target;
use self::cursors::Cursors;
use self::form::Form;
use self::shipper::{Locate, Parts};
use self::status::Progress;
use crate::files::{self, disk_error};

/// Sinks that a host has at most.
const MAX_SINKS: usize = 16;

const VERSION: u32 = 1;

/// Finds the leader of a service: `address:port`.
pub type FindLeader = Arc<dyn Fn(String) -> Leader + Send + Sync>;

/// The search for a leader.
pub type Leader = Pin<Box<dyn Future<Output = io::Result<String>> + Send>>;

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    sinks: Vec<Sink>,
}

/// All sinks of a host.
pub struct Sinks {
    file: PathBuf,
    /// Where it is kept how far each has read.
    cursors: PathBuf,
    jobs: PathBuf,
    find_leader: FindLeader,
    /// Those that are wanted. One of them may not run.
    wanted: Mutex<BTreeMap<String, Sink>>,
    running: Mutex<BTreeMap<String, Running>>,
    /// Held while one is added or removed.
    changing: tokio::sync::Mutex<()>,
}

/// A metric's name, kind and help, and its value for a sink.
type Family = (&'static str, &'static str, &'static str, fn(&SinkStatus) -> u64);

struct Running {
    progress: Arc<Progress>,
    stop: CancellationToken,
    thread: JoinHandle<()>,
}

impl Sinks {
    /// Those that are kept in the state directory `state`, which ship the logs of the jobs in `jobs` from now on.
    pub fn open(state: &Path, jobs: &Path, find_leader: FindLeader) -> io::Result<Self> {
        let sinks = Self {
            file: state.join("sinks.json"),
            cursors: state.join("sinks"),
            jobs: jobs.to_owned(),
            find_leader,
            wanted: Mutex::default(),
            running: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        };
        files::private_dir(&sinks.cursors)?;
        let stored: Option<Stored> = files::read_json(&sinks.file)?;
        if let Some(version) = stored.as_ref().map(|stored| stored.version)
            && version != VERSION
        {
            let path = sinks.file.display();
            return Err(io::Error::other(format!(
                "{path} is of version {version}; this host reads {VERSION}"
            )));
        }
        for sink in stored.into_iter().flat_map(|stored| stored.sinks) {
            match sinks.start(&sink) {
                Ok(running) => drop(sinks.running().insert(sink.id.clone(), running)),
                Err(error) => tracing::error!(sink = sink.id, %error, "cannot be used"),
            }
            sinks.wanted().insert(sink.id.clone(), sink);
        }
        sinks.release();
        Ok(sinks)
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeMap<String, Sink>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of what was held for sinks that are gone.
    fn release(&self) {
        let ids: Vec<String> = self.wanted().keys().cloned().collect();
        let there = |sink: &str| ids.iter().any(|id| id == sink);
        for job in std::fs::read_dir(&self.jobs).into_iter().flatten().flatten() {
            if let Err(error) = crate::logs::segment::release(&job.path().join("log"), &there) {
                tracing::debug!(job = %job.path().display(), %error, "cannot let go of its log");
            }
        }
    }

    fn start(&self, sink: &Sink) -> Result<Running> {
        let (locate, form, acknowledges) = self.read(sink)?;
        let (progress, stop) = (Arc::<Progress>::default(), CancellationToken::new());
        let parts = Parts {
            sink: sink.id.clone(),
            locate,
            form,
            acknowledges,
            jobs: self.jobs.clone(),
            cursors: Cursors::of(&self.cursors, &sink.id),
            progress: Arc::clone(&progress),
        };
        let stopped = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::internal(format!("cannot make a runtime: {error}")))?;
        let thread = std::thread::Builder::new()
            .name("flynn-logs".into())
            .spawn(move || runtime.block_on(shipper::run(parts, stopped)))
            .map_err(|error| Error::internal(format!("cannot start a thread: {error}")))?;
        Ok(Running {
            progress,
            stop,
            thread,
        })
    }

    /// Reads a sink's configuration.
    fn read(&self, sink: &Sink) -> Result<(Locate, Form, bool)> {
        match sink.kind {
            SinkKind::Syslog => {
                let config: SyslogConfig = parse(sink)?;
                let target = Target::of(&config)?;
                let locate: Locate = Box::new(move || Box::pin(std::future::ready(Ok(target.clone()))));
                Ok((locate, Form::of(&config)?, false))
            }
            SinkKind::Logaggregator => {
                let config: LogAggregatorConfig = parse(sink)?;
                if config.addr.is_empty() == config.service.is_empty() {
                    return Err(Error::invalid_field(
                        "config",
                        "either addr (host:port) or service (a name in discoverd) is wanted",
                    ));
                }
                let find_leader = Arc::clone(&self.find_leader);
                let locate: Locate = Box::new(move || {
                    let (config, find_leader) = (config.clone(), Arc::clone(&find_leader));
                    Box::pin(async move {
                        let address = if config.service.is_empty() {
                            config.addr
                        } else {
                            find_leader(config.service).await?
                        };
                        Ok(Target { address, tls: None })
                    })
                });
                let plain = SyslogConfig {
                    url: String::new(),
                    prefix: String::new(),
                    use_ids: true,
                    insecure: false,
                    structured_data: true,
                    format: flynn_api::sink::SyslogFormat::Rfc6587,
                    ca: None,
                };
                Ok((locate, Form::of(&plain)?, true))
            }
        }
    }

    /// All sinks, and how they do. Looks at the disk.
    pub fn list(&self) -> Vec<SinkStatus> {
        let sinks = self.wanted().clone();
        let progress_of = |id: &str| {
            self.running()
                .get(id)
                .map(|running| Arc::clone(&running.progress))
        };
        let status = |sink: &Sink| {
            let progress = progress_of(&sink.id).unwrap_or_else(|| {
                let progress = Progress::default();
                progress.disconnected("it could not be begun: add it again".into());
                Arc::new(progress)
            });
            progress.status(sink, &self.jobs)
        };
        sinks.values().map(status).collect()
    }

    /// Adds a sink, or changes the one of that id, which goes on from where it was. Repeated it does nothing. To
    /// be done to its end.
    pub async fn put(&self, sink: Sink) -> Result<()> {
        check_id(&sink.id)?;
        let _changing = self.changing.lock().await;
        drop(self.read(&sink)?);
        let mut sinks = self.wanted().clone();
        match sinks.get(&sink.id) {
            Some(there) if *there == sink && self.running().contains_key(&sink.id) => return Ok(()),
            None if sinks.len() >= MAX_SINKS => {
                return Err(Error::new(
                    flynn_api::ErrorCode::LimitExceeded,
                    format!("a host has at most {MAX_SINKS} sinks: remove one first"),
                ));
            }
            _ => {}
        }
        sinks.insert(sink.id.clone(), sink.clone());
        self.save(sinks)?;
        self.stop(&sink.id).await;
        let running = self.start(&sink)?;
        self.running().insert(sink.id, running);
        Ok(())
    }

    /// Removes a sink. What is held for it is let go. To be done to its end.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let _changing = self.changing.lock().await;
        let mut sinks = self.wanted().clone();
        if sinks.remove(id).is_none() {
            return Err(Error::not_found("sink", id));
        }
        self.save(sinks)?;
        self.stop(id).await;
        self.release();
        Cursors::of(&self.cursors, id)
            .remove()
            .map_err(|error| disk_error("forget how far the sink has read", &error))
    }

    /// Whether a sink has yet to take something that this job has logged.
    pub fn awaited(&self, job: &str) -> bool {
        let progress: Vec<_> = {
            let running = self.running();
            running
                .values()
                .map(|running| Arc::clone(&running.progress))
                .collect()
        };
        progress.iter().any(|progress| progress.awaits(&self.jobs, job))
    }

    /// Stops all, and keeps how far they have read.
    pub async fn shut_down(&self) {
        let _changing = self.changing.lock().await;
        let ids: Vec<String> = self.running().keys().cloned().collect();
        for id in ids {
            self.stop(&id).await;
        }
    }

    fn save(&self, sinks: BTreeMap<String, Sink>) -> Result<()> {
        let stored = Stored {
            version: VERSION,
            sinks: sinks.values().cloned().collect(),
        };
        files::write_json(&self.file, &stored).map_err(|error| disk_error("remember the sinks", &error))?;
        *self.wanted() = sinks;
        Ok(())
    }

    async fn stop(&self, id: &str) {
        let running = self.running().remove(id);
        if let Some(running) = running {
            running.stop.cancel();
            let ended = tokio::task::spawn_blocking(move || running.thread.join()).await;
            if !matches!(ended, Ok(Ok(()))) {
                tracing::error!(sink = id, "its thread has panicked");
            }
        }
    }

    /// For Prometheus.
    pub fn metrics(&self) -> String {
        let sinks = self.list();
        let mut text = String::new();
        let families: [Family; 6] = [
            (
                "connected",
                "gauge",
                "Whether the sink has a connection",
                |sink| u64::from(sink.connected),
            ),
            (
                "connections_total",
                "counter",
                "Connections to the sink",
                |sink| sink.connections,
            ),
            (
                "lines_total",
                "counter",
                "Records sent to the sink, those sent again included",
                |sink| sink.lines,
            ),
            ("bytes_total", "counter", "Bytes sent to the sink", |sink| {
                sink.bytes
            }),
            (
                "dropped_lines_total",
                "counter",
                "Records that were removed before the sink took them",
                |sink| sink.dropped_lines,
            ),
            (
                "waiting_bytes",
                "gauge",
                "Bytes that are yet to be sent to the sink",
                |sink| sink.waiting_bytes,
            ),
        ];
        for (name, kind, help, value) in families {
            let name = format!("flynn_log_sink_{name}");
            let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} {kind}");
            for sink in &sinks {
                let _ = writeln!(text, "{name}{{sink=\"{}\"}} {}", sink.sink.id, value(sink));
            }
        }
        text
    }
}

fn parse<T: DeserializeOwned>(sink: &Sink) -> Result<T> {
    T::deserialize(&sink.config).map_err(|error| Error::invalid_field("config", error.to_string()))
}

/// It is part of files' names, and of metrics.
fn check_id(id: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if (1..=64).contains(&id.len())
        && id.chars().all(fits)
        && !id.starts_with('.')
        && !id.ends_with(files::UNFINISHED)
    {
        return Ok(());
    }
    Err(Error::invalid_field(
        "id",
        "up to 64 letters, digits, dashes, underscores, dots and colons are wanted",
    ))
}
