//! The wire types of every HTTP API of the platform, their typed clients, and the plumbing that all services share.
//!
//! No other crate defines a type that goes over the wire between components. The types keep Flynn's JSON, so that
//! Flynn's clients work unchanged; what is new is added beside it. Unknown fields are ignored when one component
//! reads another's answer (clusters of mixed versions), and refused where a person's input arrives
//! (`server::StrictJson`). For the same reason no event ends the stream of a reader that does not know its kind.
//!
//! - [`controller`], [`discovery`], [`host`], [`image`], [`network`], [`receive`], [`route`], [`sink`], [`sirenia`]: the types, one module per API.
//! - [`error`]: the one error body; [`spec`]: the jobs of a formation; [`resources`]: limits; [`virtual_address`]: what a service's number comes to.
//! - `tls` (feature `tls`): the cluster CA and the identities that it signs.
//! - `client` (feature `client`): transport over TCP, mutual TLS and Unix sockets, and a client per API.
//! - `tcp`: what connections are set to, at either end.
//! - `server` (feature `server`): listeners, extractors, event streams, logging and shutdown; `server::openapi` (feature
//!   `schema`): routes that describe themselves.

pub mod controller;
pub mod digest;
pub mod discovery;
pub mod error;
pub mod host;
pub mod image;
pub mod network;
pub mod receive;
pub mod redact;
pub mod resources;
pub mod route;
pub mod sink;
pub mod sirenia;
pub mod spec;
pub mod virtual_address;
pub mod volume;

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod server;
#[cfg(any(feature = "client", feature = "server"))]
pub mod tcp;
#[cfg(feature = "tls")]
pub mod tls;

pub use digest::Digest;
pub use error::{Error, ErrorCode, Result};

/// An environment: names to values, ordered so that its JSON is canonical.
pub type Env = std::collections::BTreeMap<String, String>;

/// Free-form labels of an object.
pub type Meta = std::collections::BTreeMap<String, String>;

/// The header by which a call says that it is the same as an earlier one with the same key, which may have been done.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Between the comments of a stream of events in which nothing happens.
#[cfg(any(feature = "client", feature = "server"))]
pub const HEARTBEAT: std::time::Duration = std::time::Duration::from_secs(15);
