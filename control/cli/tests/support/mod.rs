//! A controller and an image receiving service in memory, behind TLS, and the CLI's binary against them.

#![expect(
    clippy::unwrap_used,
    reason = "what fails in a helper of a test fails the test"
)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post, put};
use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::controller::{App, Deployment, Formation, Job, JobState, NewJob, Release, ScaleRequest};
use flynn_api::host::{LogLine, LogStream, TtySize, attach};
use flynn_api::image::{Artifact, ImageManifest, Layer};
use flynn_api::receive::NewImage;
use flynn_api::route::Route;
use flynn_api::server::{Json, Keys, Listener, events, serve, wants_events};
use flynn_api::tls::{Ca, ClientAuth, PeerIdentity};
use flynn_api::{Digest, Error, ErrorCode, Result};
use http::{HeaderMap, StatusCode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// What the fake cluster holds.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) apps: BTreeMap<String, App>,
    pub(crate) releases: Vec<Release>,
    pub(crate) formations: Vec<Formation>,
    pub(crate) jobs: Vec<Job>,
    pub(crate) deployments: Vec<Deployment>,
    pub(crate) routes: Vec<Route>,
    pub(crate) layers: BTreeMap<String, usize>,
    pub(crate) images: Vec<NewImage>,
    pub(crate) runs: Vec<NewJob>,
    /// Deployments fail for this reason.
    pub(crate) failure: Option<String>,
    /// Jobs never come up.
    pub(crate) stuck: bool,
    made: u32,
}

impl Held {
    fn id(&mut self) -> String {
        self.made += 1;
        format!("{:08}-0000-4000-8000-000000000000", self.made)
    }

    fn app(&self, name: &str) -> Result<App> {
        let found = self.apps.values().find(|app| app.id == name || app.name == name);
        found.cloned().ok_or_else(|| Error::not_found("app", name))
    }

    fn set_release(&mut self, app: &str, release: &str) {
        if let Some(app) = self.apps.get_mut(app) {
            app.release_id = Some(release.to_owned());
        }
    }

    /// Makes jobs as a formation has them.
    fn settle(&mut self, formation: &Formation) {
        self.jobs.retain(|job| job.release_id != formation.release_id);
        for (kind, count) in &formation.processes {
            for _ in 0..*count {
                let uuid = self.id();
                self.jobs.push(Job {
                    id: format!("h1-{uuid}"),
                    uuid,
                    host_id: "h1".into(),
                    app_id: formation.app_id.clone(),
                    release_id: formation.release_id.clone(),
                    process_type: kind.clone(),
                    state: if self.stuck {
                        JobState::Pending
                    } else {
                        JobState::Up
                    },
                    ..Job::default()
                });
            }
        }
    }
}

type Shared = State<Arc<Mutex<Held>>>;

pub(crate) struct Cluster {
    pub(crate) home: tempfile::TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) pin: String,
    held: Arc<Mutex<Held>>,
    _runtime: tokio::runtime::Runtime,
}

impl Cluster {
    /// Starts a cluster that the CLI knows as `test`.
    pub(crate) fn start() -> Self {
        let cluster = Self::unknown();
        let domain = format!("flynn.localhost:{}", cluster.address.port());
        let added = cluster.run(&["cluster", "add", "-p", &cluster.pin, "test", &domain, "key"]);
        assert!(added.status.success(), "{}", stderr(&added));
        cluster
    }

