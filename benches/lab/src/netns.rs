//! Doing things inside a network namespace, and the two tools that set one up.

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

/// Makes a network namespace that lives as long as somebody has its descriptor, or is inside.
pub fn make() -> Result<OwnedFd> {
    let made = std::thread::spawn(|| {
        crate::unshare(UnshareFlags::NEWNET).context("cannot make a network namespace; this needs root")?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    });
    made.join()
        .unwrap_or_else(|_| bail!("a thread that makes a network namespace panicked"))
}

/// Runs `work` on a thread of its own inside a network namespace. What it starts or opens is in there too.
pub fn inside<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .context("cannot enter the network namespace")?;
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| bail!("a thread in the network namespace panicked"))
    })
}

/// Runs lines of `ip` commands.
pub fn ip(lines: &str) -> Result<()> {
    feed(Command::new("ip").args(["-batch", "-"]), lines)
}

/// What `ip` says.
pub fn output(arguments: &[&str]) -> Result<String> {
    said("ip", arguments)
}

/// The nftables rules that there are, with their counters.
pub fn nft_rules() -> Result<String> {
    said("nft", &["list", "ruleset"])
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot start {program}; `cargo xtask setup` installs it"))?;
    if !output.status.success() {
        bail!(
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs an nftables script, all of it or nothing.
pub fn nft(script: &str) -> Result<()> {
    feed(Command::new("nft").args(["-f", "-"]), script)
}

fn feed(command: &mut Command, input: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}; `cargo xtask setup` installs it"))?;
    child
        .stdin
        .take()
        .context("no stdin")?
        .write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{name} failed: {}\n{}\non\n{input}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
