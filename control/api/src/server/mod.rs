//! What every service shares: listeners, extractors, event streams, logging and shutdown.

pub mod disk;
mod events;
mod json;
mod keys;
mod listener;
#[cfg(feature = "schema")]
pub mod openapi;
mod places;
mod process;

pub use events::{Events, OrEvents, events, wants_events};
pub use json::{Json, MAX_BODY, Query, StrictJson};
pub use keys::Keys;
pub use listener::{Farewell, Listener, Peer, serve, serve_until};
pub use places::{Place, Places};
pub use process::{init_logging, shutdown};
pub use tokio_util::sync::CancellationToken;
