//! Has all crates brought here before anything is built: a registry that fails for a minute then costs a minute, and
//! not the build of whatever is reached just then.

use crate::{exec, ui, workspace};
use anyhow::{Context, Result};
use std::time::Duration;

/// How long to wait before each further try.
const PAUSES: [Duration; 4] = [
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(30),
    Duration::from_mins(1),
];

/// Brings the crates of the workspace, and of the eBPF programs, which are a workspace of their own.
pub(crate) fn all() -> Result<()> {
    ui::timed("Crates", || {
        for workspace in [workspace::root(), &workspace::root().join("ebpf/programs")] {
            let mut cargo = exec::cargo();
            cargo
                .args(["fetch", "--locked", "--quiet"])
                .current_dir(workspace);
            let mut pauses = PAUSES.into_iter();
            while let Err(error) = exec::run(&mut cargo) {
                let pause = pauses.next().ok_or(error).context("crates cannot be fetched")?;
                ui::note(&format!("once more in {} s", pause.as_secs()));
                std::thread::sleep(pause);
            }
        }
        Ok(())
    })
}
