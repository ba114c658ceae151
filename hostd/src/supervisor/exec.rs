//! Somebody's program in the container of a job that runs, with their terminal or their pipes.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::client::attach::{Frame, read_frame, write_frame};
use flynn_api::host::{ExecRequest, TtySize, attach};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::input::{Piece, Window};
use super::inside::Inside;
use super::run::receive;
use super::streams::{END_OF_TRANSMISSION, set_size, write_all};
use crate::container::{self, Execution, FromInit, Place};
use crate::launch::Launch;
use crate::sys::{Polled, polled};

/// Frames that wait for the client.
const QUEUE: usize = 16;

/// What is read at once.
const CHUNK: usize = 16 << 10;

/// How long is waited in all for more when the program has ended, and how much there may be: what it has left behind may hold the
/// pipes open, and go on talking. A program can have each of its pipes hold a megabyte.
const LAST_WORDS: Duration = Duration::from_millis(500);
const LAST_BYTES: usize = 4 << 20;

/// A session that has begun.
pub(super) struct Session {
    execution: Execution,
}

impl Session {
    /// Starts what is wished for.
    pub(super) fn begin(inside: &Inside, place: &Place, wish: ExecRequest) -> io::Result<Self> {
        let own = inside.launch();
        let mut env = own.env.clone();
        env.extend(wish.env);
        let launch = Launch {
            args: wish.args,
            env,
            working_dir: wish.working_dir.unwrap_or_else(|| own.working_dir.clone()),
            uid: wish.uid.unwrap_or(own.uid),
            tty: wish.tty,
            tty_size: wish.tty_size,
            stdin: wish.stdin,
            ..own.clone()
        };
        launch
            .check_ids()
            .map_err(|error| io::Error::other(error.message))?;
        Ok(Self {
            execution: inside.start(&launch, place, None)?,
        })
    }

    /// Carries input, output and signals until the program has ended; it is killed when the client leaves before.
    pub(super) async fn carry(
        mut self,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
    ) -> io::Result<()> {
        let (read, write) = tokio::io::split(stream);
        let (frames_in, frames) = mpsc::channel(QUEUE);
        let (orders_in, orders) = mpsc::channel(QUEUE);
        let (stdin_in, stdin) = mpsc::unbounded_channel();
        let (end_in, end) = oneshot::channel();
        // Ended with the session. A program that waits for its output to be read may not read its input meanwhile: each has
        // a task of its own.
        let mut tasks = JoinSet::new();
        let window = Window::new();
        tasks.spawn(listen(read, Arc::clone(&window), stdin_in, orders_in));
        // Nor does a client that reads nothing have to be without a word to the program: what it wants is done beside.
        let mut told = pin!(tell(write, frames, &window, end));
        let end = tokio::select! {
            end = self.govern(&mut tasks, frames_in, stdin, orders) => end?,
            error = &mut told => return error,
        };
        // Without a client, whom would it be for?
        let Some(end) = end else { return Ok(()) };
        let _ = end_in.send(end);
        told.await
    }

    /// Hands the program its streams and does what the client wants until the program has ended: with what is said of that. `None`
    /// when the client has left.
    async fn govern(
        &mut self,
        tasks: &mut JoinSet<()>,
        frames: mpsc::Sender<Frame>,
        stdin: mpsc::UnboundedReceiver<Piece>,
        mut orders: mpsc::Receiver<Frame>,
    ) -> io::Result<Option<Frame>> {
        let mut stdin = Some(stdin);
        if let Some(pipes) = self.execution.pipes.take() {
            tasks.spawn(speak(polled(pipes.stdout)?, attach::STDOUT, frames.clone()));
            tasks.spawn(speak(polled(pipes.stderr)?, attach::STDERR, frames.clone()));
            if let Some(pieces) = stdin.take() {
                tasks.spawn(feed(pipes.stdin.map(polled).transpose()?, pieces, &[]));
            }
        }
        let mut terminal: Option<Arc<OwnedFd>> = None;
        loop {
            tokio::select! {
                word = receive(self.execution.keeper()) => match word? {
                    Some(FromInit::Terminal(fd)) => {
                        let output = polled(fd)?;
                        terminal = Some(Arc::clone(output.get_ref()));
                        if let Some(pieces) = stdin.take() {
                            let input = polled(output.get_ref().try_clone()?)?;
                            tasks.spawn(feed(Some(input), pieces, &[END_OF_TRANSMISSION]));
                            tasks.spawn(speak(output, attach::STDOUT, frames.clone()));
                        }
                    }
                    Some(FromInit::Running) => {}
                    Some(FromInit::Exited(status)) => return Ok(Some(Frame::new(attach::EXIT, status.to_be_bytes()))),
                    Some(FromInit::Failed(why)) => return Ok(Some(Frame::new(attach::ERROR, why))),
                    None => {
                        let why = "the program was killed with its container";
                        return Ok(Some(Frame::new(attach::ERROR, why)));
                    }
                },
                order = orders.recv() => match order {
                    Some(order) => self.obey(order, terminal.as_ref()),
                    None => return Ok(None),
                },
            }
        }
    }