    /// Starts a cluster that the CLI does not know yet.
    pub(crate) fn unknown() -> Self {
        flynn_api::tls::install_provider();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let ca = Ca::create("test").unwrap();
        let names = ["*.flynn.localhost".to_owned()];
        let identity = ca.issue(&PeerIdentity::Host("h1".into()), &names).unwrap();
        let certificate = CertificateDer::from_pem_slice(identity.cert_pem.as_bytes()).unwrap();
        let pin = base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            <sha2::Sha256 as sha2::Digest>::digest(&certificate),
        );
        let held = Arc::new(Mutex::new(Held::default()));
        let config = identity.server_config(ClientAuth::Optional).unwrap();
        let listener = runtime
            .block_on(Listener::tls("127.0.0.1:0".parse().unwrap(), config))
            .unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(serve(listener, router(Arc::clone(&held)), std::future::pending()));
        Self {
            home: tempfile::tempdir().unwrap(),
            address,
            pin,
            held,
            _runtime: runtime,
        }
    }

    pub(crate) fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap()
    }

    pub(crate) fn rc(&self) -> PathBuf {
        self.home.path().join("flynnrc")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flynn"));
        command
            .args(arguments)
            .env("FLYNNRC", self.rc())
            .current_dir(self.home.path())
            .stdin(Stdio::null());
        for name in ["FLYNN_APP", "FLYNN_CLUSTER", "GIT_DIR"] {
            command.env_remove(name);
        }
        command.env("GIT_CEILING_DIRECTORIES", "/");
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; its standard output.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "flynn {}: {}",
            arguments.join(" "),
            stderr(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with this exit status; its standard error.
    pub(crate) fn fails(&self, status: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = stderr(&output);
        assert_eq!(
            output.status.code(),
            Some(status),
            "flynn {}: {said}",
            arguments.join(" ")
        );
        assert!(output.stdout.is_empty(), "an error leaves no data");
        said
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn router(held: Arc<Mutex<Held>>) -> Router {
    Router::new()
        .route("/apps", get(apps).post(create_app))
        .route("/apps/{app}", get(app).post(update_app).delete(delete_app))
        .route("/apps/{app}/release", get(current))
        .route("/apps/{app}/releases", get(releases))
        .route("/apps/{app}/releases/{id}", delete(delete_release))
        .route("/apps/{app}/meta", post(relabel_app))
        .route("/releases", post(create_release))
        .route("/releases/{id}", get(release))
        .route("/apps/{app}/formations", get(formations))
        .route("/apps/{app}/formations/{release}", get(formation))
        .route("/apps/{app}/scale/{release}", put(scale))
        .route("/apps/{app}/jobs", get(jobs).post(run))
        .route("/apps/{app}/jobs/{id}", delete(kill))
        .route("/apps/{app}/deploy", post(deploy))
        .route("/apps/{app}/deployments", get(deployments))
        .route("/deployments/{id}", get(deployment))
        .route("/apps/{app}/routes", get(routes).post(create_route))
        .route(
            "/apps/{app}/routes/{kind}/{id}",
            put(update_route).delete(delete_route),
        )
        .route("/apps/{app}/log", get(log))
        .route("/layer/{id}", get(layer).post(put_layer))
        .route("/artifact", post(create_artifact))
        .layer(axum::middleware::from_fn(check_key))
        .with_state(held)
}

async fn check_key(request: Request, next: axum::middleware::Next) -> Response {
    match Keys::parse("KEY", "key").unwrap().check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn apps(held: Shared) -> Json<Vec<App>> {
    Json(held.lock().unwrap().apps.values().cloned().collect())
}

async fn create_app(held: Shared, Json(mut app): Json<App>) -> Result<Json<App>> {
    let mut held = held.lock().unwrap();
    if held.app(&app.name).is_ok() {
        return Err(Error::new(
            ErrorCode::ObjectExists,
            format!("the app {} is there already", app.name),
        ));
    }
    app.id = held.id();
    app.strategy = "all-at-once".into();
    app.deploy_timeout = 5;
    held.apps.insert(app.id.clone(), app.clone());
    Ok(Json(app))
}

async fn app(held: Shared, Path(name): Path<String>) -> Result<Json<App>> {
    held.lock().unwrap().app(&name).map(Json)
}

async fn update_app(held: Shared, Json(app): Json<App>) -> Json<App> {
    held.lock().unwrap().apps.insert(app.id.clone(), app.clone());
    Json(app)
}

async fn relabel_app(held: Shared, Path(id): Path<String>, Json(labels): Json<App>) -> Result<Json<App>> {
    let mut held = held.lock().unwrap();
    held.app(&id)?;
    let app = held.apps.get_mut(&id).unwrap();
    app.meta = labels.meta;
    Ok(Json(app.clone()))
}

async fn delete_app(held: Shared, Path(id): Path<String>) -> StatusCode {
    held.lock().unwrap().apps.remove(&id);
    StatusCode::OK
}

async fn current(held: Shared, Path(id): Path<String>) -> Result<Json<Release>> {
    let held = held.lock().unwrap();
    let id = held.app(&id)?.release_id.unwrap_or_default();
    let found = held.releases.iter().find(|release| release.id == id);
    found
        .cloned()
        .map(Json)
        .ok_or_else(|| Error::not_found("release", id))
}

async fn releases(held: Shared) -> Json<Vec<Release>> {
    Json(held.lock().unwrap().releases.iter().rev().cloned().collect())
}

async fn release(held: Shared, Path(id): Path<String>) -> Result<Json<Release>> {
    let held = held.lock().unwrap();
    let found = held.releases.iter().find(|release| release.id == id);
    found
        .cloned()
        .map(Json)
        .ok_or_else(|| Error::not_found("release", id))
}

async fn create_release(held: Shared, Json(mut release): Json<Release>) -> Json<Release> {
    let mut held = held.lock().unwrap();
    release.id = held.id();
    held.releases.push(release.clone());
    Json(release)
}

async fn delete_release(held: Shared, Path((_, id)): Path<(String, String)>) -> StatusCode {
    held.lock().unwrap().releases.retain(|release| release.id != id);
    StatusCode::OK
}

async fn formations(held: Shared) -> Json<Vec<Formation>> {
    Json(held.lock().unwrap().formations.clone())
}

async fn formation(held: Shared, Path((_, release)): Path<(String, String)>) -> Result<Json<Formation>> {
    let held = held.lock().unwrap();
    let found = held
        .formations
        .iter()
        .find(|formation| formation.release_id == release);
    found
        .cloned()
        .map(Json)
        .ok_or_else(|| Error::not_found("formation", release))
}

async fn scale(
    held: Shared,
    Path((app, release)): Path<(String, String)>,
    Json(mut request): Json<ScaleRequest>,
) -> Json<ScaleRequest> {
    let mut held = held.lock().unwrap();
    let at = held
        .formations
        .iter()
        .position(|formation| formation.release_id == release);
    let mut formation = at.map(|at| held.formations.remove(at)).unwrap_or_default();
    request.old_processes = formation.processes.clone();
    formation.app_id = app;
    formation.release_id = release;
    formation
        .processes
        .extend(request.new_processes.clone().unwrap_or_default());
    formation
        .tags
        .extend(request.new_tags.clone().unwrap_or_default());
    held.settle(&formation);
    held.formations.push(formation);
    Json(request)
}

async fn jobs(held: Shared) -> Json<Vec<Job>> {
    Json(held.lock().unwrap().jobs.clone())
}

async fn kill(held: Shared, Path((_, id)): Path<(String, String)>) -> Result<StatusCode> {
    let mut held = held.lock().unwrap();
    let job = held
        .jobs
        .iter_mut()
        .find(|job| job.id == id)
        .ok_or_else(|| Error::not_found("job", &id))?;
    job.state = JobState::Down;
    Ok(StatusCode::OK)
}

async fn deploy(held: Shared, Path(app): Path<String>, Json(wanted): Json<Release>) -> Json<Deployment> {
    let mut held = held.lock().unwrap();
    let id = held.id();
    let error = held.failure.clone();
    let old = held.app(&app).ok().and_then(|app| app.release_id);
    if error.is_none() {
        held.set_release(&app, &wanted.id);
        let formation = old.as_ref().and_then(|old| {
            held.formations
                .iter()
                .find(|formation| formation.release_id == *old)
        });
        if let Some(formation) = formation
            .cloned()
            .filter(|formation| formation.release_id != wanted.id)
        {
            held.jobs.clear();
            let formation = Formation {
                release_id: wanted.id.clone(),
                ..formation
            };
            held.settle(&formation);
            held.formations = vec![formation];
        }
    }
    let deployment = Deployment {
        id,
        app_id: app,
        old_release_id: old,
        new_release_id: wanted.id,
        status: if error.is_some() { "failed" } else { "complete" }.into(),
        error,
        ..Deployment::default()
    };
    held.deployments.push(deployment.clone());
    Json(deployment)
}

async fn deployments(held: Shared) -> Json<Vec<Deployment>> {
    Json(held.lock().unwrap().deployments.iter().rev().cloned().collect())
}

async fn deployment(held: Shared, Path(id): Path<String>, headers: HeaderMap) -> Result<Response> {
    let held = held.lock().unwrap();
    let found = held
        .deployments
        .iter()
        .find(|deployment| deployment.id == id)
        .cloned();
    let found = found.ok_or_else(|| Error::not_found("deployment", id))?;
    if wants_events(&headers) {
        let step = serde_json::json!({"release": found.new_release_id, "status": found.status, "error": found.error});
        return Ok(events(futures::stream::iter([(None, step)])));
    }
    Ok(Json(found).into_response())
}

async fn routes(held: Shared) -> Json<Vec<Route>> {
    Json(held.lock().unwrap().routes.clone())
}

async fn create_route(held: Shared, Json(mut route): Json<Route>) -> Json<Route> {
    let mut held = held.lock().unwrap();
    route.id = format!("{}/{}", route.kind.name(), held.id());
    held.routes.push(route.clone());
    Json(route)
}

async fn update_route(held: Shared, Json(route): Json<Route>) -> Json<Route> {
    let mut held = held.lock().unwrap();
    held.routes.retain(|other| other.id != route.id);
    held.routes.push(route.clone());
    Json(route)
}

async fn delete_route(
    held: Shared,
    Path((_, kind, id)): Path<(String, String, String)>,
) -> Result<StatusCode> {
    let (mut held, id) = (held.lock().unwrap(), format!("{kind}/{id}"));
    let before = held.routes.len();
    held.routes.retain(|route| route.id != id);
    if held.routes.len() == before {
        Err(Error::not_found("route", id))
    } else {
        Ok(StatusCode::OK)
    }
}

async fn log(Query(query): Query<BTreeMap<String, String>>) -> Response {
    let count: usize = query
        .get("lines")
        .and_then(|lines| lines.parse().ok())
        .unwrap_or(1000);
    let lines = (0..count).map(|i| {
        let line = LogLine {
            timestamp: jiff::Timestamp::from_millisecond(1_800_000_000_000 + i64::try_from(i).unwrap())
                .unwrap(),
            stream: if i % 2 == 0 {
                LogStream::Stdout
            } else {
                LogStream::Stderr
            },
            msg: format!("line {i}"),
            job_id: "h1-1".into(),
            process_type: "web".into(),
        };
        (None, line)
    });
    events(futures::stream::iter(lines.collect::<Vec<_>>()))
}

async fn layer(held: Shared, Path(id): Path<String>) -> Result<Json<Layer>> {
    let found = held.lock().unwrap().layers.contains_key(&id);
    if found {
        Ok(Json(Layer::squashfs(Digest::of(id.as_bytes()), 1)))
    } else {
        Err(Error::not_found("layer", id))
    }
}

async fn put_layer(held: Shared, Path(id): Path<String>, body: Body) -> Result<Json<Layer>> {
    let bytes = axum::body::to_bytes(body, 1 << 30)
        .await
        .map_err(|_| Error::validation("broken off"))?;
    held.lock().unwrap().layers.insert(id.clone(), bytes.len());
    Ok(Json(Layer::squashfs(Digest::of(id.as_bytes()), 1)))
}

async fn create_artifact(held: Shared, Json(image): Json<NewImage>) -> Json<Artifact> {
    let mut held = held.lock().unwrap();
    let manifest = ImageManifest::new(flynn_api::image::Entrypoint::default(), Vec::new());
    let mut artifact = Artifact::image(manifest, "", None);
    artifact.id = held.id();
    held.images.push(image);
    Json(artifact)
}

/// Runs nothing: answers as a job would that echoes its input.
async fn run(held: Shared, mut request: Request) -> Response {
    let upgrade = request.headers().contains_key(http::header::UPGRADE);
    let on = hyper::upgrade::on(&mut request);
    let bytes = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let job: NewJob = serde_json::from_slice(&bytes).unwrap();
    held.lock().unwrap().runs.push(job.clone());
    if !upgrade {
        return Json(Job {
            id: "h1-detached".into(),
            ..Job::default()
        })
        .into_response();
    }
    tokio::spawn(async move {
        let Ok(upgraded) = on.await else { return };
        echo(hyper_util::rt::TokioIo::new(upgraded), &job).await;
    });
    let headers = [("connection", "Upgrade"), ("upgrade", "flynn-attach/0")];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// Tells the size of the terminal, echoes input, tells of sizes and signals, and ends with status 7 at the end of
/// input or at a `q`.
async fn echo(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, job: &NewJob) {
    let size = job
        .tty_size
        .map_or("none".into(), |size| format!("{}x{}", size.columns, size.lines));
    write_frame(&mut stream, attach::STDOUT, format!("size {size}\r\n").as_bytes())
        .await
        .unwrap();
    write_frame(&mut stream, attach::STDERR, b"to stderr\r\n")
        .await
        .unwrap();
    // Of one that is deaf nothing is taken.
    let (deaf, mut untaken) = (job.args == ["deaf"], 0);
    while let Ok(Some(frame)) = read_frame(&mut stream).await {
        let text = match frame.kind {
            attach::STDIN if deaf => {
                untaken += frame.payload.len();
                if untaken < attach::WINDOW {
                    continue;
                }
                b"a window is full\n".to_vec()
            }
            attach::SIGNAL if deaf => {
                let said = format!("signal {}\n{untaken} bytes\n", frame.payload[3]);
                write_frame(&mut stream, attach::STDOUT, said.as_bytes())
                    .await
                    .unwrap();
                break;
            }
            attach::STDIN if frame.payload.is_empty() || frame.payload == b"q" => break,
            attach::STDIN => frame.payload,
            attach::RESIZE => {
                let size: TtySize = serde_json::from_slice(&frame.payload).unwrap();
                format!("resized {}x{}\r\n", size.columns, size.lines).into_bytes()
            }
            attach::SIGNAL => format!("signal {}\r\n", frame.payload[3]).into_bytes(),
            _ => continue,
        };
        write_frame(&mut stream, attach::STDOUT, &text).await.unwrap();
    }
    write_frame(&mut stream, attach::EXIT, &7i32.to_be_bytes())
        .await
        .unwrap();
}
