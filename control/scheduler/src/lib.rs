//! The scheduler: from formations (what the controller wants) to jobs on hosts.
//!
//! In: the controller's formations, the hosts that discoverd lists, and each host's jobs. Out: jobs started and
//! stopped on hosts, and each job's state told to the controller. It keeps nothing of its own: whatever it must
//! remember (how often a job was restarted, whose place it took, which volumes it has) is on the jobs themselves, so
//! that whoever leads next goes on.
//!
//! The core is pure: [`view`] puts together what is known, [`plan`] says what is to be done, [`place`] where,
//! [`backoff`] when, [`start`] with which job, [`report`] what the controller is told. It is simulated over 500 seeds.
//!
//! The shell around it: `lead` (only the leader acts), `formations` and `hosts` (what is known), `act` (what is done),
//! `policy` (who may speak to whom, told to the hosts), `status`. Each follows something for ever; `run` plans whenever something has changed, and on a timer.
//!
//! Invariants: see [`plan`]. Above all: what is not known for certain is left alone.

mod act;
pub mod backoff;
mod formations;
mod hosts;
mod lead;
pub mod place;
pub mod plan;
mod policy;
pub mod report;
mod run;
mod shared;
pub mod start;
mod status;
pub mod view;

#[cfg(test)]
mod simulation;

pub use lead::SERVICE;
pub use run::{Options, run, serve};
