//! The controller's API on a real PostgreSQL.

mod common;
mod objects;

use common::cluster;

fn main() {
    let args = libtest_mimic::Arguments::from_args();
    let mut trials = objects::trials();
    trials.sort_by(|a, b| a.name().cmp(b.name()));
    let conclusion = libtest_mimic::run(&args, trials);
    cluster::stop();
    conclusion.exit();
}
