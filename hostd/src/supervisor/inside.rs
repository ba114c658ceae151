//! Programs beside the job's own, in its container.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::run::receive;
use crate::cgroup::Group;
use crate::container::{Execution, FromInit, Place};
use crate::launch::Launch;
use crate::sys::{Polled, polled};

/// How long it may take until a program runs there.
const SET_UP: Duration = Duration::from_secs(2);

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
        // Who runs it there keeps the time, unless the container keeps that one from coming so far.
        let (word, said) = timeout(patience + SET_UP, self.run(place, args, patience))
            .await
            .map_err(|_| format!("{name} could not be started within {} ms", patience.as_millis()))?
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
        let launch = Launch {
            args: args.to_vec(),
            tty: false,
            stdin: false,
            ..Launch::clone(&self.launch)
        };
        let mut execution = self.start(&launch, place, Some(patience))?;
        let pipes = execution.pipes.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let outputs = [polled(pipes.stdout)?, polled(pipes.stderr)?];
        let (mut said, mut errors) = (Vec::new(), Vec::new());
        let mut open = [true; 2];
        let word = loop {
            tokio::select! {
                word = receive(execution.keeper()) => match word? {
                    Some(FromInit::Running) => {}
                    last => break last,
                },
                read = read(&outputs[0], &mut said), if open[0] => open[0] = read?,
                read = read(&outputs[1], &mut errors), if open[1] => open[1] = read?,
            }
        };
        // What it said last may still be in the pipes; what it has left behind may hold them open for ever.
        while open[0] && matches!(take(&outputs[0], &mut said), Ok(true)) {}
        while open[1] && matches!(take(&outputs[1], &mut errors), Ok(true)) {}
        said.extend(errors);
        Ok((word, said))
    }

    /// Starts the program that `launch` names.
    pub(super) fn start(
        &self,
        launch: &Launch,
        place: &Place,
        patience: Option<Duration>,
    ) -> io::Result<Execution> {
        let execution = Execution::create(launch, place, self.init.as_fd(), patience)?;
        self.group.add(execution.pid)?;
        execution.go()?;
        Ok(execution)
    }

    /// How the job's own program was started.
    pub(super) fn launch(&self) -> &Launch {
        &self.launch
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
