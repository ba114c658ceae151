//! The controller API: apps, releases, formations, jobs, deployments, events. Flynn's paths and JSON.
//!
//! Authentication: HTTP basic, any user name, the password one of the cluster's keys.
//!
//! | call | what |
//! | --- | --- |
//! | `GET`/`POST /apps`, `GET`/`POST`/`DELETE /apps/{app}` | [`App`]; `{app}` is an id or a name |
//! | `POST /apps/{app}/meta` | replaces all labels; `POST /apps/{app}` leaves what is not given |
//! | `GET`/`POST /releases`, `GET /releases/{id}`, `GET /apps/{app}/releases` | [`Release`] |
//! | `PUT`/`GET /apps/{app}/release` | the app's current release, `{"id":…}` |
//! | `DELETE /apps/{app}/releases/{id}` | deletes one that is not in use |
//! | `GET`/`POST /artifacts`, `GET /artifacts/{id}` | [`Artifact`](crate::image::Artifact) |
//! | `PUT`/`GET`/`DELETE /apps/{app}/formations/{release}`, `GET /apps/{app}/formations` | [`Formation`] |
//! | `GET /formations?active=true`, or a stream | [`ExpandedFormation`]; in a stream `?current=true` marks the end of what was there by one without an app |
//! | `PUT /apps/{app}/scale/{release}` | [`ScaleRequest`] |
//! | `GET`/`POST /apps/{app}/jobs`, `GET`/`PUT`/`DELETE /apps/{app}/jobs/{id}`, `GET /active-jobs` | [`Job`], [`NewJob`] |
//! | `POST /apps/{app}/deploy`, `GET /apps/{app}/deployments`, `GET /deployments/{id}` | [`Deployment`] |
//! | `GET`/`POST /apps/{app}/routes`, `GET`/`PUT`/`DELETE /apps/{app}/routes/{type}/{id}`, `GET /routes` | [`Route`](crate::route::Route) |
//! | `GET /events?app_id=&object_types=&object_id=&past=&count=`, `GET /events/{id}` | [`Event`], or a stream |
//! | `GET /apps/{app}/log?follow=&job_id=&lines=&process_type=` | a stream of [`LogLine`](crate::host::LogLine) |
//! | `GET /ca-cert`, `GET /.well-known/status`, `GET /ping` | the cluster CA; is it there |

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::host::{Mount, Partition, Port, TtySize};
use crate::image::Artifact;
use crate::resources::Resources;
use crate::{Env, Meta};

/// Meta key of apps that belong to the platform.
pub const SYSTEM_APP: &str = "flynn-system-app";
/// Meta key of apps that cannot be scaled to nothing.
pub const SYSTEM_CRITICAL: &str = "flynn-system-critical";

/// Process types to counts.
pub type Processes = BTreeMap<String, u32>;
/// Process types to the tags that a host must have.
pub type Tags = BTreeMap<String, Meta>;

/// What a team runs: releases over time, one of them current.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct App {
    /// A UUID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// At most 100 lower-case letters, digits and dashes; made up when empty.
    #[serde(default)]
    pub name: String,
    /// Labels.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// How it is deployed: `all-at-once` (the default) or `one-down-one-up`.
    #[serde(default)]
    pub strategy: String,
    /// The current release.
    #[serde(rename = "release", default, skip_serializing_if = "Option::is_none")]
    pub release_id: Option<String>,
    /// Seconds that a deployment's step may take; 120 by default.
    #[serde(default)]
    pub deploy_timeout: i32,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When it was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
}

impl App {
    /// Whether it belongs to the platform.
    pub fn is_system(&self) -> bool {
        self.meta.get(SYSTEM_APP).is_some_and(|value| value == "true")
    }
}

