//! A cluster of fakes on loopback: discoverd, a controller, and one host behind mutual TLS.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, put};
use axum::{Router, http::HeaderMap};
use flynn_api::controller::{ExpandedFormation, Job as Report};
use flynn_api::discovery::Instance;
use flynn_api::host::{ActiveJob, HostStatus, Job, JobEvent, JobEventKind, JobState};
use flynn_api::server::{CancellationToken, Json, Listener, events, serve, wants_events};
use flynn_api::tls::{Ca, ClientAuth, PeerIdentity};
use flynn_api::{Error, Result};
use flynn_scheduler::Options;
use futures::StreamExt as _;
use jiff::Timestamp;
use tokio::sync::broadcast;

pub(crate) const HOST: &str = "host1";
pub(crate) const OWN: &str = "127.0.0.1:1";

/// What the fakes know and have been told.
pub(crate) struct Cluster {
    pub(crate) services: Mutex<BTreeMap<String, Vec<Instance>>>,
    pub(crate) formations: Mutex<Vec<ExpandedFormation>>,
    pub(crate) reports: Mutex<Vec<Report>>,
    pub(crate) jobs: Mutex<BTreeMap<String, ActiveJob>>,
    /// Calls to the host that change something, in order.
    pub(crate) calls: Mutex<Vec<String>>,
    pub(crate) controller_away: AtomicBool,
    changes: broadcast::Sender<()>,
    job_events: broadcast::Sender<JobEvent>,
    host: Mutex<CancellationToken>,
    scheduler: CancellationToken,
    dir: tempfile::TempDir,
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn spawn(listener: Listener, router: Router, stop: CancellationToken) -> SocketAddr {
    let addr = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, router, stop.cancelled_owned()));
    addr
}

fn active(job: Job) -> ActiveJob {
    ActiveJob {
        job,
        status: JobState::Starting,
        host_id: HOST.into(),
        internal_ip: None,
        ports: Vec::new(),
        user_namespace: None,
        pid: None,
        supervisor_pid: None,
        paused: false,
        created_at: Timestamp::now(),
        started_at: None,
        ended_at: None,
        exit_status: None,
        error: None,
        restarts: 0,
        oom_killed: false,
        healthy: false,
    }
}

impl Cluster {
    /// Fakes, and a scheduler that follows them. `jobs` run already.
    pub(crate) async fn start(formations: Vec<ExpandedFormation>, jobs: Vec<Job>, leads: bool) -> Arc<Self> {
        flynn_api::tls::install_provider();
        let jobs = jobs.into_iter().map(|job| {
            let running = ActiveJob {
                status: JobState::Running,
                healthy: true,
                ..active(job)
            };
            (running.job.id.clone(), running)
        });
        let cluster = Arc::new(Self {
            services: Mutex::default(),
            formations: Mutex::new(formations),
            reports: Mutex::default(),
            jobs: Mutex::new(jobs.collect()),
            calls: Mutex::default(),
            controller_away: AtomicBool::new(false),
            changes: broadcast::channel(16).0,
            job_events: broadcast::channel(256).0,
            host: Mutex::new(CancellationToken::new()),
            scheduler: CancellationToken::new(),
            dir: tempfile::tempdir().unwrap(),
        });
        let discovery = Listener::tcp(loopback()).await.unwrap();
        let discovery = spawn(
            discovery,
            Arc::clone(&cluster).discovery(),
            CancellationToken::new(),
        );
        let controller = Listener::tcp(loopback()).await.unwrap();
        let controller = spawn(
            controller,
            Arc::clone(&cluster).controller(),
            CancellationToken::new(),
        );

        let ca = Ca::create("test").unwrap();
        let sans = ["127.0.0.1".to_owned()];
        let host = ca.issue(&PeerIdentity::Host(HOST.into()), &sans).unwrap();
        let listener = Listener::tls(loopback(), host.server_config(ClientAuth::Required).unwrap())
            .await
            .unwrap();
        let stop = cluster.host.lock().unwrap().clone();
        let host = spawn(listener, Arc::clone(&cluster).host(), stop);
        ca.issue(&PeerIdentity::Job("scheduler".into()), &sans)
            .unwrap()
            .save(cluster.dir.path())
            .unwrap();

        let leader = if leads { OWN } else { "127.0.0.1:2" };
        *cluster.services.lock().unwrap() = BTreeMap::from([
            (
                "flynn-host".to_owned(),
                vec![Instance::new("https", host.to_string(), BTreeMap::new())],
            ),
            (
                "controller".to_owned(),
                vec![Instance::new("http", controller.to_string(), BTreeMap::new())],
            ),
            (
                "scheduler".to_owned(),
                vec![Instance::new("http", leader, BTreeMap::new())],
            ),
        ]);
        let options = Options {
            address: OWN.into(),
            listen: loopback(),
            discoverd: format!("http://{discovery}"),
            cluster: format!("https://{discovery}"),
            controller_key: "key".into(),
            tls_dir: cluster.dir.path().to_owned(),
        };
        let stop = cluster.scheduler.clone();
        tokio::spawn(async move {
            flynn_scheduler::run(options, stop.cancelled_owned())
                .await
                .unwrap();
        });
        cluster
    }

