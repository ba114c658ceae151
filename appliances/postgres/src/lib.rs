//! The PostgreSQL appliance: keeps one database server and its place in the cluster.
//!
//! It runs as the container's process (`flynn-system postgres`), with the server of Debian's packages below it. Flows in: its
//! environment ([`Options`]), the service in discoverd (peers, leader, cluster state), the data volume. Flows out: the
//! server on port 5432, its own registration in discoverd, the cluster's state by compare-and-swap over mutual TLS, and
//! status on port 5433 ([`flynn_api::sirenia`]). What to do is decided by [`flynn_sirenia`]; here it is done:
//!
//! - [`peer`]: tells the state machine what happens, and does what it says
//! - [`discovery`]: the registration, the watch, the writes
//! - [`database`]: one server as an actor: made, started, stopped, brought into a role
//! - [`volume`], [`config`], [`server`], [`admin`], [`status`]: its parts
//!
//! Invariants:
//! - One process at a time uses a volume: its lock is held by this process and, through their standard input, by every
//!   process of the server. Who gets it knows that whatever else lies there is left over, `postmaster.pid` included.
//! - A database is there whole or not at all: it is made beside its place and moved there when it is on disk.
//! - The administrator's password is in this process's memory and, as a SCRAM verifier, in the database: nowhere else.
//! - Killed at any point, the next start goes on from what is on disk; PostgreSQL's own recovery does the rest.

mod admin;
mod config;
mod database;
mod discovery;
mod error;
mod options;
mod peer;
mod server;
mod status;
mod user;
mod volume;

pub use error::Error;
pub use options::{IDENTITY_LABEL, Options, SERVICE};
pub use peer::run;