/// What runs: artifacts and configuration. Immutable.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// A UUID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The app.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_id: Option<String>,
    /// Artifact ids, lowest layer first.
    #[serde(rename = "artifacts", default, skip_serializing_if = "Vec::is_empty")]
    pub artifact_ids: Vec<String>,
    /// Environment of every process.
    #[serde(default, skip_serializing_if = "Env::is_empty")]
    pub env: Env,
    /// Labels.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// Process types.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub processes: BTreeMap<String, ProcessType>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
}

/// One kind of process of a release.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessType {
    /// Program and arguments; the image's when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment over the release's.
    #[serde(default, skip_serializing_if = "Env::is_empty")]
    pub env: Env,
    /// Ports and services.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeReq>,
    /// Counts are per host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub omni: bool,
    /// In the host's network. Only for the platform.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_network: bool,
    /// In the host's pid namespace. Only for the platform.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_pid_namespace: bool,
    /// In the host's user namespace, as the platform's own jobs are anyway. Only for the platform.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_user_namespace: bool,
    /// The service that jobs of this type are found by.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service: String,
    /// Restarted by the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resurrect: bool,
    /// Limits.
    #[serde(default, skip_serializing_if = "Resources::is_empty")]
    pub resources: Resources,
    /// Paths of the host. Only for the platform.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    /// Capabilities, instead of the default set. Only for the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linux_capabilities: Option<Vec<String>>,
}

/// A volume that a process type wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReq {
    /// Where it is mounted.
    pub path: String,
    /// Remove it when the job is gone.
    #[serde(default)]
    pub delete_on_stop: bool,
    /// How many bytes it may hold; as many as its disk when absent. A release that asks for more has the volume made
    /// larger, one that asks for less has it stay as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
}

/// How many of each process type shall run of a release.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Formation {
    /// The app.
    #[serde(rename = "app", default)]
    pub app_id: String,
    /// The release.
    #[serde(rename = "release", default)]
    pub release_id: String,
    /// Counts.
    #[serde(default, skip_serializing_if = "Processes::is_empty")]
    pub processes: Processes,
    /// Tags that hosts must have.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
    /// Grows with each change.
    #[serde(default)]
    pub generation: u64,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When it was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
}

/// A formation with all that the scheduler needs to make jobs of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpandedFormation {
    /// The app.
    pub app: App,
    /// The release.
    pub release: Release,
    /// Its artifacts, in order.
    #[serde(default)]
    pub artifacts: Vec<Artifact>,
    /// Counts.
    #[serde(default)]
    pub processes: Processes,
    /// Tags.
    #[serde(default)]
    pub tags: Tags,
    /// The formation's generation.
    #[serde(default)]
    pub generation: u64,
    /// When it was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
    /// It is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

/// Asks for other counts, or tells how that went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ScaleRequest {
    /// A UUID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The app.
    #[serde(rename = "app", default)]
    pub app_id: String,
    /// The release.
    #[serde(rename = "release", default)]
    pub release_id: String,
    /// `pending`, `cancelled`, `complete`.
    #[serde(default)]
    pub state: String,
    /// Counts before.
    #[serde(default)]
    pub old_processes: Processes,
    /// Counts wanted. Types that are not named keep theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_processes: Option<Processes>,
    /// Tags before.
    #[serde(default)]
    pub old_tags: Tags,
    /// Tags wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_tags: Option<Tags>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
}

/// Where a job stands. States only go forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Wanted.
    #[default]
    Pending,
    /// No host may take it now.
    Blocked,
    /// A host makes it.
    Starting,
    /// It runs, and its services are healthy.
    Up,
    /// It is asked to stop.
    Stopping,
    /// It is over.
    Down,
}