    /// Tells those who watch discoverd and the controller that something has changed.
    pub(crate) fn changed(&self) {
        let _ = self.changes.send(());
    }

    fn wakeups(&self) -> impl futures::Stream<Item = ()> + Send + use<> {
        let receiver = self.changes.subscribe();
        futures::stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.ok().map(|()| ((), receiver))
        })
    }

    fn discovery(self: Arc<Self>) -> Router {
        let (watch, list, leader) = (Arc::clone(&self), Arc::clone(&self), self);
        let instances = |cluster: &Self, service: &str| {
            cluster
                .services
                .lock()
                .unwrap()
                .get(service)
                .cloned()
                .unwrap_or_default()
        };
        Router::new()
            .route(
                "/services/{service}",
                get(async move |Path(service): Path<String>| -> Response {
                    let event =
                        move |()| (None, serde_json::json!({ "service": service, "kind": "current" }));
                    events(futures::stream::once(async {}).chain(watch.wakeups()).map(event))
                }),
            )
            .route(
                "/services/{service}/instances",
                get(async move |Path(service): Path<String>| Json(instances(&list, &service))),
            )
            .route(
                "/services/{service}/leader",
                get(
                    async move |Path(service): Path<String>| -> Result<Json<Instance>> {
                        let first = instances(&leader, &service).into_iter().next();
                        first
                            .map(Json)
                            .ok_or_else(|| Error::not_found("leader of", service))
                    },
                ),
            )
    }

    fn available(&self) -> Result<()> {
        if self.controller_away.load(Ordering::Relaxed) {
            Err(Error::unavailable("away"))
        } else {
            Ok(())
        }
    }

    fn controller(self: Arc<Self>) -> Router {
        let (formations, report) = (Arc::clone(&self), self);
        Router::new()
            .route(
                "/formations",
                get(async move |headers: HeaderMap| -> Result<Response> {
                    formations.available()?;
                    if wants_events(&headers) {
                        let cluster = Arc::clone(&formations);
                        let there = move |()| {
                            let away = cluster.controller_away.load(Ordering::Relaxed);
                            async move { (!away).then(|| (None, ExpandedFormation::default())) }
                        };
                        return Ok(events(formations.wakeups().scan((), move |(), wake| there(wake))));
                    }
                    Ok(Json(formations.formations.lock().unwrap().clone()).into_response())
                }),
            )
            .route("/active-jobs", get(async || Json(Vec::<Report>::new())))
            .route(
                "/apps/{app}/jobs/{id}",
                put(
                    async move |Path((_, _)): Path<(String, String)>,
                                Json(job): Json<Report>|
                                -> Result<Json<Report>> {
                        report.available()?;
                        report.reports.lock().unwrap().push(job.clone());
                        Ok(Json(job))
                    },
                ),
            )
    }

    fn host(self: Arc<Self>) -> Router {
        let (list, add, stop, deregister) = (
            Arc::clone(&self),
            Arc::clone(&self),
            Arc::clone(&self),
            Arc::clone(&self),
        );
        Router::new()
            .route("/host/status", get(async || Json(host_status())))
            .route(
                "/storage/volumes",
                get(async || Json(Vec::<flynn_api::volume::Volume>::new())),
            )
            .route(
                "/host/jobs",
                get(async move |headers: HeaderMap| -> Response {
                    if wants_events(&headers) {
                        let receiver = list.job_events.subscribe();
                        let stream = futures::stream::unfold(receiver, |mut receiver| async {
                            receiver.recv().await.ok().map(|event| ((None, event), receiver))
                        });
                        return events(stream);
                    }
                    Json(list.jobs.lock().unwrap().clone()).into_response()
                }),
            )
            .route(
                "/host/jobs/{id}",
                put(
                    async move |Path(id): Path<String>, Json(job): Json<Job>| -> Result<()> {
                        add.calls.lock().unwrap().push(format!("start {id}"));
                        add.jobs.lock().unwrap().insert(id.clone(), active(job));
                        let cluster = Arc::clone(&add);
                        tokio::spawn(async move {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                            cluster.update(&id, JobEventKind::Start, |job| {
                                (job.status, job.healthy) = (JobState::Running, true);
                                job.started_at = Some(Timestamp::now());
                            });
                        });
                        Ok(())
                    },
                )
                .delete(async move |Path(id): Path<String>| -> Result<()> {
                    stop.calls.lock().unwrap().push(format!("stop {id}"));
                    stop.update(&id, JobEventKind::Stop, |job| {
                        (job.status, job.exit_status) = (JobState::Done, Some(0));
                        job.ended_at = Some(Timestamp::now());
                    });
                    Ok(())
                }),
            )
            .route(
                "/host/jobs/{id}/discoverd-deregister",
                put(async move |Path(id): Path<String>| -> Result<()> {
                    deregister.calls.lock().unwrap().push(format!("deregister {id}"));
                    Ok(())
                }),
            )
    }

    fn update(&self, id: &str, event: JobEventKind, change: impl FnOnce(&mut ActiveJob)) {
        let job = {
            let mut jobs = self.jobs.lock().unwrap();
            let Some(job) = jobs.get_mut(id) else { return };
            change(job);
            job.clone()
        };
        let _ = self.job_events.send(JobEvent {
            event,
            job_id: id.to_owned(),
            job,
        });
    }

    pub(crate) fn crash(&self, id: &str) {
        self.update(id, JobEventKind::Stop, |job| {
            (job.status, job.exit_status) = (JobState::Crashed, Some(3));
            job.ended_at = Some(Timestamp::now());
        });
    }

    /// The host's API is gone.
    pub(crate) fn kill_host(&self) {
        self.host.lock().unwrap().cancel();
    }

    /// Ids of jobs that run.
    pub(crate) fn running(&self) -> Vec<String> {
        let jobs = self.jobs.lock().unwrap();
        jobs.values()
            .filter(|job| job.status == JobState::Running)
            .map(|job| job.job.id.clone())
            .collect()
    }

    /// The last state that the controller was told of a job.
    pub(crate) fn reported(&self, id: &str) -> Option<Report> {
        self.reports
            .lock()
            .unwrap()
            .iter()
            .rev()
            .find(|report| report.id == id)
            .cloned()
    }

    /// Waits until something holds.
    pub(crate) async fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
        while !holds(self) {
            if tokio::time::Instant::now() > deadline {
                let calls = self.calls.lock().unwrap().clone();
                panic!("waited in vain: {what}; calls {calls:#?}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.scheduler.cancel();
    }
}

fn host_status() -> HostStatus {
    HostStatus {
        id: HOST.into(),
        pid: 1,
        version: "0".into(),
        url: String::new(),
        tags: BTreeMap::new(),
        draining: false,
        subnet: None,
        gateway: None,
        cpu: 4000,
        memory: 8 << 30,
        disk_free: 1 << 40,
        notices: Vec::new(),
        features: Vec::new(),
        boot_id: String::new(),
    }
}
