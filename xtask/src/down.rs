//! `cargo xtask down`: ends what `up` brought up, however far it came, and sees that nothing is left.

use crate::lab::{self, Lab};
use crate::ui;
use anyhow::Result;

/// What to end.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also what tests that were killed have left
    #[arg(long, conflicts_with = "name")]
    all: bool,
    #[command(flatten)]
    lab: Lab,
}

/// Ends it.
pub(crate) fn run(args: &Args) -> Result<()> {
    lab::need_root()?;
    if !args.lab.tool_exists() {
        ui::step("Nothing is up, and nothing was ever built to be");
        return Ok(());
    }
    ui::timed("Ending the lab", || args.lab.down(args.all))?;
    ui::note("no process, mount, namespace, cgroup, pin or loop device of it is left");
    Ok(())
}
