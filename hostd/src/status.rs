//! What has happened to a job, as its supervisor writes it down.

use std::net::Ipv4Addr;
use std::path::Path;

use flynn_api::host::JobState;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::control::PROTOCOL;
use crate::files;

/// The file's name in the job's directory.
pub const FILE: &str = "status.json";

/// A file beside it: the job is to stop, whatever that says.
const STOP: &str = "stop";

/// The last known state of a job. Written by the daemon before the supervisor is there and after it is gone, and by
/// the supervisor in between.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The form of this file.
    pub version: u32,
    /// Where it stands.
    pub state: JobState,
    /// When it was taken.
    pub created_at: Timestamp,
    /// When its process was started last.
    pub started_at: Option<Timestamp>,
    /// When it was over.
    pub ended_at: Option<Timestamp>,
    /// The pid of the container's first process.
    pub pid: Option<i32>,
    /// The supervisor.
    pub supervisor: Option<ProcessId>,
    /// The version of [`control`](crate::control) that it speaks. The first ones did not say.
    #[serde(default = "first")]
    pub protocol: u32,
    /// The boot in which all that was.
    pub boot_id: String,
    /// The container's own address.
    pub address: Option<Ipv4Addr>,
    /// Exit status; 128 + n after signal n.
    pub exit_status: Option<i32>,
    /// Why it failed.
    pub error: Option<String>,
    /// How often it was started again.
    pub restarts: u32,
    /// Killed by its memory limit.
    pub oom_killed: bool,
    /// Whether all its services are healthy.
    pub healthy: bool,
    /// Its processes stand still.
    #[serde(default)]
    pub paused: bool,
    /// Somebody asked it to stop: it is not started again, whatever happens.
    pub stop_requested: bool,
}

fn first() -> u32 {
    1
}

impl Status {
    /// Of a job that was just taken.
    pub fn new(created_at: Timestamp, boot_id: String) -> Self {
        Self {
            version: 1,
            state: JobState::Starting,
            created_at,
            started_at: None,
            ended_at: None,
            pid: None,
            supervisor: None,
            protocol: PROTOCOL,
            boot_id,
            address: None,
            exit_status: None,
            error: None,
            restarts: 0,
            oom_killed: false,
            healthy: false,
            paused: false,
            stop_requested: false,
        }
    }

    /// Notes the end.
    pub fn end(&mut self, state: JobState, now: Timestamp) {
        self.state = state;
        self.ended_at = Some(now);
        self.pid = None;
        self.healthy = false;
        self.paused = false;
    }

    /// Writes it so that it survives a crash at any moment. What only says how a job does that goes on survives those of
    /// processes alone: when the power is cut, the job is over whatever was said, and it is started again or not by
    /// what was said before.
    pub fn write(&self, job_dir: &Path) -> std::io::Result<()> {
        let path = job_dir.join(FILE);
        let bytes = serde_json::to_vec(self)?;
        if self.state.is_terminal() || self.stop_requested {
            files::write_atomic(&path, &bytes)
        } else {
            files::write_for_boot(&path, &bytes)
        }
    }

    /// Reads it; none when it was never written. One that a power cut has emptied was of a job that went on, in an
    /// earlier boot.
    pub fn read(job_dir: &Path) -> std::io::Result<Option<Self>> {
        let status = match std::fs::metadata(job_dir.join(FILE)) {
            Ok(file) if file.len() == 0 => return Ok(Some(Self::lost(job_dir))),
            _ => files::read_json(&job_dir.join(FILE))?,
        };
        Ok(status.map(|status| Self::with_wish(status, job_dir)))
    }

    fn with_wish(mut self, job_dir: &Path) -> Self {
        self.stop_requested |= job_dir.join(STOP).exists();
        self
    }

    /// Has the job be one that is to stop, for all who read its status. It is for a time without a supervisor, which writes
    /// the status itself; nobody takes it back.
    pub fn request_stop(job_dir: &Path) -> std::io::Result<()> {
        files::write_atomic(&job_dir.join(STOP), b"")
    }

    /// What is to be taken for the status of a job that was taken and has none which can be read: after a power cut. The
    /// job went on, in an earlier boot.
    pub fn lost(job_dir: &Path) -> Self {
        let file = std::fs::metadata(job_dir.join(FILE)).or_else(|_| std::fs::metadata(job_dir));
        let when = file.and_then(|file| file.modified()).ok();
        let when = when.and_then(|when| Timestamp::try_from(when).ok());
        Self::new(when.unwrap_or_default(), String::new()).with_wish(job_dir)
    }
}

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid.
    pub pid: i32,
    /// When it was started, in clock ticks since boot.
    pub start: u64,
}

impl ProcessId {
    /// Of this process.
    pub fn own() -> Self {
        let pid = std::process::id().cast_signed();
        Self {
            pid,
            start: start_time(pid).unwrap_or_default(),
        }
    }

    /// Of a process that is there.
    pub fn of(pid: i32) -> Option<Self> {
        let start = start_time(pid)?;
        Some(Self { pid, start })
    }

    /// Kills it, and no other that may have its pid by now.
    pub fn kill(self) -> std::io::Result<()> {
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        let pid = Pid::from_raw(self.pid).ok_or(std::io::ErrorKind::NotFound)?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        if !self.is_alive() {
            return Err(std::io::ErrorKind::NotFound.into());
        }
        Ok(pidfd_send_signal(process, Signal::KILL)?)
    }

    /// Whether the process is still there (a zombie is not).
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.start)
    }
}

/// The start time of a living process: field 22 of its `stat`, after the name, which may hold anything.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The kernel's id of the present boot.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_a_power_cut_has_emptied_is_of_an_earlier_boot() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Status::read(dir.path()).unwrap(), None);
        let status = Status::new(Timestamp::UNIX_EPOCH, "this".into());
        status.write(dir.path()).unwrap();
        assert_eq!(Status::read(dir.path()).unwrap(), Some(status));
        std::fs::write(dir.path().join(FILE), "").unwrap();
        let read = Status::read(dir.path()).unwrap().unwrap();
        assert_eq!(
            (read.state, read.boot_id.as_str(), read.stop_requested),
            (JobState::Starting, "", false)
        );
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(Status::read(dir.path()).is_err());
    }

    #[test]
    fn knows_the_living_from_the_dead() {
        let own = ProcessId::own();
        assert!(own.start > 0 && own.is_alive());
        assert!(
            !ProcessId {
                start: own.start + 1,
                ..own
            }
            .is_alive()
        );
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        while start_time(pid).is_some() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }
}
