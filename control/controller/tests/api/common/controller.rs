//! A controller on a database of its own, and what tests say to it.

use std::net::SocketAddr;
use std::path::PathBuf;

use flynn_api::client::Http;
use flynn_api::client::controller::ControllerClient;
use flynn_api::controller::{App, Formation, Job, JobState, ProcessType, Processes, Release};
use flynn_api::image::{Artifact, Entrypoint, ImageManifest, Layer};
use flynn_api::server::CancellationToken;
use flynn_api::{Digest, Env};
use flynn_controller::{Controller, Options};
use uuid::Uuid;

use super::cluster::{CLUSTER, Cluster};

/// The key that lets tests in.
pub(crate) const KEY: &str = "test-key";

/// A running controller.
pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    pub(crate) client: ControllerClient,
    pub(crate) options: Options,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// Options for a controller on a new database.
pub(crate) async fn options() -> Options {
    options_on(&CLUSTER).await
}

/// Options for a controller on a new database of this cluster.
pub(crate) async fn options_on(cluster: &Cluster) -> Options {
    Options {
        listen: ([127, 0, 0, 1], 0).into(),
        keys: vec!["old-key".into(), KEY.into()],
        database: cluster.database().await,
        default_route_domain: Some("flynn.localhost".into()),
        // Nothing listens there: tests that need hosts say where discoverd is.
        discoverd: "http://127.0.0.1:1".into(),
        tls: PathBuf::from("/nonexistent"),
    }
}

/// A controller on a new database.
pub(crate) async fn start() -> Running {
    start_with(options().await).await
}

/// A controller with these options.
pub(crate) async fn start_with(options: Options) -> Running {
    let controller = Controller::start(options.clone()).await.unwrap();
    let addr = controller.local_addr().unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let task = tokio::spawn(async move { controller.run(stopped).await.unwrap() });
    let http = Http::new(&format!("http://{addr}")).unwrap().password(KEY);
    Running {
        addr,
        client: ControllerClient::new(http),
        options,
        stop,
        task,
    }
}

impl Running {
    /// Stops it, as a crash would: nothing is said to anyone.
    pub(crate) async fn kill(self) -> Options {
        self.task.abort();
        let _ = self.task.await;
        self.options
    }

    /// Stops it properly.
    pub(crate) async fn stop(self) -> Options {
        self.stop.cancel();
        self.task.await.unwrap();
        self.options
    }

    pub(crate) fn http(&self) -> &Http {
        self.client.http()
    }

    /// A new artifact.
    pub(crate) async fn artifact(&self) -> Artifact {
        let layer = Layer::squashfs(Digest::of(Uuid::new_v4().as_bytes()), 5);
        let manifest = ImageManifest::new(Entrypoint::default(), vec![layer]);
        let artifact = Artifact::image(manifest, "http://blobstore.discoverd/image", None);
        self.client.create_artifact(&artifact).await.unwrap()
    }

    /// An app of this name.
    pub(crate) async fn app(&self, name: &str) -> App {
        self.client
            .create_app(&App {
                name: name.into(),
                ..App::default()
            })
            .await
            .unwrap()
    }

    /// A release of an app with the process types `web` and `worker`.
    pub(crate) async fn release(&self, app: &App) -> Release {
        let artifact = self.artifact().await;
        let types = ["web", "worker"].map(|kind| (kind.to_owned(), ProcessType::default()));
        let release = Release {
            app_id: Some(app.id.clone()),
            artifact_ids: vec![artifact.id],
            env: Env::from([
                ("SECRET_KEY".into(), "s3cret-value".into()),
                ("MODE".into(), "test".into()),
            ]),
            processes: types.into(),
            ..Release::default()
        };
        self.client.create_release(&release).await.unwrap()
    }

    /// An app whose current release runs `web` this often, with its jobs.
    pub(crate) async fn running_app(&self, name: &str, web: u32) -> (App, Release, Vec<Job>) {
        let app = self.app(name).await;
        let release = self.release(&app).await;
        self.client.set_app_release(&app.id, &release.id).await.unwrap();
        let formation = Formation {
            app_id: app.id.clone(),
            release_id: release.id.clone(),
            processes: Processes::from([("web".into(), web)]),
            ..Formation::default()
        };
        self.client.put_formation(&formation).await.unwrap();
        let mut jobs = Vec::new();
        for _ in 0..web {
            let job = job(&app, &release, "web", JobState::Up);
            self.client.put_job(&job).await.unwrap();
            jobs.push(job);
        }
        (app, release, jobs)
    }
}

/// A job as the scheduler would report it.
pub(crate) fn job(app: &App, release: &Release, kind: &str, state: JobState) -> Job {
    let uuid = Uuid::new_v4().to_string();
    Job {
        id: format!("host1-{uuid}"),
        uuid,
        host_id: "host1".into(),
        app_id: app.id.clone(),
        release_id: release.id.clone(),
        process_type: kind.into(),
        state,
        ..Job::default()
    }
}
