//! The controller: apps, releases, formations, jobs, routes, deployments and events, kept in PostgreSQL and served
//! over HTTP ([`flynn_api::controller`] names every call).
//!
//! In flow the wishes of people (through the CLI and whatever speaks the API) and the reports of the scheduler (how
//! jobs fare). Out flow formations to the scheduler, routes to the router and events to everyone, each as a snapshot
//! followed by changes.
//!
//! Invariants:
//! - Whatever was answered with success is committed. A change and the events that tell of it are one transaction.
//! - Event ids become visible in their order, so a stream resumes at an id without gap or duplicate.
//! - Releases and artifacts never change. A formation's generation grows with each change.
//! - A job's state goes forward only, unless its host has restarted it since; an app has at most one unfinished
//!   deployment: the database refuses the rest.
//! - What old and new jobs cannot share (a volume that is kept, ports of the host) goes over one job down, one job up,
//!   whatever the app's strategy; both formations then change in one transaction, and the scheduler starts the new job
//!   once the old one is down. So the platform's own database can be deployed, though it is away meanwhile.
//! - Deployments and scale requests are worked on in short transactions which hold a row lock: several controllers
//!   work side by side, each may be killed at any point, and another goes on from the last commit.
//! - Secrets leave only where they are needed: environments in `GET /releases/{id}` and towards the scheduler, keys
//!   of certificates in `GET /routes`; never in events, errors or logs.
//!
//! Inside: [`rules`] says what is allowed and [`deploy::planner`] what a deployment does next (both pure), [`data`]
//! holds all SQL, [`http`] the handlers, [`feed`] the stream of events, [`hosts`] the way to hosts.

mod data;
mod database;
mod deploy;
mod feed;
mod hosts;
mod http;
mod logs;
mod options;
mod rules;
mod service;

pub use options::Options;
pub use service::{Controller, run};
