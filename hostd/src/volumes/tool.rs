//! Runs the programs of filesystems.

use std::ffi::OsStr;
use std::io;
use std::process::{Command, Stdio};

/// Runs a program to its end and gives what it has said. `package` is named where the program is not there.
pub(super) fn run(program: &str, package: &str, args: &[&OsStr]) -> io::Result<String> {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| missing(program, package, &error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(program, &output.stderr))
}

/// The error of a program that could not be started.
pub(super) fn missing(program: &str, package: &str, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("{program} cannot be run ({error}): install the package {package}"),
    )
}

/// The error of a program that has failed, of the last that it said. What is full stays recognisable.
pub(super) fn failed(program: &str, stderr: &[u8]) -> io::Error {
    let text = String::from_utf8_lossy(stderr);
    let why = text
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("it does not say why");
    let kind = if why.contains("No space left") {
        io::ErrorKind::StorageFull
    } else {
        io::ErrorKind::Other
    };
    io::Error::new(kind, format!("{program}: {}", why.trim()))
}
