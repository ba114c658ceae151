//! Descriptors of pipes and terminals under tokio.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use flynn_api::host::{LogStream, TtySize};
use tokio::io::Interest;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

use super::output::Output;
use crate::container::Pipes;
use crate::logs::Framer;
use crate::sys::{Polled, polled};

/// What is read from the program at once: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// Ctrl-D: the end of input, on a terminal.
pub(super) const END_OF_TRANSMISSION: u8 = 4;

/// The tasks that carry one run's streams.
pub(super) struct Streams {
    readers: Vec<JoinHandle<()>>,
    writer: Option<JoinHandle<()>>,
}

/// What clients have sent and the program has not read. It outlives a run.
pub(super) type Input = Arc<Mutex<mpsc::Receiver<Vec<u8>>>>;

impl Streams {
    /// Carries a program's pipes.
    pub(super) fn of_pipes(pipes: Pipes, output: &Arc<Output>, input: &Input) -> io::Result<Self> {
        let read =
            |fd, stream| Ok::<_, io::Error>(tokio::spawn(carry(polled(fd)?, stream, Arc::clone(output))));
        let readers = vec![
            read(pipes.stdout, LogStream::Stdout)?,
            read(pipes.stderr, LogStream::Stderr)?,
        ];
        let writer = pipes
            .stdin
            .map(|fd| Ok::<_, io::Error>(tokio::spawn(feed_pipe(polled(fd)?, Arc::clone(input)))));
        Ok(Self {
            readers,
            writer: writer.transpose()?,
        })
    }

    /// Carries a program's terminal.
    pub(super) fn of_terminal(terminal: OwnedFd, output: &Arc<Output>, input: &Input) -> io::Result<Self> {
        let terminal = polled(terminal)?;
        output.set_terminal(Some(Arc::clone(terminal.get_ref())));
        let other = polled(terminal.get_ref().try_clone()?)?;
        let reader = tokio::spawn(carry(terminal, LogStream::Stdout, Arc::clone(output)));
        let writer = tokio::spawn(feed_terminal(other, Arc::clone(input)));
        Ok(Self {
            readers: vec![reader],
            writer: Some(writer),
        })
    }

    /// Waits until all output has been read: at most this long, for what else may hold the pipes open.
    pub(super) async fn finish(mut self, patience: std::time::Duration) {
        self.stop_input();
        let all = async {
            for reader in &mut self.readers {
                let _ = reader.await;
            }
        };
        let _ = tokio::time::timeout(patience, all).await;
    }

    fn stop_input(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.abort();
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.stop_input();
        self.readers.iter().for_each(JoinHandle::abort);
    }
}

async fn carry(fd: Polled, stream: LogStream, output: Arc<Output>) {
    let mut framer = Framer::default();
    let mut chunk = Vec::new();
    loop {
        let Ok(mut guard) = fd.readable().await else { break };
        // Only while there is something: supervisors are many, and mostly idle.
        if chunk.is_empty() {
            chunk = vec![0; CHUNK];
        }
        match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut chunk)?)) {
            // A terminal whose other side is closed fails rather than ends.
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(count)) => output.publish(stream, &mut framer, &chunk[..count]).await,
            Err(_would_block) => {
                chunk = Vec::new();
                output.rest();
            }
        }
    }
    output.end_of(stream, &mut framer);
}

async fn feed_pipe(fd: Polled, input: Input) {
    let mut input = input.lock().await;
    while let Some(bytes) = input.recv().await {
        if bytes.is_empty() || write_all(&fd, &bytes).await.is_err() {
            break;
        }
    }
    // The pipe is closed here, which is the end of input; what still comes is for nobody.
    drop(fd);
    while input.recv().await.is_some() {}
}

async fn feed_terminal(fd: Polled, input: Input) {
    let mut input = input.lock().await;
    while let Some(bytes) = input.recv().await {
        let bytes = if bytes.is_empty() {
            vec![END_OF_TRANSMISSION]
        } else {
            bytes
        };
        if write_all(&fd, &bytes).await.is_err() {
            break;
        }
    }
}

/// Writes all of it.
pub(super) async fn write_all(fd: &Polled, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = fd
            .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?))
            .await?;
        bytes = &bytes[count..];
    }
    Ok(())
}

/// Sets a terminal's size.
pub(super) fn set_size(terminal: impl AsFd, size: TtySize) {
    let size = rustix::termios::Winsize {
        ws_row: size.lines,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // A terminal whose other side is closed has none.
    let _ = rustix::termios::tcsetwinsize(terminal, size);
}
