//! `flynn-host`: what owns one host of a cluster.
//!
//! **In**: jobs over the host API ([`flynn_api::host`]), image layers, the host's subnet. **Out**: running containers,
//! their logs, their state as events, their services in discoverd.
//!
//! Two kinds of process do this. The **daemon** ([`daemon`]) serves the API and prepares what a job needs: layers,
//! volumes, an address. One **supervisor** per job ([`supervisor`]), this same binary executed anew, makes the
//! [`container`], holds its pipes, registers its services and notes its end.
//!
//! [`logs`] are kept by the supervisor and sent to sinks by the daemon; [`cgroup`] has a job's limits and what it uses.
//! [`download`] brings files here whole or not at all, [`repository`] says which of them are a release. [`confine`] is where
//! programs run that read what strangers made. [`floating`] keeps addresses at a host that is well.
//!
//! Invariants:
//! - The daemon can be killed at any moment: no container notices, no log line and no exit status is lost. A daemon
//!   that starts finds the supervisors by their sockets.
//! - A supervisor has one thread: it forks without exec.
//! - A container dies with its supervisor, and a job whose supervisor is gone is over.
//! - A job's directory is the only record of it. What cannot be read there is set aside and said, and harms no other job.
//! - Layers are verified when they arrive, and never change; none that is in use or named by an image goes.

mod apparmor;
pub mod bootstrap;
pub mod caps;
pub mod cgroup;
pub mod commands;
pub mod config;
pub mod confine;
pub mod container;
pub mod control;
pub mod daemon;
pub mod download;
pub mod encryption;
mod ext4;
pub mod files;
pub mod floating;
pub mod identities;
pub mod launch;
pub mod layers;
pub mod leases;
pub mod logs;
mod notices;
pub mod paths;
pub mod prepare;
pub mod repository;
pub mod status;
pub mod supervisor;
mod sys;
#[cfg(test)]
mod testing;
mod tool;
pub mod volumes;
pub mod web;
