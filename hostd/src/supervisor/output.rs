//! Where a job's output goes: its log, and the clients that are attached.
//!
//! A job that was made for a client (with standard input or a terminal) waits for its clients: none of its output is
//! lost, be the client slow or not there yet. Any other job waits for nobody: a client that falls behind is let go.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flynn_api::client::attach::Frame;
use flynn_api::host::{LogLine, LogStream, TtySize, attach};
use jiff::Timestamp;
use tokio::sync::{Notify, mpsc};

use super::streams::set_size;
use crate::launch::Launch;
use crate::logs::{Follower, Framer, Writer};

/// Frames that wait for a client's connection.
const QUEUE: usize = 32;

/// Bytes kept for a client that is yet to come.
const BACKLOG: usize = 64 << 10;

/// The output and input of one job. Shared by the supervisor's tasks, which all run on one thread.
#[derive(Debug)]
pub(super) struct Output {
    job_id: String,
    process_type: String,
    waits: bool,
    state: Mutex<State>,
    changed: Notify,
    /// Input from clients.
    pub(super) stdin: mpsc::Sender<Vec<u8>>,
}

#[derive(Debug, Default)]
struct State {
    log: Option<Writer>,
    clients: Vec<Client>,
    backlog: VecDeque<Frame>,
    backlog_bytes: usize,
    had_client: bool,
    last: Option<Frame>,
    terminal: Option<Arc<OwnedFd>>,
    size: Option<TtySize>,
}

#[derive(Debug)]
struct Client {
    wants: [bool; 2],
    queue: mpsc::Sender<Frame>,
}

/// A client's share of the output: what is there already, then what comes. The end of the queue without a last frame
/// means that the client was too slow.
pub(super) struct Subscription {
    pub(super) past: Vec<Frame>,
    pub(super) queue: mpsc::Receiver<Frame>,
}

impl Output {
    /// Of this job; input is sent into `stdin`.
    pub(super) fn new(launch: &Launch, job_dir: &Path, stdin: mpsc::Sender<Vec<u8>>) -> Self {
        let log = (!launch.disable_log).then(|| Writer::new(&job_dir.join("log")));
        Self {
            job_id: launch.job_id.clone(),
            process_type: launch.process_type.clone(),
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

    /// Logs a line in the supervisor's own name.
    pub(super) fn say(&self, text: impl Into<String>) {
        self.log(LogStream::Init, vec![text.into()]);
    }

    fn log(&self, stream: LogStream, lines: Vec<String>) {
        if lines.is_empty() {
            return;
        }
        let timestamp = Timestamp::now();
        let line = |msg| LogLine {
            timestamp,
            stream,
            msg,
            job_id: self.job_id.clone(),
            process_type: self.process_type.clone(),
        };
        if let Some(log) = &mut self.state().log {
            log.append(&lines.into_iter().map(line).collect::<Vec<_>>());
        }
    }

    /// Takes what the program has written. Comes back when it is in the log and on its way to the clients.
    pub(super) async fn publish(&self, stream: LogStream, framer: &mut Framer, bytes: &[u8]) {
        self.log(stream, framer.push(bytes));
        let (kind, index) = match stream {
            LogStream::Stderr => (attach::STDERR, 1),
            LogStream::Stdout | LogStream::Init => (attach::STDOUT, 0),
        };
        let frame = Frame::new(kind, bytes);
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
                if !state.had_client && state.backlog_bytes < BACKLOG {
                    state.backlog_bytes += bytes.len();
                    state.backlog.push_back(frame);
                    return;
                }
                state.had_client.then(|| {
                    let wanting = state.clients.iter().filter(|client| client.wants[index]);
                    wanting.map(|client| client.queue.clone()).collect::<Vec<_>>()
                })
            };
            let Some(queues) = queues else {
                woken.await;
                continue;
            };
            for queue in queues {
                let _ = queue.send(frame.clone()).await;
            }
            self.state().clients.retain(|client| !client.queue.is_closed());
            return;
        }
    }

    /// Logs what is left of a stream that has ended.
    pub(super) fn end_of(&self, stream: LogStream, framer: &mut Framer) {
        self.log(stream, framer.finish().into_iter().collect());
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
            });
        }
        drop(state);
        self.changed.notify_waiters();
        Subscription { past, queue }
    }

    /// Sends the last frame to everyone, now and later.
    pub(super) async fn finish(&self, last: Frame) {
        let clients = {
            let mut state = self.state();
            state.last = Some(last.clone());
            std::mem::take(&mut state.clients)
        };
        for client in clients {
            let _ = client.queue.send(last.clone()).await;
        }
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
    let read = Follower::open(&job_dir.join("log"), Some(last)).and_then(|mut follower| follower.read());
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
