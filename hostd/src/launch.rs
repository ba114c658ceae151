//! What a supervisor is told about its job: everything that the daemon has worked out, in one file beside the job.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use flynn_api::host::{HealthCheck, Partition, TtySize, UserNamespace};
use flynn_api::{Env, Meta};
use serde::{Deserialize, Serialize};

use crate::cgroup::Limits;
use crate::container::IDS;

/// The file's name in the job's directory.
pub const FILE: &str = "launch.json";

/// How to make and keep one job's container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// The form of this file.
    pub version: u32,
    /// The job.
    pub job_id: String,
    /// The process type, for log lines.
    pub process_type: String,
    /// The app's id, for log lines; empty for an operator's own job.
    #[serde(default)]
    pub app_id: String,
    /// Where its control socket is made.
    pub socket: PathBuf,
    /// Where the host is reached.
    pub host_ip: Ipv4Addr,
    /// Program and arguments.
    pub args: Vec<String>,
    /// The whole environment, but for what only the network's start tells (`EXTERNAL_IP`, `DISCOVERD`).
    pub env: Env,
    /// Working directory.
    pub working_dir: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Capabilities that the container has.
    pub capabilities: crate::caps::Set,
    /// Capabilities that were asked for by name: they reach a program that is not root as well.
    pub ambient: crate::caps::Set,
    /// With a terminal.
    pub tty: bool,
    /// Its first size.
    pub tty_size: Option<TtySize>,
    /// Standard input stays open for an attached client.
    pub stdin: bool,
    /// Keep no log.
    pub disable_log: bool,
    /// Mounted layers, lowest first.
    pub layers: Vec<PathBuf>,
    /// Volumes, mounts and certificates.
    pub binds: Vec<Bind>,
    /// The container's name for itself.
    pub hostname: String,
    /// In the host's network.
    pub host_network: bool,
    /// In the host's pid namespace.
    pub host_pid_namespace: bool,
    /// Whose ids its users have. One without, of an earlier version, has the host's.
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
    /// Confined by the host's AppArmor.
    #[serde(default)]
    pub apparmor: bool,
    /// Which share of the host it belongs to.
    pub partition: Partition,
    /// cgroup limits.
    pub limits: Limits,
    /// Bytes that the container may write beside its volumes; none for as many as there is room for.
    #[serde(default)]
    pub temp_disk: Option<u64>,
    /// Open files.
    pub max_files: u64,
    /// The ports, as the program is told them.
    pub ports: Vec<u16>,
    /// What to register in discoverd.
    pub services: Vec<Service>,
    /// The instances' labels.
    pub instance_meta: Meta,
    /// Seconds between SIGTERM and SIGKILL.
    pub stop_timeout: u32,
    /// Start it again when it ends.
    pub resurrect: bool,
}

/// A directory or file of the host in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub target: PathBuf,
    /// Whether it can be written.
    pub writable: bool,
    /// The ids in it are such as containers know, and not the host's.
    #[serde(default)]
    pub ids_of_container: bool,
}

/// One service of one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Make it when it is not there.
    pub create: bool,
    /// The instance's port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub proto: String,
    /// When the instance is healthy.
    pub check: Option<HealthCheck>,
}

impl Launch {
    /// Reads a job's launch file.
    pub fn read(job_dir: &Path) -> std::io::Result<Self> {
        let path = job_dir.join(FILE);
        crate::files::read_json(&path)?.ok_or_else(|| {
            std::io::Error::new(
                std::io::ErrorKind::NotFound,
                format!("{} is missing", path.display()),
            )
        })
    }

    /// The host's id of root in the container; none where it is the host's root.
    pub fn first_id(&self) -> Option<u32> {
        match self.user_namespace {
            Some(UserNamespace::FirstId(first)) => Some(first),
            _ => None,
        }
    }

    /// Refuses a user or group that the container has not.
    pub fn check_ids(&self) -> flynn_api::Result<()> {
        let beyond = [("config.uid", self.uid), ("config.gid", self.gid)];
        let beyond = beyond.iter().find(|(_, id)| *id >= IDS);
        match beyond.filter(|_| self.first_id().is_some()) {
            None => Ok(()),
            Some((field, id)) => Err(flynn_api::Error::invalid_field(
                field,
                format!(
                    "{id}, of the job or its image: the ids of a container end with {}; take one of those",
                    IDS - 1
                ),
            )),
        }
    }

    /// Whether the job was made for a client that attaches: its output then waits for that client.
    pub fn interactive(&self) -> bool {
        self.stdin || self.tty
    }
}
