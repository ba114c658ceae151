//! Client of the controller ([`crate::controller`]).

use serde::Deserialize;

use super::discovery::DiscoveryClient;
use super::{EventStream, Http, Upgraded, encode};
use crate::controller::{
    App, Deployment, DeploymentEvent, Event, ExpandedFormation, Formation, Job, NewJob, Release, ScaleRequest,
};
use crate::host::{ATTACH_PROTOCOL, ExecRequest, FORWARD_PROTOCOL, ForwardRequest, LogLine};
use crate::image::Artifact;
use crate::route::{Route, RouteKind};
use crate::{Error, Result};

/// The controller's service in discoverd.
pub const SERVICE: &str = "controller";

/// Talks to the controller.
#[derive(Clone, Debug)]
pub struct ControllerClient {
    http: Http,
}

/// Which lines of an app's log.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    /// Go on with new lines.
    pub follow: bool,
    /// How many of the past.
    pub lines: Option<u32>,
    /// Only this job's.
    pub job_id: Option<String>,
    /// Only this process type's.
    pub process_type: Option<String>,
}

/// Which events.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    /// Of this app.
    pub app_id: Option<String>,
    /// Of these kinds, by their names on the wire.
    pub object_types: Vec<&'static str>,
    /// Of this object.
    pub object_id: Option<String>,
    /// Those of the past first.
    pub past: bool,
    /// At most so many of the past.
    pub count: Option<u32>,
}

impl EventFilter {
    fn query(&self) -> String {
        let mut query = format!("?past={}", self.past);
        let mut add = |name: &str, value: &str| query.push_str(&format!("&{name}={}", encode(value)));
        if let Some(app) = &self.app_id {
            add("app_id", app);
        }
        if !self.object_types.is_empty() {
            add("object_types", &self.object_types.join(","));
        }
        if let Some(object) = &self.object_id {
            add("object_id", object);
        }
        if let Some(count) = self.count {
            add("count", &count.to_string());
        }
        query
    }
}

#[derive(Deserialize, serde::Serialize)]
struct ReleaseId {
    id: String,
}

impl ControllerClient {
    /// Over this transport, which carries the key ([`Http::password`]).
    pub fn new(http: Http) -> Self {
        Self { http }
    }

    /// A client of one of the instances that discoverd knows. Each `attempt` takes the next one, so that an instance
    /// that does not answer is not asked for ever.
    pub async fn discover(discovery: &DiscoveryClient, key: &str, attempt: usize) -> Result<Self> {
        let mut instances = discovery.instances(SERVICE).await?;
        instances.sort_by_key(|instance| instance.index);
        if instances.is_empty() {
            return Err(Error::unavailable("discoverd knows no controller"));
        }
        let instance = &instances[attempt % instances.len()];
        Ok(Self::new(
            Http::new(&format!("http://{}", instance.addr))?.password(key),
        ))
    }

    /// Whether it answers.
    pub async fn ping(&self) -> Result<()> {
        self.http.get("/ping").await
    }

    /// All apps.
    pub async fn apps(&self) -> Result<Vec<App>> {
        self.http.get("/apps").await
    }

    /// An app by id or name.
    pub async fn app(&self, app: &str) -> Result<App> {
        self.http.get(&path(app, "")).await
    }

    /// Makes an app.
    pub async fn create_app(&self, app: &App) -> Result<App> {
        self.http.post("/apps", app).await
    }

    /// Changes an app's meta, strategy or timeout.
    pub async fn update_app(&self, app: &App) -> Result<App> {
        self.http.post(&path(&app.id, ""), app).await
    }

    /// Replaces all labels of an app by those of `labels`, of which nothing else counts.
    pub async fn relabel_app(&self, app: &str, labels: &App) -> Result<App> {
        let only = App {
            meta: labels.meta.clone(),
            ..App::default()
        };
        self.http.post(&path(app, "/meta"), &only).await
    }

    /// Deletes an app with all that belongs to it.
    pub async fn delete_app(&self, app: &str) -> Result<()> {
        self.http.delete(&path(app, "")).await
    }

    /// Makes an artifact; the same one again gives the one that is there.
    pub async fn create_artifact(&self, artifact: &Artifact) -> Result<Artifact> {
        self.http.post("/artifacts", artifact).await
    }

