//! A cluster in a lab, as cluster tests and benchmarks use it: booted from what `cargo xtask build` and
//! `cargo xtask image` made, driven by the command line's binary, asked through the lab's forwarders.
//!
//! Flows in: the target directory ([`Artifacts`]). Flows out: a [`Platform`], which ends with its value and leaves
//! nothing. Invariant: nothing here knows how the platform works inside; it uses the commands, addresses and paths
//! that a person would.

mod artifacts;
pub mod connections;
mod engine;
mod load;
mod platform;
pub mod traffic;
mod wait;

pub use artifacts::Artifacts;
pub use engine::Engine;
pub use load::{Failure, Load, Report};
pub use platform::{Answer, Bootstrapped, DOMAIN, FLYNN_HOST, IMAGES, PROGRAM, Platform};
pub use wait::until;