    /// Does what the client wants beside input. What goes wrong with it is the program's doing, and shows in its end.
    fn obey(&self, order: Frame, terminal: Option<&Arc<OwnedFd>>) {
        match order.kind {
            attach::RESIZE => {
                if let (Ok(size), Some(terminal)) =
                    (serde_json::from_slice::<TtySize>(&order.payload), terminal)
                {
                    set_size(terminal, size);
                }
            }
            attach::SIGNAL => {
                if let Ok(number) = <[u8; 4]>::try_from(order.payload) {
                    let _ = container::signal(self.execution.keeper().get_ref(), i32::from_be_bytes(number));
                }
            }
            _ => {}
        }
    }
}

/// Passes on what the client sends, until it leaves.
async fn listen(
    mut read: impl AsyncRead + Unpin,
    window: Arc<Window>,
    stdin: mpsc::UnboundedSender<Piece>,
    orders: mpsc::Sender<Frame>,
) {
    while let Ok(Some(frame)) = read_frame(&mut read).await {
        if frame.kind == attach::STDIN {
            // Where nobody takes it any more, what follows still matters.
            let _ = stdin.send(window.piece(frame.payload).await);
        } else if orders.send(frame).await.is_err() {
            return;
        }
    }
}

/// Tells the client what the program says, and at last its end.
async fn tell(
    mut write: impl AsyncWrite + Unpin,
    mut frames: mpsc::Receiver<Frame>,
    window: &Window,
    mut end: oneshot::Receiver<Frame>,
) -> io::Result<()> {
    let end = loop {
        tokio::select! {
            Some(frame) = frames.recv() => write_frame(&mut write, frame.kind, &frame.payload).await?,
            taken = window.taken() => write_frame(&mut write, taken.kind, &taken.payload).await?,
            end = &mut end => match end {
                Ok(end) => break end,
                Err(_) => return Ok(()),
            },
        }
    };
    // The client takes its time; the pipes may be held open, and then there is no more to wait for.
    let (mut left, mut patience) = (LAST_BYTES, LAST_WORDS);
    while left > 0 {
        let waiting = Instant::now();
        let Ok(Some(frame)) = timeout(patience, frames.recv()).await else {
            break;
        };
        patience = patience.saturating_sub(waiting.elapsed());
        left = left.saturating_sub(frame.payload.len());
        write_frame(&mut write, frame.kind, &frame.payload).await?;
    }
    write_frame(&mut write, end.kind, &end.payload).await?;
    write.shutdown().await
}

/// Gives the program its input. Its end, an empty piece, closes a pipe, or is typed as `end` at a terminal.
async fn feed(fd: Option<Polled>, mut pieces: mpsc::UnboundedReceiver<Piece>, end: &'static [u8]) {
    let Some(fd) = fd else { return };
    while let Some(piece) = pieces.recv().await {
        let bytes = if piece.bytes.is_empty() { end } else { &piece.bytes };
        if bytes.is_empty() || write_all(&fd, bytes).await.is_err() {
            return;
        }
    }
}

/// Passes the program's output on until it ends.
async fn speak(fd: Polled, kind: u8, frames: mpsc::Sender<Frame>) {
    loop {
        let Ok(mut guard) = fd.readable().await else {
            return;
        };
        let mut chunk = vec![0; CHUNK];
        match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut chunk)?)) {
            // A terminal whose other side is closed fails rather than ends.
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(count)) => {
                chunk.truncate(count);
                if frames.send(Frame::new(kind, chunk)).await.is_err() {
                    return;
                }
            }
            Err(_would_block) => {}
        }
    }
}
