//! The replication state machine of the database appliances: who is primary, and when that may change.
//!
//! It is pure: no clock, no I/O, no randomness. A shell (the appliance) tells it what it sees ([`Event`]): the service in
//! discoverd as a whole, how a write or a change of the database went, that time has passed. It answers with what to
//! do ([`Action`]): write the cluster's [`State`] by compare-and-swap, bring the database into a role. It is level
//! triggered: each answer follows from the latest observation alone, so that events may be lost, late or repeated.
//!
//! This release knows singletons: one peer alone, its state written frozen.
//!
//! Invariants, which `tests/simulation.rs` checks over many schedules:
//! - The state is written before the database is made. A database is made by the peer that the state names, and by nobody
//!   else, so a database that is there while no state ever was is never taken for a new cluster's.
//! - Whoever the state names as primary stays so: a second peer, a stale state or a lost answer changes nothing.
//! - A peer that is not primary runs no database.
//! - The service's leader is the primary's present address once writes get through.

mod machine;
mod problem;
mod role;

pub use flynn_api::sirenia::{Freeze, Role, STATE_VERSION, State};
pub use machine::{Action, Config, Event, Machine, Service, Stored, WriteOutcome};
pub use problem::Problem;
pub use role::role_of;
