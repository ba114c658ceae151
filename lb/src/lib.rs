//! The router: HTTP and TCP from outside to the instances of services.
//!
//! In: clients' connections; the controller's routes with their certificates; discoverd's instances. Out: requests to
//! instances, answers to clients, counters.
//!
//! - Pure: [`table`] (which route), [`balance`] (which instance, and whether again), [`headers`] (what is passed on),
//!   [`ports`] (which TCP routes are served).
//! - [`proxy`] carries one request, over connections of [`upstream`] that [`backend`] keeps; [`tunnel`] and [`tcp`]
//!   carry bytes; the kernel steers what comes to a TCP route's port to one listener, or each has its own. [`serve`] accepts, HTTP/1.1 and, by ALPN, HTTP/2, as many
//!   as [`slots`] has places for; [`tls`] has the certificates.
//! - `activity` and `upload` say what goes on in connections and bodies, by what `body` notes.
//! - [`sync`] follows controller and discoverd, [`store`] keeps the last good state on disk, [`router`] is what all
//!   of them share.
//!
//! Invariants:
//! - What was known last is served for ever: nobody's absence takes a route or an instance away.
//! - A request is sent twice only where that is safe ([`proxy`]).
//! - One route's fault (its certificate, its port, its instances) is no other route's.
//! - Heads, streams, connections and retries are bounded; bodies stream, and who reads slowly slows the sender.

mod activity;
pub mod backend;
pub mod balance;
mod body;
mod files;
pub mod headers;
pub mod l4;
pub mod listen;
pub mod metrics;
pub mod ports;
pub mod proxy;
pub mod router;
mod run;
pub mod serve;
pub mod slots;
pub mod store;
pub mod sync;
pub mod table;
pub mod tcp;
pub mod tls;
pub mod tunnel;
mod upload;
pub mod upstream;

pub use run::{Options, Sockets, run, serve as serve_on};
