//! Jobs: what is to run, what becomes of it, and how it is told.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::TtySize;
use crate::image::Artifact;
use crate::resources::Resources;
use crate::{Env, Meta};

/// A job as its maker describes it. It never changes; what happens to it is [`ActiveJob`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Job {
    /// `<host id>-<uuid>`.
    pub id: String,
    /// Labels: `flynn-controller.app`, `flynn-controller.app_name`, `flynn-controller.release`, `flynn-controller.type`,
    /// `flynn-system-app`.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub metadata: Meta,
    /// The images whose layers make the root file system, lowest first. The last one's default entrypoint applies
    /// where `config` is silent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub artifacts: Vec<Artifact>,
    /// How to run it.
    #[serde(default)]
    pub config: ContainerConfig,
    /// Limits.
    #[serde(default, skip_serializing_if = "Resources::is_empty")]
    pub resources: Resources,
    /// Which share of the host it belongs to.
    #[serde(default)]
    pub partition: Partition,
    /// Restarted by its supervisor, and after a boot by the daemon.
    #[serde(default)]
    pub resurrect: bool,
    /// Seconds between SIGTERM and SIGKILL; 30 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<u32>,
    /// The generation of the formation or deployment that asked for the job; hosts refuse older ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
}

/// Names of [`Job::metadata`].
pub mod label {
    /// The app's id.
    pub const APP_ID: &str = "flynn-controller.app";
    /// The app's name.
    pub const APP_NAME: &str = "flynn-controller.app_name";
    /// The release's id.
    pub const RELEASE_ID: &str = "flynn-controller.release";
    /// The process type.
    pub const PROCESS_TYPE: &str = "flynn-controller.type";
    /// `true` on jobs of which every host has its own.
    pub const OMNI: &str = "flynn-controller.omni";
    /// `true` on jobs of the platform itself: they get a certificate.
    pub const SYSTEM_APP: &str = "flynn-system-app";
}

/// The share of a host that a job belongs to, with the relative weight of its CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Partition {
    /// The platform.
    System,
    /// Builds and the like.
    Background,
    /// Apps.
    #[default]
    User,
}

/// How to run a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ContainerConfig {
    /// Program and arguments; the image's when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment over the image's.
    #[serde(default, skip_serializing_if = "Env::is_empty")]
    pub env: Env,
    /// With a terminal.
    #[serde(default)]
    pub tty: bool,
    /// The terminal's first size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty_size: Option<TtySize>,
    /// Keep standard input open for an attached client.
    #[serde(default)]
    pub stdin: bool,
    /// Ports and the services behind them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Volumes to mount.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeBinding>,
    /// Directories or files of the host to mount. Only for jobs of the platform.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    /// Working directory; the image's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// User id; the image's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group id; the image's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// In the host's network namespace.
    #[serde(default)]
    pub host_network: bool,
    /// In the host's pid namespace.
    #[serde(default)]
    pub host_pid_namespace: bool,
    /// In the host's user namespace: root in the container is root on the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_user_namespace: bool,
    /// Keep no log.
    #[serde(default)]
    pub disable_log: bool,
    /// The cores that it runs on, `0-3,6`; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpuset: Option<String>,
    /// Capabilities, instead of the default set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linux_capabilities: Option<Vec<String>>,
}

/// A port that a process listens on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Port {
    /// The number; given by the host when 0 (5000 + index in a container).
    #[serde(default)]
    pub port: u16,
    /// `tcp` or `udp`.
    #[serde(default = "tcp")]
    pub proto: String,
    /// The service that it is registered as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Service>,
}

pub(super) fn tcp() -> String {
    "tcp".into()
}

/// A service that a port is registered as in discoverd.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Service {
    /// Lower-case letters, digits and dashes.
    pub name: String,
    /// Make the service when it is not there.
    #[serde(default)]
    pub create: bool,
    /// When the instance counts as healthy; a TCP connect when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<HealthCheck>,
    /// The process registers itself (appliances, whose instances carry metadata that only they know).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub self_registered: bool,
}

