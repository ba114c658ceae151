//! `cargo xtask up`: a cluster of one host on this machine, with an app on it.

use crate::setup::{self, Need};
use crate::{build, cluster, image, lab, status, ui};
use anyhow::{Context, Result};
use std::collections::BTreeSet;

/// How to bring it up.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install what is missing without asking (also with CI=true in the environment)
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    profile: build::Profile,
}

/// Brings it up, or says how it is.
pub(crate) fn run(args: &Args) -> Result<()> {
    lab::need_root()?;
    setup::provide(&[Need::Build, Need::Images, Need::Lab], args.yes)?;
    let profile = args.profile;
    if lab::status().is_some() {
        ui::step("It is up already; `cargo xtask down` first has it made anew");
        status::run(profile)?;
        cluster::what_next(profile);
        return Ok(());
    }
    build::run(profile)?;
    image::make(&BTreeSet::from(image::Name::ALL), profile)?;
    if lab::dir().exists() {
        ui::timed("Removing what a crashed lab left", || lab::down(false))?;
    }
    ui::timed("Booting a host", || {
        lab::up(profile).and_then(|()| cluster::wait_for_daemon())
    })?;
    bring_up(profile).context("the host is left as it is, to be looked at; `cargo xtask down` removes it")?;
    status::run(profile)?;
    cluster::what_next(profile);
    println!("{}", cluster::url());
    Ok(())
}

fn bring_up(profile: build::Profile) -> Result<()> {
    let made = ui::timed("Making a cluster of it", cluster::bootstrap)?;
    cluster::add(&made, profile)?;
    ui::timed("Deploying the example app", || cluster::deploy(profile))
}
