//! The host API (port 1113 and `/run/flynn/host.sock`): jobs of one host.
//!
//! | call | what |
//! | --- | --- |
//! | `GET /host/status` | [`HostStatus`] |
//! | `GET /host/jobs` | `{id: `[`ActiveJob`]`}`; with `Accept: text/event-stream` a stream of [`JobEvent`] |
//! | `GET /host/jobs/{id}` | [`ActiveJob`] |
//! | `PUT /host/jobs/{id}` | starts a [`Job`]; answers when its supervisor has taken it |
//! | `DELETE /host/jobs/{id}` | stops it; answers when it is stopping |
//! | `PUT /host/jobs/{id}/signal/{n}` | sends signal `n` to its process |
//! | `PUT /host/jobs/{id}/limits` | changes limits of the running job, [`Resources`] with some of [`Resources::LIVE`] |
//! | `PUT /host/jobs/{id}/discoverd-deregister` | takes its instances out of discoverd, ahead of a stop |
//! | `GET /host/jobs/{id}/log?lines=n&follow=true` | a stream of [`LogLine`] |
//! | `POST /attach` | upgrade `flynn-attach/0` after an [`AttachRequest`]; frames of [`attach`] |
//! | `GET /host/network` | [`NetworkStatus`] |
//! | `GET /host/network/flows` | `[`[`Flow`]`]`: the established TCP connections of this host's containers |
//! | `GET /host/network/services` | `[`[`ServiceStatus`]`]`: which virtual addresses lead to which instances |
//! | `PUT /host/tags` | sets the tags for placement, all of them |
//! | `PUT /host/drain`, `DELETE` | has the host's jobs go to other hosts; no longer |
//! | `POST /host/update` | has another program go on with the daemon's work ([`Update`], [`Updated`]) |
//! | `GET /host/layers` | `[`[`StoredLayer`](crate::image::StoredLayer)`]` |
//! | `GET /sinks`, `PUT` and `DELETE /sinks/{id}` | [`SinkStatus`](crate::sink::SinkStatus)es; has logs sent to a [`Sink`](crate::sink::Sink), or no more |
//! | `GET /openapi.json` | all of this as an OpenAPI document |
//! | `GET /metrics` | counters and gauges of jobs, of the network and of log sinks, in Prometheus' text format |
//! | `PUT /host/layers/{digest}`, `GET` | puts a squashfs layer into the store; fetches it |
//! | `POST /host/layers/gc` | removes layers that nobody needs ([`LayerGc`](crate::image::LayerGc)) |
//! | `POST /host/layers/verify` | reads all layers, sets damaged ones aside ([`VerifiedLayers`](crate::image::VerifiedLayers)) |
//! | `GET /storage/providers`, `POST` | [`Provider`](crate::volume::Provider)s; adds a [`NewProvider`](crate::volume::NewProvider) |
//! | `DELETE /storage/providers/{id}` | takes one without volumes off the list |
//! | `POST /storage/providers/{id}/volumes` | makes a [`NewVolume`](crate::volume::NewVolume) |
//! | `GET /storage/volumes`, `GET` and `DELETE /storage/volumes/{id}` | [`Volume`](crate::volume::Volume)s |
//! | `PUT /storage/volumes/{id}/snapshot`, `…/fork` | makes a [`Copy`](crate::volume::Copy) of it |
//! | `PUT /storage/volumes/{id}/rollback` | makes it what it was ([`Rollback`](crate::volume::Rollback)) |
//! | `PUT /storage/volumes/{id}/resize` | has it hold more, or less ([`Resize`](crate::volume::Resize)) |
//! | `PUT /storage/volumes/{id}/decommission` | sets it aside, under another id |
//! | `GET /storage/volumes/{id}/send?from=` | a snapshot, or what differs from an earlier one, as a stream |
//! | `POST /storage/providers/{id}/receive` | takes such a stream in |
//! | `POST /storage/gc` | removes what was decommissioned ([`Gc`](crate::volume::Gc)) |

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::image::Artifact;
use crate::resources::Resources;
use crate::{Env, Meta};

/// The port of the host API.
pub const PORT: u16 = 1113;

/// The root-only Unix socket of the host API.
pub const SOCKET: &str = "/run/flynn/host.sock";

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

/// What is to go on with the daemon's work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Update {
    /// A file on the host, by its absolute path, which is put in the place of the daemon's program if it can take over. When
    /// absent, what is in that place by now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binary: Option<String>,
}

/// Another daemon serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Updated {
    /// The version of the one before.
    pub from: String,
    /// Its own version.
    pub to: String,
    /// Its process.
    pub pid: u32,
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

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TtySize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub lines: u16,
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