/// A job as the controller knows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// `<host id>-<uuid>`; empty while it has no host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The UUID alone.
    #[serde(default)]
    pub uuid: String,
    /// The host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub host_id: String,
    /// The app.
    #[serde(rename = "app", default)]
    pub app_id: String,
    /// The release.
    #[serde(rename = "release", default)]
    pub release_id: String,
    /// The process type; empty for one-off jobs.
    #[serde(rename = "type", default)]
    pub process_type: String,
    /// Where it stands.
    #[serde(default)]
    pub state: JobState,
    /// Program and arguments, for one-off jobs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// Exit status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<i32>,
    /// Why it could not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_error: Option<String>,
    /// When it will be tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_at: Option<Timestamp>,
    /// How often its like has been restarted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<i32>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When it was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
}

/// Asks for a one-off job. With the header `Upgrade: flynn-attach/0` the answer is the attached stream
/// ([`crate::host::attach`]).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewJob {
    /// The release.
    #[serde(rename = "release", default)]
    pub release_id: String,
    /// Program and arguments; the image's when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// With the release's environment.
    #[serde(default)]
    pub release_env: bool,
    /// More environment.
    #[serde(default, skip_serializing_if = "Env::is_empty")]
    pub env: Env,
    /// With a terminal.
    #[serde(default)]
    pub tty: bool,
    /// The terminal's size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty_size: Option<TtySize>,
    /// Keep no log.
    #[serde(default)]
    pub disable_log: bool,
    /// Labels.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// Limits.
    #[serde(default, skip_serializing_if = "Resources::is_empty")]
    pub resources: Resources,
    /// Share of the host.
    #[serde(default)]
    pub partition: Partition,
}

/// Going from one release to another.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// A UUID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The app.
    #[serde(rename = "app", default)]
    pub app_id: String,
    /// From this release, unless it is the first.
    #[serde(rename = "old_release", default, skip_serializing_if = "Option::is_none")]
    pub old_release_id: Option<String>,
    /// To this one.
    #[serde(rename = "new_release", default)]
    pub new_release_id: String,
    /// `all-at-once` or `one-down-one-up`.
    #[serde(default)]
    pub strategy: String,
    /// `pending`, `running`, `complete`, `failed`.
    #[serde(default)]
    pub status: String,
    /// Counts at its start.
    #[serde(default, skip_serializing_if = "Processes::is_empty")]
    pub processes: Processes,
    /// Tags.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
    /// Seconds that a step may take.
    #[serde(default)]
    pub deploy_timeout: i32,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

/// The data of events of type `deployment`: one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeploymentEvent {
    /// The app.
    #[serde(rename = "app", default)]
    pub app_id: String,
    /// The deployment.
    #[serde(rename = "deployment", default)]
    pub deployment_id: String,
    /// The new release.
    #[serde(rename = "release", default)]
    pub release_id: String,
    /// `pending`, `running`, `complete`, `failed`.
    #[serde(default)]
    pub status: String,
    /// Of a job that changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_type: Option<String>,
    /// Of a job that changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_state: Option<JobState>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Types of [`Event`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// [`App`] made or changed.
    App,
    /// App gone.
    AppDeletion,
    /// Another release is current.
    AppRelease,
    /// [`DeploymentEvent`].
    Deployment,
    /// [`Job`].
    Job,
    /// [`ScaleRequest`].
    ScaleRequest,
    /// [`Formation`] changed.
    Scale,
    /// [`Release`].
    Release,
    /// Release gone.
    ReleaseDeletion,
    /// [`Artifact`].
    Artifact,
    /// [`Route`](crate::route::Route).
    Route,
    /// Route gone.
    RouteDeletion,
    /// Of a newer version.
    #[serde(other)]
    Other,
}

/// Something that changed in the controller. Secrets in `data` are redacted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Grows with each event; the `id:` of the stream.
    pub id: i64,
    /// The app.
    #[serde(rename = "app", default, skip_serializing_if = "Option::is_none")]
    pub app_id: Option<String>,
    /// What kind of object.
    pub object_type: EventKind,
    /// Which object.
    pub object_id: String,
    /// The object.
    pub data: serde_json::Value,
    /// When.
    pub created_at: Timestamp,
}
