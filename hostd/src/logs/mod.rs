//! A job's log: records ([`record`]) in the segments ([`segment`]) of its directory `log/`.
//!
//! The job's supervisor writes ([`Writer`]), the daemon reads ([`Follower`] for people, [`sink`] for log aggregators and
//! syslog); they share nothing but the files. Files only grow, and are removed as a whole.
//!
//! A log is bounded. The newest [`KEPT`] bytes are there for whoever asks; what a sink has yet to take stays beyond them
//! up to [`HELD`] bytes, or for as long as the disk is not nearly full. What is lost (no room, no sink in time) is
//! counted and said, and never blocks the job. A job that writes faster than its sinks take, while half of what may be
//! held waits, is slowed down to [`SLOWEST`], and no further: so a burst of any length reaches a fast sink whole, and a
//! slow sink holds up nobody.

mod frame;
mod reader;
pub mod record;
pub mod segment;
pub mod sink;
mod writer;

pub use frame::Framer;
pub use reader::{Follower, Reader, Span};
pub use writer::{Bounds, Writer};

/// Where a segment ends and the next begins, in bytes.
const SEGMENT: u64 = 4 << 20;

/// What is kept of a log for whoever asks, in bytes.
const KEPT: u64 = 20 << 20;

/// What is kept at most of a log that a sink has yet to take, in bytes.
const HELD: u64 = 128 << 20;

/// Bytes a second of the log that a job may always write.
const SLOWEST: u64 = 64 << 20;

#[cfg(test)]
mod tests;