fn tcp() -> String {
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

/// The stream that a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The supervisor's own words about the job.
    Init,
}

/// One line of a job's output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LogLine {
    /// When it was read.
    pub timestamp: Timestamp,
    /// From where.
    pub stream: LogStream,
    /// Without its line end. Bytes that are not UTF-8 are replaced.
    pub msg: String,
    /// The job.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub job_id: String,
    /// The process type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub process_type: String,
}

/// Something that not every kernel has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct KernelFeature {
    /// Its name in the kernel's own words.
    pub name: String,
    /// Whether it is there, and so is used.
    pub present: bool,
    /// What it is used for, or what is done without it.
    pub detail: String,
}

/// What a host is and how it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostStatus {
    /// Its id: letters, digits and underscores; no dash.
    pub id: String,
    /// The daemon's pid.
    pub pid: u32,
    /// Version of `flynn-host`.
    pub version: String,
    /// Where its API is reached: `address:1113`.
    pub url: String,
    /// Tags for placement.
    #[serde(default)]
    pub tags: Meta,
    /// It is given no jobs, and those that it has go to other hosts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Its subnet, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// The gateway address of its containers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// Cores, in thousandths.
    pub cpu: u64,
    /// Memory in bytes.
    pub memory: u64,
    /// Free bytes in the state directory.
    pub disk_free: u64,
    /// What this host cannot do, and why.
    #[serde(default)]
    pub notices: Vec<String>,
    /// What the kernel has, and has not, of what the network and containers make use of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<KernelFeature>,
    /// The kernel's boot id.
    pub boot_id: String,
}

/// Asks to be attached to a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AttachRequest {
    /// The job.
    pub job_id: String,
    /// Streams wanted: `stdin`, `stdout`, `stderr`.
    #[serde(default)]
    pub flags: Vec<String>,
    /// The terminal's size now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty_size: Option<TtySize>,
    /// Lines of the past to send first (0 = none).
    #[serde(default)]
    pub lines: u32,
}

/// The protocol of connections that [`AttachRequest`] and [`ExecRequest`] upgrade to: frames of [`attach`].
pub const ATTACH_PROTOCOL: &str = "flynn-attach/0";

/// The protocol of connections that [`ForwardRequest`] upgrades to: the bytes of the port's, both ways.
pub const FORWARD_PROTOCOL: &str = "flynn-forward/0";

/// A connection to a port of a running job: body of `POST /host/jobs/{id}/forward`, which upgrades. It is made in the job's own
/// network, and so reaches programs that listen on its loopback device alone, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ForwardRequest {
    /// The TCP port.
    pub port: u16,
}

/// Another program in a running job's container: body of `POST /host/jobs/{id}/exec`, which upgrades as attaching does. It has
/// the job's environment, limits and rights.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ExecRequest {
    /// The program and its arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Variables beside the job's.
    #[serde(default, skip_serializing_if = "Env::is_empty")]
    pub env: Env,
    /// Where it begins; where the job's program did when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Whose it is; as the job's program when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// With a terminal.
    #[serde(default)]
    pub tty: bool,
    /// The terminal's size now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty_size: Option<TtySize>,
    /// Input follows; else it has none.
    #[serde(default)]
    pub stdin: bool,
}

/// The frames of an attached connection: one byte of kind, four of length (big-endian), the payload.
pub mod attach {
    /// Standard output of the job.
    pub const STDOUT: u8 = 1;
    /// Standard error of the job.
    pub const STDERR: u8 = 2;
    /// Standard input; empty means end of file.
    pub const STDIN: u8 = 3;
    /// To the job: a [`TtySize`](super::TtySize) as JSON.
    pub const RESIZE: u8 = 4;
    /// To the job: a signal number, four bytes big-endian.
    pub const SIGNAL: u8 = 5;
    /// From the job, last: its exit status, four bytes big-endian.
    pub const EXIT: u8 = 6;
    /// From the job, last: why there is no exit status, as text.
    pub const ERROR: u8 = 7;
    /// The longest payload.
    pub const MAX: usize = 1 << 20;
}

/// The network of a host. Counters are those since the data plane was begun.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkStatus {
    /// The host's subnet.
    pub subnet: String,
    /// The gateway address.
    pub gateway: Option<Ipv4Addr>,
    /// The cluster's network.
    #[serde(default)]
    pub network: String,
    /// The IPv6 network beside it.
    #[serde(default)]
    pub network6: String,
    /// Containers of this host with their counters.
    pub endpoints: Vec<EndpointStatus>,
    /// The hosts of the cluster, this one among them.
    #[serde(default)]
    pub hosts: Vec<NetworkHost>,
    /// Containers of other hosts.
    #[serde(default)]
    pub remote: Vec<RemoteEndpoint>,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// How full the data plane's maps are.
    #[serde(default)]
    pub maps: Vec<MapFill>,
}

