//! `cargo xtask up`: a cluster of one host on this machine, with an app on it.

use crate::lab::Lab;
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
    lab: Lab,
    #[command(flatten)]
    ports: lab::Ports,
    #[command(flatten)]
    profile: build::Profile,
}

/// Brings it up, or says how it is.
pub(crate) fn run(args: &Args) -> Result<()> {
    lab::need_root()?;
    setup::provide(&[Need::Build, Need::Images, Need::Lab], args.yes)?;
    let (lab, profile) = (&args.lab, args.profile);
    let down = format!("`cargo xtask down{}`", lab.option());
    if let Some(status) = lab.status() {
        ui::step(&format!("It is up already; {down} first has it made anew"));
        status::show(lab, profile)?;
        cluster::what_next(lab, profile, status.ports()?);
        return Ok(());
    }
    build::run(profile)?;
    image::make(&BTreeSet::from(image::Name::ALL), profile)?;
    // What a crashed one left.
    lab.down(false)?;
    let booted = ui::timed("Booting a host", || {
        let booted = lab.up(profile, args.ports)?;
        cluster::wait_for_daemon(lab).map(|()| booted)
    })?;
    let ports = booted.ports()?;
    bring_up(lab, profile, ports)
        .with_context(|| format!("the host is left as it is, to be looked at; {down} removes it"))?;
    status::show(lab, profile)?;
    cluster::what_next(lab, profile, ports);
    println!("{}", cluster::url(ports));
    Ok(())
}

fn bring_up(lab: &Lab, profile: build::Profile, ports: lab::Ports) -> Result<()> {
    let made = ui::timed("Making a cluster of it", || cluster::bootstrap(lab))?;
    cluster::add(lab, &made, profile, ports)?;
    ui::timed("Deploying the example app", || {
        cluster::deploy(lab, profile, ports)
    })
}
