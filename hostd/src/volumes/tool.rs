//! Runs the programs of filesystems.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long a program may take for what does not grow with its volume, on a disk that is very busy.
pub(super) const SHORT: Duration = Duration::from_mins(2);

/// How long one that was killed may take to go, and what it has said to arrive.
const GOING: Duration = Duration::from_secs(5);

/// How much of what a program says is kept.
const SAID: u64 = 4 << 20;

/// How long a program may take that goes over the tables of so many bytes.
pub(super) fn long_for(bytes: u64) -> Duration {
    SHORT + Duration::from_secs(bytes >> 30)
}

/// A filesystem's program, and the package that is named where it is not there.
pub(super) struct Tool {
    pub(super) program: &'static str,
    pub(super) package: &'static str,
}

impl Tool {
    /// Runs it to its end and gives what it has said. When that takes longer than `limit` it is killed.
    pub(super) fn run(&self, args: &[&OsStr], limit: Duration) -> io::Result<String> {
        let mut child = Command::new(self.program)
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| self.missing(&error))?;
        let (stdout, stderr) = (listen(child.stdout.take()), listen(child.stderr.take()));
        // What it has left to others to say is not waited for.
        let said = |from: Receiver<Vec<u8>>| from.recv_timeout(GOING).unwrap_or_default();
        match self.wait(child, limit)? {
            status if status.success() => Ok(String::from_utf8_lossy(&said(stdout)).into_owned()),
            _ => Err(self.failed(&said(stderr))),
        }
    }

    fn wait(&self, mut child: Child, limit: Duration) -> io::Result<ExitStatus> {
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        if ends(&pidfd, limit)? {
            return child.wait();
        }
        let _ = child.kill();
        // In the kernel no signal may reach it. Then somebody else waits for it.
        if ends(&pidfd, GOING)? {
            let _ = child.wait();
        } else {
            thread::spawn(move || child.wait());
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "{} was not done after {} s: the disk is very slow, or does not answer",
                self.program,
                limit.as_secs()
            ),
        ))
    }

    /// The error of the program when that could not be started.
    pub(super) fn missing(&self, error: &io::Error) -> io::Error {
        io::Error::new(
            error.kind(),
            format!(
                "{} cannot be run ({error}): install the package {}",
                self.program, self.package
            ),
        )
    }

    /// The error of the program when that has failed, of the last that it said. What is full stays recognisable.
    pub(super) fn failed(&self, stderr: &[u8]) -> io::Error {
        let text = String::from_utf8_lossy(stderr);
        let why = text
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it does not say why");
        let kind = if why.contains("No space left") || why.contains("out of space") {
            io::ErrorKind::StorageFull
        } else {
            io::ErrorKind::Other
        };
        io::Error::new(kind, format!("{}: {}", self.program, why.trim()))
    }
}

/// Reads all that comes, and keeps the start of it.
fn listen(from: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (done, said) = channel();
    if let Some(mut from) = from {
        thread::spawn(move || {
            let mut text = Vec::new();
            let _ = (&mut from).take(SAID).read_to_end(&mut text);
            let _ = io::copy(&mut from, &mut io::sink());
            let _ = done.send(text);
        });
    }
    said
}

/// Whether a process ends within this time.
fn ends(pidfd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHELL: Tool = Tool {
        program: "sh",
        package: "dash",
    };

    fn sh(script: &str, limit: Duration) -> io::Result<String> {
        SHELL.run(&["-c", script].map(OsStr::new), limit)
    }

    #[test]
    fn what_a_program_says_is_given_or_explains_its_end() {
        assert_eq!(sh("echo a; echo b >&2", SHORT).unwrap(), "a\n");
        let error = sh("echo first >&2; echo No space left on device >&2; exit 3", SHORT).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(error.to_string(), "sh: No space left on device");
        // More than a pipe holds.
        assert_eq!(sh("head -c 300000 /dev/zero", SHORT).unwrap().len(), 300_000);
        let none = Tool {
            program: "no-such-program",
            package: "it",
        };
        let error = none.run(&[], SHORT).unwrap_err().to_string();
        assert!(error.contains("install the package it"), "{error}");
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let error = sh("exec sleep 1000", Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