    /// An artifact.
    pub async fn artifact(&self, id: &str) -> Result<Artifact> {
        self.http.get(&format!("/artifacts/{}", encode(id))).await
    }

    /// Makes a release; `release.app_id` names its app.
    pub async fn create_release(&self, release: &Release) -> Result<Release> {
        self.http.post("/releases", release).await
    }

    /// A release.
    pub async fn release(&self, id: &str) -> Result<Release> {
        self.http.get(&format!("/releases/{}", encode(id))).await
    }

    /// An app's releases, newest first.
    pub async fn releases(&self, app: &str) -> Result<Vec<Release>> {
        self.http.get(&path(app, "/releases")).await
    }

    /// An app's current release.
    pub async fn app_release(&self, app: &str) -> Result<Release> {
        self.http.get(&path(app, "/release")).await
    }

    /// Makes a release the current one, without a deployment.
    pub async fn set_app_release(&self, app: &str, release: &str) -> Result<Release> {
        self.http
            .put(
                &path(app, "/release"),
                &ReleaseId {
                    id: release.to_owned(),
                },
            )
            .await
    }

    /// Deletes a release that is not in use.
    pub async fn delete_release(&self, app: &str, release: &str) -> Result<()> {
        self.http
            .delete(&path(app, &format!("/releases/{}", encode(release))))
            .await
    }

    /// A formation.
    pub async fn formation(&self, app: &str, release: &str) -> Result<Formation> {
        self.http
            .get(&path(app, &format!("/formations/{}", encode(release))))
            .await
    }

    /// An app's formations.
    pub async fn formations(&self, app: &str) -> Result<Vec<Formation>> {
        self.http.get(&path(app, "/formations")).await
    }

    /// Puts a formation.
    pub async fn put_formation(&self, formation: &Formation) -> Result<Formation> {
        let rest = format!("/formations/{}", encode(&formation.release_id));
        self.http.put(&path(&formation.app_id, &rest), formation).await
    }

    /// Deletes a formation.
    pub async fn delete_formation(&self, app: &str, release: &str) -> Result<()> {
        self.http
            .delete(&path(app, &format!("/formations/{}", encode(release))))
            .await
    }

    /// All formations that want something.
    pub async fn active_formations(&self) -> Result<Vec<ExpandedFormation>> {
        self.http.get("/formations?active=true").await
    }

    /// All formations, then their changes.
    pub async fn formation_events(&self) -> Result<EventStream<ExpandedFormation>> {
        self.http.events("/formations").await
    }

    /// Scales a release.
    pub async fn scale(&self, app: &str, release: &str, request: &ScaleRequest) -> Result<ScaleRequest> {
        self.http
            .put(&path(app, &format!("/scale/{}", encode(release))), request)
            .await
    }

    /// An app's jobs, newest first.
    pub async fn jobs(&self, app: &str) -> Result<Vec<Job>> {
        self.http.get(&path(app, "/jobs")).await
    }

    /// All jobs that are not down.
    pub async fn active_jobs(&self) -> Result<Vec<Job>> {
        self.http.get("/active-jobs").await
    }

    /// A job.
    pub async fn job(&self, app: &str, id: &str) -> Result<Job> {
        self.http.get(&path(app, &format!("/jobs/{}", encode(id)))).await
    }

    /// Reports a job's state (the scheduler does).
    pub async fn put_job(&self, job: &Job) -> Result<()> {
        let id = if job.id.is_empty() { &job.uuid } else { &job.id };
        self.http
            .put(&path(&job.app_id, &format!("/jobs/{}", encode(id))), job)
            .await
    }

    /// Stops a job.
    pub async fn kill_job(&self, app: &str, id: &str) -> Result<()> {
        self.http
            .delete(&path(app, &format!("/jobs/{}", encode(id))))
            .await
    }

    /// Runs a one-off job in the background.
    pub async fn run_detached(&self, app: &str, job: &NewJob) -> Result<Job> {
        self.http.post(&path(app, "/jobs"), job).await
    }

    /// Runs a one-off job and attaches to it.
    pub async fn run_attached(&self, app: &str, job: &NewJob) -> Result<Upgraded> {
        self.http.upgrade(&path(app, "/jobs"), ATTACH_PROTOCOL, job).await
    }

