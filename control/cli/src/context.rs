//! Which cluster and which app a command is about, and clients for them.

use std::path::PathBuf;

use flynn_api::client::Http;
use flynn_api::client::controller::ControllerClient;
use flynn_api::client::receive::ReceiveClient;
use flynn_api::controller::{App, Job, JobState, Release};
use flynn_api::{Error, ErrorCode};

use crate::commands::Globals;
use crate::config::{self, Cluster, Config};
use crate::failure::{Failure, Result, advise, usage};
use crate::git;
use crate::pin;

/// What is known before a command runs.
pub(crate) struct Context {
    pub(crate) globals: Globals,
    pub(crate) config_path: PathBuf,
    pub(crate) config: Config,
}

/// An app, and the controller that has it.
pub(crate) struct Target {
    pub(crate) controller: ControllerClient,
    pub(crate) app: App,
}

impl Context {
    pub(crate) fn new(globals: Globals) -> Result<Self> {
        let config_path = config::path()?;
        let config = Config::load(&config_path)?;
        Ok(Self {
            globals,
            config_path,
            config,
        })
    }

    /// The app's name and the cluster, by `-a`, then by the repository's remotes.
    fn choose(&self) -> (Option<String>, Option<String>) {
        let Globals { app, cluster, .. } = &self.globals;
        if let (Some(app), Some(cluster)) = (app, cluster) {
            return (Some(app.clone()), Some(cluster.clone()));
        }
        let remotes = git::remotes(&self.config);
        let fits = |remote: &&git::Remote| cluster.as_ref().is_none_or(|cluster| remote.cluster == *cluster);
        let named = |name: &str| remotes.iter().filter(fits).find(|remote| remote.name == name);
        let remote = match app {
            // A remote may be named in place of an app.
            Some(app) => named(app),
            None => named(git::REMOTE).or_else(|| match remotes.as_slice() {
                [only] if fits(&only) => Some(only),
                _ => None,
            }),
        };
        match (remote, app) {
            (Some(remote), _) => (Some(remote.app.clone()), Some(remote.cluster.clone())),
            (None, app) => (app.clone(), cluster.clone()),
        }
    }

    /// The cluster.
    pub(crate) fn cluster(&self) -> Result<&Cluster> {
        let cluster = self.globals.cluster.clone().or_else(|| self.choose().1);
        self.config.find(cluster.as_deref())
    }

    fn http(cluster: &Cluster, url: &str) -> Result<Http> {
        let mut http = Http::new(url)?.password(&cluster.key);
        if url.starts_with("https:") {
            let pin = if cluster.tls_pin.is_empty() {
                None
            } else {
                Some(pin::parse(&cluster.tls_pin)?)
            };
            http = http.tls(pin::client_config(pin)?);
        }
        Ok(http)
    }

    /// The cluster's controller.
    pub(crate) fn controller(&self) -> Result<ControllerClient> {
        let cluster = self.cluster()?;
        Ok(ControllerClient::new(Self::http(
            cluster,
            &cluster.controller_url,
        )?))
    }

    /// The cluster's image receiving.
    pub(crate) fn images(&self) -> Result<ReceiveClient> {
        let cluster = self.cluster()?;
        Ok(ReceiveClient::new(Self::http(cluster, &cluster.images())?))
    }

    /// The app that is meant.
    pub(crate) async fn target(&self) -> Result<Target> {
        let (app, cluster) = self.choose();
        let app = app.ok_or_else(|| {
            usage("no app is named: use -a <app>, set FLYNN_APP, or run this in a git repository with a remote of the cluster")
        })?;
        let cluster = self.config.find(cluster.as_deref())?;
        let controller = ControllerClient::new(Self::http(cluster, &cluster.controller_url)?);
        let app = controller
            .app(&app)
            .await
            .map_err(advise(ErrorCode::NotFound, "See them all: flynn apps"))?;
        Ok(Target { controller, app })
    }
}

impl Target {
    /// The app's current release, if it has one.
    pub(crate) async fn release(&self) -> Result<Option<Release>> {
        match self.controller.app_release(&self.app.id).await {
            Ok(release) => Ok(Some(release)),
            Err(error) if error.code == ErrorCode::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The release that is named, else the current one.
    pub(crate) async fn release_or_current(&self, id: Option<&str>) -> Result<Release> {
        match id {
            Some(id) => Ok(self
                .controller
                .release(id)
                .await
                .map_err(advise(ErrorCode::NotFound, "See them all: flynn release"))?),
            None => self.release().await?.ok_or_else(|| self.no_release()),
        }
    }

    /// The id of the job that is named, or of one that is up where a process type is.
    pub(crate) async fn running_job(&self, name: String) -> Result<String> {
        let jobs = self.controller.jobs(&self.app.id).await?;
        let of_type = |job: &&Job| job.process_type == name;
        if let Some(job) = jobs.iter().filter(|job| job.state == JobState::Up).find(of_type) {
            return Ok(job.id.clone());
        }
        if jobs.iter().any(|job| of_type(&job)) {
            return Err(Error::conflict(format!("no job of the type {name} is up")).into());
        }
        Ok(name)
    }

    pub(crate) fn no_release(&self) -> Failure {
        usage(format!(
            "the app {} has no release yet; push an image: flynn -a {0} docker push <image>",
            self.app.name
        ))
    }
}
