//! Running the machine's tools.

use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};

/// Runs a tool; what it says is shown when it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {name}; `cargo xtask setup` installs it"))?;
    if !output.status.success() {
        bail!(
            "{name} failed: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
