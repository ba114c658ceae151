//! Descriptors of pipes and terminals under tokio.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use flynn_api::host::{LogStream, TtySize};
use futures::future::join_all;
use tokio::io::Interest;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::input::Piece;
use super::output::Output;
use crate::container::Pipes;
use crate::logs::Framer;
use crate::sys::{Polled, polled};

/// What is read from the program at once: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// How long is waited in all for more from a pipe, and how much there may be, when everything in the container is dead: what is
/// in it, which a program can have be a megabyte, is all, unless somebody else has it open.
const LAST_WORDS: Duration = Duration::from_secs(2);
const LAST_BYTES: usize = 2 << 20;

/// Ctrl-D: the end of input, on a terminal.
pub(super) const END_OF_TRANSMISSION: u8 = 4;

/// The tasks that carry one run's streams.
pub(super) struct Streams {
    readers: Vec<JoinHandle<()>>,
    writer: Option<JoinHandle<()>>,
    /// The container is dead.
    over: CancellationToken,
}

/// What clients have sent and the program has not read. It outlives a run.
pub(super) type Input = Arc<Mutex<mpsc::UnboundedReceiver<Piece>>>;

impl Streams {
    /// Carries a program's pipes.
    pub(super) fn of_pipes(pipes: Pipes, output: &Arc<Output>, input: &Input) -> io::Result<Self> {
        let over = CancellationToken::new();
        let read = |fd, stream| {
            let carry = carry(polled(fd)?, stream, Arc::clone(output), over.clone());
            Ok::<_, io::Error>(tokio::spawn(carry))
        };
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
            over,
        })
    }

    /// Carries a program's terminal.
    pub(super) fn of_terminal(terminal: OwnedFd, output: &Arc<Output>, input: &Input) -> io::Result<Self> {
        let terminal = polled(terminal)?;
        output.set_terminal(Some(Arc::clone(terminal.get_ref())));
        let other = polled(terminal.get_ref().try_clone()?)?;
        let over = CancellationToken::new();
        let carry = carry(terminal, LogStream::Stdout, Arc::clone(output), over.clone());
        let writer = tokio::spawn(feed_terminal(other, Arc::clone(input)));
        Ok(Self {
            readers: vec![tokio::spawn(carry)],
            writer: Some(writer),
            over,
        })
    }

    /// Waits until all output has been read and is on its way, the container being dead. When nobody takes anything of it for
    /// `patience`, who is waited for is let go; the log gets it all.
    pub(super) async fn finish(mut self, output: &Output, patience: Duration) {
        self.stop_input();
        self.over.cancel();
        let readers = std::mem::take(&mut self.readers);
        let mut all = join_all(readers);
        loop {
            let before = output.passed_on();
            if timeout(patience, &mut all).await.is_ok() {
                return;
            }
            if output.passed_on() == before {
                output.let_clients_go();
            }
        }
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

async fn carry(fd: Polled, stream: LogStream, output: Arc<Output>, over: CancellationToken) {
    let mut framer = Framer::default();
    let mut chunk = Vec::new();
    let (mut left, mut patience) = (LAST_BYTES, LAST_WORDS);
    while left > 0 {
        let waiting = Instant::now();
        let silence = async {
            over.cancelled().await;
            sleep(patience).await;
        };
        let guard = tokio::select! {
            biased;
            guard = fd.readable() => guard,
            () = silence => break,
        };
        let Ok(mut guard) = guard else { break };
        // Only while there is something: supervisors are many, and mostly idle.
        if chunk.is_empty() {
            chunk = vec![0; CHUNK];
        }
        match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut chunk)?)) {
            // A terminal whose other side is closed fails rather than ends.
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(count)) => {
                if over.is_cancelled() {
                    left = left.saturating_sub(count);
                    patience = patience.saturating_sub(waiting.elapsed());
                }
                output.publish(stream, &mut framer, &chunk[..count]).await;
            }
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
    while let Some(piece) = input.recv().await {
        if piece.bytes.is_empty() || write_all(&fd, &piece.bytes).await.is_err() {
            break;
        }
    }
    // The pipe is closed here, which is the end of input; what still comes is for nobody.
    drop(fd);
    while input.recv().await.is_some() {}
}

async fn feed_terminal(fd: Polled, input: Input) {
    let mut input = input.lock().await;
    while let Some(piece) = input.recv().await {
        let bytes = if piece.bytes.is_empty() {
            &[END_OF_TRANSMISSION]
        } else {
            piece.bytes.as_slice()
        };
        if write_all(&fd, bytes).await.is_err() {
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
