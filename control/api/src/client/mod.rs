//! Clients: one transport over TCP, TLS and Unix sockets, and a typed client per API.

pub mod attach;
pub mod blobs;
mod connect;
pub mod controller;
pub mod discovery;
mod events;
pub mod forward;
pub mod host;
mod hosts;
pub mod receive;
mod retry;
pub mod terminal;
mod transport;
mod watch;

pub use events::EventStream;
pub use retry::Retry;
pub use transport::{Body, Http, Upgraded, encode, full};
pub use watch::Watch;