/// A health check. Times are in nanoseconds, as Flynn writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HealthCheck {
    /// `tcp`, `http`, `https` or `command`.
    #[serde(rename = "type", default = "tcp")]
    pub kind: String,
    /// For `command`: a program in the container and its arguments. It is well when it ends with status 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// How long one check may take; 2 s when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// Between checks; 2 s when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<u64>,
    /// Consecutive results that change the state; 2 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<u32>,
    /// Kill the job when it becomes unhealthy.
    #[serde(default)]
    pub kill_down: bool,
    /// How long it may take to become healthy at first; 10 s when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timeout: Option<u64>,
    /// Path, for HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Host header, for HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Text that the body must contain, for HTTP.
    #[serde(rename = "match", default, skip_serializing_if = "Option::is_none")]
    pub contains: Option<String>,
    /// Status wanted, for HTTP; 200 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
}

/// A volume in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct VolumeBinding {
    /// Where it is mounted.
    #[serde(rename = "target")]
    pub path: String,
    /// Which volume; made by the host when it is not there.
    #[serde(rename = "volume")]
    pub volume_id: String,
    /// Remove it when the job is gone.
    #[serde(default)]
    pub delete_on_stop: bool,
    /// How many bytes it may hold, at least [`MIN_LIMIT`](crate::volume::MIN_LIMIT). A volume that is there and may
    /// hold less is made larger, and one that may hold more stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
}

/// A path of the host in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Mount {
    /// In the container.
    pub location: String,
    /// On the host.
    pub target: String,
    /// Whether it can be written.
    #[serde(default)]
    pub writeable: bool,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Being made.
    #[default]
    Starting,
    /// Its process runs.
    Running,
    /// It ended with status 0, or was asked to stop.
    Done,
    /// It ended otherwise.
    Crashed,
    /// It could not be started.
    Failed,
}

impl JobState {
    /// Whether it is over.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Done | Self::Crashed | Self::Failed)
    }
}

/// Whose ids a job's users have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum UserNamespace {
    /// Its own: 0 to 65,535 in the container are as many of the host's from this one on, which nobody else has.
    FirstId(u32),
    /// The host's: root in the container is root on the host. Why that is so.
    Without(String),
}

/// A job and what has happened to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ActiveJob {
    /// The job. In answers of the API the secrets of its environment are redacted.
    pub job: Job,
    /// Where it stands.
    pub status: JobState,
    /// The host.
    pub host_id: String,
    /// Its own address, unless it is in the host's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal_ip: Option<Ipv4Addr>,
    /// Ports, as given to the process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// Whose ids its users have, once that is decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_namespace: Option<UserNamespace>,
    /// The pid of its first process, on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The supervisor's pid, on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervisor_pid: Option<u32>,
    /// When it was taken.
    pub created_at: Timestamp,
    /// When its process was started last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Exit status; 128 + n after signal n.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<i32>,
    /// Why it failed, where that is known: what, why, what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How often the supervisor has restarted it.
    #[serde(default)]
    pub restarts: u32,
    /// Killed by its memory limit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oom_killed: bool,
    /// Whether each registered service of it is healthy now.
    #[serde(default)]
    pub healthy: bool,
    /// Its processes stand still, and its services are not registered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct JobEvent {
    /// What happened.
    pub event: JobEventKind,
    /// To which.
    pub job_id: String,
    /// The job after it.
    pub job: ActiveJob,
}

/// Kinds of [`JobEvent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum JobEventKind {
    /// Sent once for each job at the start of a stream.
    Current,
    /// Taken.
    Create,
    /// Its process runs.
    Start,
    /// Health changed, or the supervisor restarted it.
    Update,
    /// Processes of it were killed for want of memory.
    Oom,
    /// Its quota keeps it from cores for more than a quarter of the time. Said once, until that ends.
    Throttled,
    /// Its processes wait for memory for more than a tenth of the time. Said once, until that ends.
    Pressure,
    /// It is over.
    Stop,
    /// It could not be started.
    Error,
    /// Forgotten: its directory is gone.
    Cleanup,
    /// Of a newer version.
    #[serde(other)]
    Other,
}
