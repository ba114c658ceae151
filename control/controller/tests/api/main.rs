//! The controller's API on a real PostgreSQL.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;
mod database_loss;
mod deployments;
mod events;
mod hosts;
mod objects;
mod routes;
mod walls;

use common::cluster;

fn main() {
    let args = libtest_mimic::Arguments::from_args();
    let mut trials = objects::trials();
    trials.extend(routes::trials());
    trials.extend(events::trials());
    trials.extend(deployments::trials());
    trials.extend(hosts::trials());
    trials.extend(walls::trials());
    trials.extend(database_loss::trials());
    let conclusion = libtest_mimic::run(&args, trials);
    cluster::stop();
    conclusion.exit();
}
