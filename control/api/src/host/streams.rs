//! What goes to and from a running job: its output, attached terminals, other programs, ports.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Env;

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TtySize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub lines: u16,
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
    /// From the job: how many bytes of input it has taken since it last said so, four bytes big-endian.
    pub const TAKEN: u8 = 8;
    /// The longest payload.
    pub const MAX: usize = 1 << 20;
    /// How much input may be under way (RFC 4254, section 5.2, has such windows): what is sent behind it, signals and the news that
    /// a client has left among that, does not wait for the program to read. Whoever sends more before [`TAKEN`] makes room for it has
    /// all that follows wait.
    pub const WINDOW: usize = 1 << 20;
}
