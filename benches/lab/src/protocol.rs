//! What a lab's keeper is asked over its socket: one JSON object a line, one line in answer.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// A wish.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// How things are.
    Status,
    /// Starts a host that is off.
    Boot { host: u8 },
    /// Takes a host's power away.
    PowerCut { host: u8 },
    /// Starts a service that does not run.
    Start { host: u8, service: String },
    /// Sends a service's process a signal.
    Signal { host: u8, service: String, signal: i32 },
    /// Lets nothing pass from one host to another.
    Cut { from: u8, to: u8 },
    /// Undoes a cut.
    Mend { from: u8, to: u8 },
    /// Has these links, and no others, lose so many frames of a hundred: from, to, how many.
    Lose { links: Vec<(u8, u8, u8)> },
    /// Counts the frames that were lost.
    Count,
    /// Ends the lab.
    Down,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// It is done, and this is how things are.
    Done(LabStatus),
    /// It is not, and why.
    Failed(String),
}

/// How a lab is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LabStatus {
    /// Its name.
    pub name: String,
    /// Its hosts, in order.
    pub hosts: Vec<HostStatus>,
    /// The cuts there are: nothing passes from the first to the second.
    pub cuts: Vec<(u8, u8)>,
    /// Frames that were lost on purpose, when they were counted last.
    pub lost: u64,
    /// Where the machine's side of each forward listens, in the order of the configuration.
    pub forwards: Vec<SocketAddr>,
}

/// How a host is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostStatus {
    /// Its number, from 1.
    pub number: u8,
    /// How often it was powered off.
    pub power_cuts: u32,
    /// The machine's id of the host's process 1; none when it is off.
    pub init: Option<i32>,
    /// Each service's process by the machine's id; none when it does not run.
    pub services: BTreeMap<String, Option<i32>>,
}