/// One container's address and counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EndpointStatus {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its job.
    pub job_id: String,
    /// The name of its app; empty for an operator's own job.
    #[serde(default)]
    pub app: String,
    /// Its process type.
    #[serde(default)]
    pub process_type: String,
    /// The number by which the data plane knows its app.
    #[serde(default)]
    pub identity: u32,
    /// Of the platform: others reach only `open_ports`.
    #[serde(default)]
    pub system: bool,
    /// Only hosts and the apps on its list reach it.
    #[serde(default)]
    pub isolated: bool,
    /// Ports with a service: `5432/tcp`.
    #[serde(default)]
    pub open_ports: Vec<String>,
    /// Bytes a second that it may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_limit: Option<u64>,
    /// Bytes a second that it may be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_limit: Option<u64>,
    /// From the container.
    pub tx_packets: u64,
    /// From the container.
    pub tx_bytes: u64,
    /// To the container.
    pub rx_packets: u64,
    /// To the container.
    pub rx_bytes: u64,
    /// Packets from the container that were dropped, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tx_drops: BTreeMap<String, u64>,
    /// Packets to the container that were dropped on its host, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rx_drops: BTreeMap<String, u64>,
}

/// A host of the cluster, as another sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkHost {
    /// Its id.
    pub id: String,
    /// Where it is reached.
    pub address: Ipv4Addr,
    /// Its subnet.
    pub subnet: String,
    /// It is the one that says so.
    #[serde(default)]
    pub own: bool,
    /// How packets get there: `own`, `encrypted`, `tunnel`, `direct`, or `none` where there is no route.
    pub way: String,
    /// The neighbour that they are handed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<Ipv4Addr>,
    /// The interface that they leave by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// How many containers it has.
    pub endpoints: u64,
    /// When it renewed its lease last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewed_at: Option<Timestamp>,
}

/// A container of another host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RemoteEndpoint {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its host.
    pub host_id: String,
    /// The number by which the data plane knows its app.
    pub identity: u32,
}

/// A connection, or a flow of datagrams, of a container of this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Flow {
    /// `tcp` or `udp`. Datagrams are seen where a socket is connected, or where they came by a route by port: as long as
    /// there was one within the last minute.
    #[serde(default = "tcp")]
    pub protocol: String,
    /// The container's job.
    pub job_id: String,
    /// The name of its app; empty for an operator's own job.
    pub app: String,
    /// Its process type.
    pub process_type: String,
    /// The container's service that the connection came to; absent where the container opened it, or has none there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The container's side.
    pub local: std::net::SocketAddr,
    /// The other.
    pub remote: std::net::SocketAddr,
    /// Where the client sent it to, if it came by a route by port and is balanced in the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<std::net::SocketAddr>,
    /// TCP's smoothed round-trip time, in microseconds.
    pub rtt_us: u32,
    /// Segments that the container sent again.
    pub retransmits: u32,
    /// Bytes that the other side has acknowledged over TCP.
    pub tx_bytes: u64,
    /// Bytes that came over TCP.
    pub rx_bytes: u64,
}

/// A service as sockets of this host's jobs find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ServiceStatus {
    /// Its name; empty where only the data plane still knows its number.
    pub service: String,
    /// Its virtual addresses.
    pub addresses: crate::discovery::VirtualAddresses,
    /// Where sockets that go there get to.
    pub instances: Vec<ServiceInstance>,
}

/// One instance of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ServiceInstance {
    /// The index of its registration.
    pub index: u64,
    /// Where it is.
    pub address: std::net::IpAddr,
    /// The IPv6 address of the same container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<std::net::Ipv6Addr>,
    /// It is the leader.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leader: bool,
}

/// How full a map of the data plane is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MapFill {
    /// Its name.
    pub name: String,
    /// Entries that it has.
    pub entries: u64,
    /// Entries that there is room for.
    pub room: u64,
}

/// Tells the daemon about its network: sent by bootstrap once the host holds a subnet lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkConfig {
    /// The cluster's network, `100.100.0.0/16`.
    pub network: String,
    /// This host's part of it, `100.100.1.0/24`.
    pub subnet: String,
    /// The IPv6 network beside it.
    #[serde(default = "crate::discovery::NetworkLeases::default_network6")]
    pub network6: String,
}
