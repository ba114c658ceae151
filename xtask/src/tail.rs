//! The last lines of what a program wrote, kept so that they can be said again where a reader looks first: at the end.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::exec;
use anyhow::{Context, Result};

/// How much is kept.
const LINES: usize = 60;
const LETTERS: usize = 400;

/// The last lines that were added, each cut where it is too long.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<String>);

impl Tail {
    /// Adds a line in place of the oldest, once there are enough.
    pub(crate) fn add(&mut self, line: &str) {
        if self.0.len() == LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.trim_end().chars().take(LETTERS).collect());
    }

    /// The last of some lines.
    pub(crate) fn of(text: &str) -> Self {
        let mut tail = Self::default();
        for line in text.lines() {
            tail.add(line);
        }
        tail
    }

    pub(crate) fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// A program failed. Its last lines are no part of the message, for they were just shown.
#[derive(Debug)]
pub(crate) struct Failed {
    message: String,
    pub(crate) tail: Tail,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failed {}

/// Runs a program as [`exec::run`] does, and keeps its last lines for the error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let (status, tail) = relay(command, |_| ())?;
    if status.success() {
        return Ok(());
    }
    let message = format!("`{}` failed: {status}", exec::shown(command));
    Err(Failed { message, tail }.into())
}

/// Runs a program, passes what it writes on to stderr line by line, and shows each line to `seen`.
pub(crate) fn relay(command: &mut Command, seen: impl Fn(&str) + Sync) -> Result<(ExitStatus, Tail)> {
    let mut child = exec::tied(command)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| exec::not_started(command))?;
    let (stdout, stderr) = (
        child.stdout.take().context("no stdout")?,
        child.stderr.take().context("no stderr")?,
    );
    let tail = Mutex::new(Tail::default());
    let line = |line: &str| {
        seen(line);
        tail.lock().unwrap_or_else(PoisonError::into_inner).add(line);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| pass_on(stdout, line));
        pass_on(stderr, line);
    });
    let status = child.wait()?;
    Ok((status, tail.into_inner().unwrap_or_else(PoisonError::into_inner)))
}

fn pass_on(stream: impl Read, seen: impl Fn(&str)) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        // A closed stderr is no reason not to look.
        let _ = std::io::stderr().write_all(&line);
        seen(&String::from_utf8_lossy(&line));
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_both_streams_are_kept_and_all_are_seen() {
        let seen = Mutex::new(0);
        let mut command = Command::new("sh");
        command.args(["-c", "seq 100; seq 101 103 >&2; exit 3"]);
        let (status, tail) = relay(&mut command, |_| *seen.lock().unwrap() += 1).unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(*seen.lock().unwrap(), 103);
        let lines: Vec<&str> = tail.lines().collect();
        assert_eq!(lines.len(), LINES);
        assert!(lines.contains(&"100") || lines.contains(&"103"), "{lines:?}");
    }

    #[test]
    fn long_lines_are_cut() {
        let tail = Tail::of(&"ü".repeat(LETTERS + 1));
        assert_eq!(tail.lines().next(), Some("ü".repeat(LETTERS).as_str()));
    }
}
