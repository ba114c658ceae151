//! Programs beside the job's own, in its container.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::run::receive;
use crate::cgroup::Group;
use crate::container::{Execution, FromInit, Place};
use crate::launch::Launch;
use crate::sys::{Polled, polled};

/// So much of what a program says is kept.
const KEPT: usize = 1024;

/// The container of a run.
#[derive(Clone, Debug)]
pub(super) struct Inside {
    launch: Arc<Launch>,
    group: Group,
    init: Arc<OwnedFd>,
}

impl Inside {
    /// `init` is a pidfd of the container's init.
    pub(super) fn new(launch: &Launch, group: &Group, init: Arc<OwnedFd>) -> Self {
        Self {
            launch: Arc::new(launch.clone()),
            group: group.clone(),
            init,
        }
    }

    /// Runs a program to its end, which is to be 0; else gives why it was not, with the first of what the program said.
    pub(super) async fn succeeds(
        &self,
        place: &Place,
        args: &[String],
        patience: Duration,
    ) -> Result<(), String> {
        let name = args.first().map_or("", String::as_str);
        let (word, said) = self
            .run(place, args, patience)
            .await
            .map_err(|error| format!("{name} cannot be run in the container: {error}"))?;
        let said = String::from_utf8_lossy(&said);
        let said = said.trim();
        let why = match word {
            Some(FromInit::Exited(0)) => return Ok(()),
            Some(FromInit::Exited(status)) => format!("{name} ended with status {status}"),
            Some(FromInit::Failed(why)) => format!("{name}: {why}"),
            _ => format!("{name} was killed"),
        };
        Err(if said.is_empty() {
            why
        } else {
            format!("{why}: {said}")
        })
    }

    async fn run(
        &self,
        place: &Place,
        args: &[String],
        patience: Duration,
    ) -> io::Result<(Option<FromInit>, Vec<u8>)> {
        let execution = Execution::create(&self.launch, place, self.init.as_fd(), args, patience)?;
        self.group.add(execution.pid)?;
        let (socket, output) = execution.go()?;
        let (socket, output) = (polled(socket)?, polled(output)?);
        let mut said = Vec::new();
        let mut open = true;
        let word = loop {
            tokio::select! {
                word = receive(&socket) => break word?,
                read = read(&output, &mut said), if open => open = read?,
            }
        };
        // What it said last may still be in the pipe; what it has left behind may hold that open for ever.
        while open && matches!(take(&output, &mut said), Ok(true)) {}
        Ok((word, said))
    }
}

/// Reads what there is; whether there may be more.
async fn read(output: &Polled, said: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        let mut guard = output.readable().await?;
        if let Ok(read) = guard.try_io(|output| take(output, said)) {
            return read;
        }
    }
}

/// Reads once, keeps the beginning, and says whether that was not the end.
fn take(output: &Polled, said: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    let count = rustix::io::read(output.get_ref(), &mut buffer)?;
    let room = KEPT.saturating_sub(said.len());
    said.extend(&buffer[..count.min(room)]);
    Ok(count > 0)
}
