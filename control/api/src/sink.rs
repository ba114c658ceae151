//! Log sinks of a host: where its jobs' logs are sent.
//!
//! What is sent are messages of RFC 5424 over TCP, framed as RFC 6587 says: HOSTNAME is the host's id, APP-NAME the app,
//! PROCID `<process type>.<job id>`, MSGID the stream (`ID1` standard output, `ID2` standard error, `ID3` the platform's
//! own words about the job). The structured data are `[flynn run="…" seq="…"]`: within a job, `run` and then `seq` grow
//! from record to record. A record may come twice, with the same two numbers, where a connection was lost; who has seen a
//! later one of the job drops it. `more="true"` says that a long line goes on in the next record of the same job and
//! stream, `dropped="n"` that n records before this one are lost.
//!
//! A log aggregator says on the same connection what it has taken: lines `<PROCID> <run> <seq>`, each for all records of
//! that job up to this one. What it has not said so of is sent again on the next connection, and is not removed
//! before the host's bound. Syslog servers say nothing: what their host has acknowledged by TCP for some seconds counts.

use serde::{Deserialize, Serialize};

/// The port of syslog and of log aggregators.
pub const PORT: u16 = 514;

/// Where logs are sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Sink {
    /// Its name on the host.
    #[serde(default)]
    pub id: String,
    /// Who is there.
    pub kind: SinkKind,
    /// A [`SyslogConfig`] or a [`LogAggregatorConfig`], by the kind.
    #[cfg_attr(feature = "schema", schemars(schema_with = "config_schema"))]
    pub config: serde_json::Value,
    /// The host itself, or its operator, keeps it: it is none of the controller's.
    #[serde(default)]
    pub host_managed: bool,
}

#[cfg(feature = "schema")]
fn config_schema(schemas: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let kinds = [
        schemas.subschema_for::<SyslogConfig>(),
        schemas.subschema_for::<LogAggregatorConfig>(),
    ];
    schemars::json_schema!({ "anyOf": kinds })
}

/// Who takes logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SinkKind {
    /// A syslog server.
    Syslog,
    /// The platform's log aggregator.
    Logaggregator,
}

/// A syslog server, and how it wants its messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SyslogConfig {
    /// `syslog://host:port` or `syslog+tls://host:port`; port 514 unless given.
    pub url: String,
    /// What stands in front of each line, and a blank: `{{.ID}}` is the job's id, `{{index .Metadata "name"}}` a label.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prefix: String,
    /// APP-NAME is the app's id, and not its name.
    #[serde(default)]
    pub use_ids: bool,
    /// Take whatever certificate the server shows.
    #[serde(default)]
    pub insecure: bool,
    /// Send the structured data, by which records that come twice are known.
    #[serde(default = "yes")]
    pub structured_data: bool,
    /// How messages are told apart.
    #[serde(default)]
    pub format: SyslogFormat,
    /// The certificates (PEM) that the server's is to be signed by; the system's unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
}

fn yes() -> bool {
    true
}

/// How messages are told apart on a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SyslogFormat {
    /// Each behind its length.
    #[default]
    Rfc6587,
    /// Each in front of a newline.
    Newline,
}

/// A log aggregator: one address, or whoever leads a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LogAggregatorConfig {
    /// `host:port`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub addr: String,
    /// The name of a service in discoverd, whose leader's address counts, at port 514.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service: String,
}

/// A sink and how it does. Counters are those since the daemon was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SinkStatus {
    /// The sink.
    #[serde(flatten)]
    pub sink: Sink,
    /// Whether there is a connection.
    #[serde(default)]
    pub connected: bool,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Connections that were made.
    #[serde(default)]
    pub connections: u64,
    /// Records that were sent, those sent again included.
    #[serde(default)]
    pub lines: u64,
    /// Bytes that were sent.
    #[serde(default)]
    pub bytes: u64,
    /// Records that were removed from the host's disk before the sink took them.
    #[serde(default)]
    pub dropped_lines: u64,
    /// Bytes on the host's disk that are yet to be sent.
    #[serde(default)]
    pub waiting_bytes: u64,
}
