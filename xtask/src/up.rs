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
    ports: lab::Ports,
    #[command(flatten)]
    profile: build::Profile,
}

/// Brings it up, or says how it is.
pub(crate) fn run(args: &Args) -> Result<()> {
    lab::need_root()?;
    setup::provide(&[Need::Build, Need::Images, Need::Lab], args.yes)?;
    let profile = args.profile;
    if let Some(status) = lab::status() {
        ui::step("It is up already; `cargo xtask down` first has it made anew");
        status::run(profile)?;
        cluster::what_next(profile, status.ports()?);
        return Ok(());
    }
    build::run(profile)?;
    image::make(&BTreeSet::from(image::Name::ALL), profile)?;
    // What a crashed one left.
    lab::down(false)?;
    let lab = ui::timed("Booting a host", || {
        lab::up(profile, args.ports).and_then(|lab| cluster::wait_for_daemon().map(|()| lab))
    })?;
    let ports = lab.ports()?;
    bring_up(profile, ports)
        .context("the host is left as it is, to be looked at; `cargo xtask down` removes it")?;
    status::run(profile)?;
    cluster::what_next(profile, ports);
    println!("{}", cluster::url(ports));
    Ok(())
}

fn bring_up(profile: build::Profile, ports: lab::Ports) -> Result<()> {
    let made = ui::timed("Making a cluster of it", cluster::bootstrap)?;
    cluster::add(&made, profile, ports)?;
    ui::timed("Deploying the example app", || cluster::deploy(profile, ports))
}
