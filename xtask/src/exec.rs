//! Running other programs, with errors that say which one failed and what to do.

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Has a program die with us: whoever kills xtask means all that it does.
pub(crate) fn tied(command: &mut Command) -> &mut Command {
    let die = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: it makes one system call and touches no memory.
    #[expect(unsafe_code, reason = "there is no safe form")]
    unsafe {
        command.pre_exec(die)
    }
}

/// Runs a program with its output on our stderr, so that stdout stays for results.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = tied(command)
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| not_started(command))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a program quietly; what it wrote is shown only when it fails. Returns what it wrote to stdout.
pub(crate) fn quiet(command: &mut Command) -> Result<Vec<u8>> {
    let Output {
        status,
        stdout,
        stderr,
    } = tied(command)
        .stdin(Stdio::null())
        .output()
        .with_context(|| not_started(command))?;
    if !status.success() {
        bail!(
            "`{}` failed: {status}\n{}{}",
            shown(command),
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        );
    }
    Ok(stdout)
}

/// The path of a program on `PATH` or among cargo's own.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([cargo_home().join("bin"), "/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

/// Where cargo keeps its tools.
fn cargo_home() -> PathBuf {
    std::env::var_os("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from)
}

/// The home of who calls.
pub(crate) fn home() -> PathBuf {
    std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from)
}

/// The cargo that started us, else the one on `PATH`.
pub(crate) fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(crate::workspace::root());
    if std::env::var_os("CARGO_NET_RETRY").is_none() {
        // Over a minute of tries, for whatever is built within builds as well.
        command.env("CARGO_NET_RETRY", "10");
    }
    if is_ci() {
        // Nothing there is built twice, and nobody steps through it.
        command
            .env("CARGO_INCREMENTAL", "0")
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
    }
    command
}

/// Whether a machine calls, of which nobody can ask anything.
pub(crate) fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| ci == "true")
}

/// A command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let name = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    std::iter::once(name)
        .chain(command.get_args().map(|arg| arg.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

/// What to say of a program that could not be started.
pub(crate) fn not_started(command: &Command) -> String {
    let program = command.get_program().to_string_lossy().into_owned();
    format!("cannot start `{program}`; `cargo xtask setup` installs what is missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named_with_the_way_to_get_it() {
        for outcome in [
            run(&mut Command::new("no-such-tool")),
            quiet(&mut Command::new("no-such-tool")).map(drop),
        ] {
            let error = outcome.unwrap_err().to_string();
            assert!(
                error.contains("`no-such-tool`") && error.contains("cargo xtask setup"),
                "{error}"
            );
        }
    }
}
