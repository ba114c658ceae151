//! Where a job's output goes: its log, and the clients that are attached.
//!
//! A job that was made for a client (with standard input or a terminal) waits for its clients: none of its output is
//! lost, be the client slow or not there yet. Any other job waits for nobody: a client that falls behind is let go.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flynn_api::client::attach::Frame;
use flynn_api::host::{LogLine, LogStream, TtySize, attach};
use futures::future::join_all;
use jiff::Timestamp;
use tokio::sync::{Notify, mpsc};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::input::Piece;
use super::streams::set_size;
use crate::launch::Launch;
use crate::logs::record::Origin;
use crate::logs::{Follower, Framer, Writer};

/// Frames that wait for a client's connection.
const QUEUE: usize = 32;

/// The longest frame for clients.
const FRAME: usize = 16 << 10;

/// Bytes kept for a client that is yet to come.
const BACKLOG: usize = 64 << 10;

/// Why a client gets no more.
pub(super) const TOO_SLOW: &str = "the client was too slow for the job's output";

/// The output and input of one job. Shared by the supervisor's tasks, which all run on one thread.
#[derive(Debug)]
pub(super) struct Output {
    waits: bool,
    state: Mutex<State>,
    changed: Notify,
    /// Input from clients.
    pub(super) stdin: mpsc::UnboundedSender<Piece>,
}

#[derive(Debug, Default)]
struct State {
    log: Option<Writer>,
    clients: Vec<Client>,
    backlog: VecDeque<Frame>,
    backlog_bytes: usize,
    had_client: bool,
    /// Frames that clients were given or that wait for one.
    passed_on: u64,
    /// What clients have been sent of that.
    written: u64,
    /// Nobody came in time for this run's output.
    alone: bool,
    last: Option<Frame>,
    terminal: Option<Arc<OwnedFd>>,
    size: Option<TtySize>,
}

#[derive(Debug)]
struct Client {
    wants: [bool; 2],
    queue: mpsc::Sender<Frame>,
    /// It has taken nothing for too long.
    let_go: CancellationToken,
}

/// A client's share of the output: what is there already, then what comes. The end of the queue without a last frame
/// means that the client was too slow.
pub(super) struct Subscription {
    pub(super) past: Vec<Frame>,
    pub(super) queue: mpsc::Receiver<Frame>,
}