    /// Starts another program in a running job's container, and becomes its terminal.
    pub async fn exec(&self, app: &str, id: &str, request: &ExecRequest) -> Result<Upgraded> {
        let path = path(app, &format!("/jobs/{}/exec", encode(id)));
        self.http.upgrade(&path, ATTACH_PROTOCOL, request).await
    }

    /// Connects to a port of a running job; the connection's bytes follow.
    pub async fn forward(&self, app: &str, id: &str, request: &ForwardRequest) -> Result<Upgraded> {
        let path = path(app, &format!("/jobs/{}/forward", encode(id)));
        self.http.upgrade(&path, FORWARD_PROTOCOL, request).await
    }

    /// Deploys a release.
    pub async fn deploy(&self, app: &str, release: &str) -> Result<Deployment> {
        self.http
            .post(
                &path(app, "/deploy"),
                &ReleaseId {
                    id: release.to_owned(),
                },
            )
            .await
    }

    /// A deployment.
    pub async fn deployment(&self, id: &str) -> Result<Deployment> {
        self.http.get(&format!("/deployments/{}", encode(id))).await
    }

    /// A deployment's steps, those of the past first.
    pub async fn deployment_events(&self, id: &str) -> Result<EventStream<DeploymentEvent>> {
        self.http.events(&format!("/deployments/{}", encode(id))).await
    }

    /// An app's deployments, newest first.
    pub async fn deployments(&self, app: &str) -> Result<Vec<Deployment>> {
        self.http.get(&path(app, "/deployments")).await
    }

    /// All routes, with their certificates' keys.
    pub async fn all_routes(&self) -> Result<Vec<Route>> {
        self.http.get("/routes").await
    }

    /// An app's routes.
    pub async fn routes(&self, app: &str) -> Result<Vec<Route>> {
        self.http.get(&path(app, "/routes")).await
    }

    /// Makes a route.
    pub async fn create_route(&self, app: &str, route: &Route) -> Result<Route> {
        self.http.post(&path(app, "/routes"), route).await
    }

    /// Changes a route; `route.id` is `<type>/<uuid>`.
    pub async fn update_route(&self, app: &str, route: &Route) -> Result<Route> {
        self.http
            .put(
                &path(app, &format!("/routes/{}", route_path(route.kind, &route.id))),
                route,
            )
            .await
    }

    /// Deletes a route by its id, `<type>/<uuid>`.
    pub async fn delete_route(&self, app: &str, id: &str) -> Result<()> {
        let kind = [RouteKind::Tcp, RouteKind::Udp]
            .into_iter()
            .find(|kind| id.split('/').next() == Some(kind.name()))
            .unwrap_or_default();
        self.http
            .delete(&path(app, &format!("/routes/{}", route_path(kind, id))))
            .await
    }

    /// Events of the past.
    pub async fn events(&self, filter: &EventFilter) -> Result<Vec<Event>> {
        self.http.get(&format!("/events{}", filter.query())).await
    }

    /// Events as they come; with `last_id`, all that came after it first.
    pub async fn event_stream(
        &self,
        filter: &EventFilter,
        last_id: Option<i64>,
    ) -> Result<EventStream<Event>> {
        let last_id = last_id.map(|id| id.to_string());
        self.http
            .events_after(&format!("/events{}", filter.query()), last_id.as_deref())
            .await
    }

    /// An app's log.
    pub async fn log(&self, app: &str, options: &LogOptions) -> Result<EventStream<LogLine>> {
        let mut query = format!("?follow={}", options.follow);
        if let Some(lines) = options.lines {
            query.push_str(&format!("&lines={lines}"));
        }
        if let Some(job) = &options.job_id {
            query.push_str(&format!("&job_id={}", encode(job)));
        }
        if let Some(process_type) = &options.process_type {
            query.push_str(&format!("&process_type={}", encode(process_type)));
        }
        self.http.events(&path(app, &format!("/log{query}"))).await
    }

    /// The transport, for what has no method here.
    pub fn http(&self) -> &Http {
        &self.http
    }
}

fn path(app: &str, rest: &str) -> String {
    format!("/apps/{}{rest}", encode(app))
}

fn route_path(kind: RouteKind, id: &str) -> String {
    format!("{}/{}", kind.name(), encode(id.rsplit('/').next().unwrap_or(id)))
}
