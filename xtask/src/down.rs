//! `cargo xtask down`: ends what `up` brought up, however far it came, and sees that nothing is left.

use crate::{cluster, lab, ui};
use anyhow::Result;

/// What to end.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also what tests that were killed have left
    #[arg(long)]
    all: bool,
}

/// Ends it.
pub(crate) fn run(args: &Args) -> Result<()> {
    lab::need_root()?;
    if !lab::tool_exists() {
        ui::step("Nothing is up, and nothing was ever built to be");
        return Ok(());
    }
    ui::timed("Ending the lab", || lab::down(args.all))?;
    // It holds the key of a cluster that is no more.
    let _ = std::fs::remove_file(cluster::flynnrc());
    ui::note("no process, mount, namespace, cgroup, pin or loop device of it is left");
    Ok(())
}