impl Output {
    /// Of this job; input is sent into `stdin`.
    pub(super) fn new(launch: &Launch, job_dir: &Path, stdin: mpsc::UnboundedSender<Piece>) -> Self {
        let origin = Origin {
            job_id: launch.job_id.clone(),
            app_id: launch.app_id.clone(),
            process_type: launch.process_type.clone(),
        };
        let log = (!launch.disable_log).then(|| Writer::new(&job_dir.join("log"), &origin));
        Self {
            waits: launch.interactive(),
            state: Mutex::new(State {
                log,
                size: launch.tty_size,
                ..State::default()
            }),
            changed: Notify::new(),
            stdin,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs in the supervisor's own name.
    pub(super) fn say(&self, text: impl AsRef<[u8]>) {
        let mut framer = Framer::default();
        self.log(LogStream::Init, &mut framer, text.as_ref());
        self.end_of(LogStream::Init, &mut framer);
    }

    /// Logs what the framer makes of some bytes; gives how long whoever wrote them should be kept waiting.
    fn log(&self, stream: LogStream, framer: &mut Framer, bytes: &[u8]) -> Duration {
        let mut state = self.state();
        let Some(log) = &mut state.log else {
            return Duration::ZERO;
        };
        log.at(Timestamp::now());
        framer.push(bytes, |text, more| log.add(stream, text, more));
        log.flush()
    }

    /// Lets go of memory that is wanted for what comes in quick succession only.
    pub(super) fn rest(&self) {
        if let Some(log) = &mut self.state().log {
            log.rest();
        }
    }

    /// Takes what the program has written. Comes back when it is in the log and on its way to the clients.
    pub(super) async fn publish(&self, stream: LogStream, framer: &mut Framer, bytes: &[u8]) {
        let pause = self.log(stream, framer, bytes);
        if !pause.is_zero() {
            sleep(pause).await;
        }
        let (kind, index) = match stream {
            LogStream::Stderr => (attach::STDERR, 1),
            LogStream::Stdout | LogStream::Init => (attach::STDOUT, 0),
        };
        if !self.waits && self.state().clients.is_empty() {
            return;
        }
        for part in bytes.chunks(FRAME) {
            self.pass_on(Frame::new(kind, part), index).await;
            self.state().passed_on += 1;
        }
        // Connections are to have the time to take what they were given.
        yield_now().await;
    }

    /// Hands a frame to the clients that want it.
    async fn pass_on(&self, frame: Frame, index: usize) {
        if !self.waits {
            // A client whose queue is full is let go: the drop of its sender tells its connection.
            self.state()
                .clients
                .retain(|client| !client.wants[index] || client.queue.try_send(frame.clone()).is_ok());
            return;
        }
        loop {
            let woken = self.changed.notified();
            let queues = {
                let mut state = self.state();
                if state.alone {
                    return;
                }
                if !state.had_client && state.backlog_bytes < BACKLOG {
                    state.backlog_bytes += frame.payload.len();
                    state.backlog.push_back(frame);
                    return;
                }
                state.had_client.then(|| {
                    let wanting = state.clients.iter().filter(|client| client.wants[index]);
                    wanting
                        .map(|client| (client.queue.clone(), client.let_go.clone()))
                        .collect::<Vec<_>>()
                })
            };
            let Some(queues) = queues else {
                woken.await;
                continue;
            };
            for (queue, let_go) in queues {
                let _ = let_go.run_until_cancelled(queue.send(frame.clone())).await;
            }
            self.state().clients.retain(|client| !client.queue.is_closed());
            return;
        }
    }

    /// A number that grows as long as clients take what there is for them.
    pub(super) fn passed_on(&self) -> u64 {
        self.state().passed_on
    }

    /// The same, of what has left for them.
    pub(super) fn written(&self) -> u64 {
        self.state().written
    }

    /// A frame has left for a client.
    pub(super) fn note_written(&self) {
        self.state().written += 1;
    }

    /// Lets those clients go that are waited for, and waits for none that is yet to come.
    pub(super) fn let_clients_go(&self) {
        let mut state = self.state();
        state.clients.retain(|client| {
            let is_waited_for = client.queue.capacity() == 0;
            if is_waited_for {
                client.let_go.cancel();
            }
            !is_waited_for
        });
        state.alone = !state.had_client;
        drop(state);
        self.changed.notify_waiters();
    }

    /// A run begins: whoever comes for its output is waited for.
    pub(super) fn begin(&self) {
        self.state().alone = false;
    }

    /// Logs what is left of a stream that has ended.
    pub(super) fn end_of(&self, stream: LogStream, framer: &mut Framer) {
        if let Some(log) = &mut self.state().log {
            log.at(Timestamp::now());
            framer.finish(|text, more| log.add(stream, text, more));
            log.flush();
        }
    }

    /// Takes a client in.
    pub(super) fn subscribe(&self, stdout: bool, stderr: bool, job_dir: &Path, lines: u32) -> Subscription {
        let (sender, queue) = mpsc::channel(QUEUE);
        let mut past = if lines > 0 {
            past_lines(job_dir, lines, [stdout, stderr])
        } else {
            Vec::new()
        };
        let mut state = self.state();
        state.had_client = true;
        state.backlog_bytes = 0;
        let wanted = |frame: &Frame| {
            if frame.kind == attach::STDERR {
                stderr
            } else {
                stdout
            }
        };
        let backlog = std::mem::take(&mut state.backlog);
        // With a log the backlog's whole lines are among the past ones already.
        if lines == 0 || state.log.is_none() {
            past.extend(backlog.into_iter().filter(wanted));
        }
        if let Some(last) = &state.last {
            past.push(last.clone());
        } else {
            state.clients.push(Client {
                wants: [stdout, stderr],
                queue: sender,
                let_go: CancellationToken::new(),
            });
        }
        drop(state);
        self.changed.notify_waiters();
        Subscription { past, queue }
    }

    /// Sends the last frame to everyone, now and later. Who takes nothing for `patience` is let go without.
    pub(super) async fn finish(&self, last: Frame, patience: Duration) {
        let last = if self.state().alone {
            Frame::new(attach::ERROR, TOO_SLOW)
        } else {
            last
        };
        let clients = {
            let mut state = self.state();
            state.last = Some(last.clone());
            std::mem::take(&mut state.clients)
        };
        let sent = clients.into_iter().map(|client| {
            let last = last.clone();
            async move { timeout(patience, client.queue.send(last)).await }
        });
        join_all(sent).await;
    }

    /// Waits until there has been a client.
    pub(super) async fn first_client(&self) {
        loop {
            let woken = self.changed.notified();
            if self.state().had_client {
                return;
            }
            woken.await;
        }
    }

    /// The program's terminal, or none while there is no program.
    pub(super) fn set_terminal(&self, terminal: Option<Arc<OwnedFd>>) {
        let mut state = self.state();
        state.terminal = terminal;
        apply_size(&state);
    }

    /// Sizes the terminal, now and when the program is started again.
    pub(super) fn resize(&self, size: TtySize) {
        let mut state = self.state();
        state.size = Some(size);
        apply_size(&state);
    }
}

fn apply_size(state: &State) {
    if let (Some(terminal), Some(size)) = (&state.terminal, state.size) {
        set_size(terminal, size);
    }
}

/// The last lines of the log as frames.
fn past_lines(job_dir: &Path, lines: u32, wants: [bool; 2]) -> Vec<Frame> {
    let last = usize::try_from(lines).unwrap_or(usize::MAX).min(10_000);
    let read = Follower::open(&job_dir.join("log"), Some(last)).and_then(|mut follower| follower.read_all());
    read.unwrap_or_default()
        .into_iter()
        .filter_map(|line| frame_of(&line, wants))
        .collect()
}

/// A logged line as a frame for a client that wants these streams.
pub fn frame_of(line: &LogLine, [stdout, stderr]: [bool; 2]) -> Option<Frame> {
    let kind = match line.stream {
        LogStream::Stdout if stdout => attach::STDOUT,
        LogStream::Stderr if stderr => attach::STDERR,
        _ => return None,
    };
    Some(Frame::new(kind, format!("{}\n", line.msg)))
}
