//! `cargo xtask status`: how what `up` brought up is doing.

use crate::lab::Lab;
use crate::{build, cluster, exec, ui};
use anyhow::{Result, bail};

/// Of what.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    lab: Lab,
    #[command(flatten)]
    profile: build::Profile,
}

/// Says how it is; fails when nothing is up.
pub(crate) fn run(args: &Args) -> Result<()> {
    show(&args.lab, args.profile)
}

/// The same for `up`.
pub(crate) fn show(lab: &Lab, profile: build::Profile) -> Result<()> {
    let Some(status) = lab.status() else {
        bail!("nothing is up; `cargo xtask up{}` brings it up", lab.option())
    };
    let ports = status.ports()?;
    ui::step("Status");
    for host in &status.hosts {
        let power = if host.init.is_some() { "on" } else { "off" };
        ui::note(&format!("{:<12} {power}", format!("host{}", host.number)));
        for (name, pid) in &host.services {
            let state = pid.map_or_else(
                || "not running".to_owned(),
                |pid| format!("running, process {pid}"),
            );
            ui::note(&format!("  {name:<12} {state}"));
        }
    }
    let answer = cluster::answer(ports).unwrap_or_default();
    let line = answer.lines().next().unwrap_or("no answer");
    ui::note(&format!("{:<12} {line}", cluster::url(ports)));
    if lab.flynnrc().exists() {
        // The platform's own account; a cluster that does not answer has been told of above.
        if let Err(error) = exec::run(cluster::flynn(lab, profile).args(["apps"])) {
            ui::error(&error);
        }
    }
    Ok(())
}
