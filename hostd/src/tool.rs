//! Runs the programs of filesystems.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long a program may take for what does not grow with its volume, on a disk that is very busy.
pub(crate) const SHORT: Duration = Duration::from_mins(2);

/// How long one that was killed may take to go, and what it has said to arrive.
const GOING: Duration = Duration::from_secs(5);

/// How much of what a program says is kept.
const SAID: usize = 4 << 20;

/// How long a program may take that goes over the tables of so many bytes.
pub(crate) fn long_for(bytes: u64) -> Duration {
    SHORT + Duration::from_secs(bytes >> 30)
}

/// A filesystem's program, and the package that is named where it is not there.
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

impl Tool {
    /// Runs it to its end and gives what it has said. When that takes longer than `limit` it is killed.
    pub(crate) fn run(&self, args: &[&OsStr], limit: Duration) -> io::Result<String> {
        let mut child = Command::new(self.program)
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| self.missing(&error))?;
        let pipes = [
            child.stdout.take().map(OwnedFd::from),
            child.stderr.take().map(OwnedFd::from),
        ];
        let mut said = pipes.map(|pipe| Said {
            pipe,
            text: Vec::new(),
        });
        let status = self.wait(child, &mut said, limit)?;
        // What it has left to others to say is not waited for.
        listen(&mut said, None, GOING)?;
        let [stdout, stderr] = said.map(|said| said.text);
        if status.success() {
            Ok(String::from_utf8_lossy(&stdout).into_owned())
        } else {
            Err(self.failed(&stderr))
        }
    }

    fn wait(&self, mut child: Child, said: &mut [Said; 2], limit: Duration) -> io::Result<ExitStatus> {
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        if listen(said, Some(&pidfd), limit)? {
            return child.wait();
        }
        let _ = child.kill();
        // In the kernel no signal may reach it. Then somebody else waits for it.
        if listen(said, Some(&pidfd), GOING)? {
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
    pub(crate) fn missing(&self, error: &io::Error) -> io::Error {
        io::Error::new(
            error.kind(),
            format!(
                "{} cannot be run ({error}): install the package {}",
                self.program, self.package
            ),
        )
    }

    /// The error of the program when that has failed, of the last that it said. What is full stays recognisable.
    pub(crate) fn failed(&self, stderr: &[u8]) -> io::Error {
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

/// What comes out of a pipe; the start of it is kept.
struct Said {
    /// None once nothing can come any more.
    pipe: Option<OwnedFd>,
    text: Vec<u8>,
}

impl Said {
    /// Reads what there is: the pipe is ready.
    fn read(&mut self) {
        let mut piece = [0; 16 << 10];
        let Some(pipe) = &self.pipe else { return };
        match rustix::io::read(pipe, &mut piece) {
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => self.pipe = None,
            Ok(length) => {
                let room = SAID - self.text.len();
                self.text.extend_from_slice(&piece[..length.min(room)]);
            }
        }
    }
}

/// Reads what comes until a process ends or, where none is given, until nothing can come any more. Whether that was within
/// this time. By no thread: supervisors do this as well, and clone themselves after it, which only who is alone may.
fn listen(said: &mut [Said; 2], pidfd: Option<&OwnedFd>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let pipes = said.iter().filter_map(|said| said.pipe.as_ref());
        let mut fds: Vec<_> = pipes
            .chain(pidfd)
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        if fds.is_empty() {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&timeout)) {
            Err(Errno::INTR) => continue,
            Ok(0) => return Ok(false),
            ready => drop(ready?),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        let open = said.iter_mut().filter(|said| said.pipe.is_some());
        // Each with its own: the process, which is last, is not taken.
        let pairs: Vec<_> = open.zip(ready.by_ref()).collect();
        pairs
            .into_iter()
            .filter(|(_, is_ready)| *is_ready)
            .for_each(|(said, _)| said.read());
        if pidfd.is_some() && ready.next() == Some(true) {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
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
