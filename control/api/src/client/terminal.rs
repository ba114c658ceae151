//! A job at this process's terminal: standard streams, size, signals, exit status.

use std::io::{self, IsTerminal as _, Read};
use std::sync::Arc;
use std::time::Duration;

use rustix::termios::{self, OptionalActions, Termios};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Upgraded;
use super::attach::{Frame, read_frame, write_frame};
use crate::host::{TtySize, attach};

/// Signals that are the job's and do not end this process.
const FORWARDED: [fn() -> SignalKind; 6] = [
    SignalKind::interrupt,
    SignalKind::terminate,
    SignalKind::hangup,
    SignalKind::quit,
    SignalKind::user_defined1,
    SignalKind::user_defined2,
];

/// How long a signal may be on its way out before it ends this process and not the job's.
const STUCK: Duration = Duration::from_secs(2);

/// Frames that wait to be sent.
const QUEUE: usize = 16;

/// What is read of the input at once.
const CHUNK: usize = 32 << 10;

/// How [`run`] came to its end.
#[derive(Debug)]
pub enum End {
    /// The program's exit status; 128 and its number when a signal ended this process's part.
    Exited(i32),
    /// Why the program has none.
    Failed(String),
    /// The connection was lost; the job may run on.
    Lost(Option<io::Error>),
}

/// Whether standard input and output are a terminal.
pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// The size of the terminal at standard output.
pub fn size() -> Option<TtySize> {
    let size = termios::tcgetwinsize(io::stdout()).ok()?;
    Some(TtySize {
        columns: size.ws_col,
        lines: size.ws_row,
    })
}

/// Connects this process's streams and signals to a job's until that ends. `tty`: the job has a terminal, and this process's is
/// its, key by key.
///
/// A thread that reads standard input stays behind: end the process, or shut the runtime down in the background.
///
/// # Errors
/// The terminal cannot be used, or standard output cannot be written: nobody may read it any more.
pub async fn run(connection: Upgraded, tty: bool) -> io::Result<End> {
    let _raw = if tty { Some(RawMode::enter()?) } else { None };
    let (from_job, to_job) = tokio::io::split(connection);
    let (orders, to_send) = mpsc::channel(QUEUE);
    let (unsent, mut stuck) = mpsc::channel(1);
    let window = Arc::new(Semaphore::new(attach::WINDOW));
    let mut tasks = JoinSet::new();
    tasks.spawn(send(to_job, to_send));
    for kind in FORWARDED {
        tasks.spawn(forward(kind(), signal(kind())?, orders.clone(), unsent.clone()));
    }
    if tty {
        tasks.spawn(resize(signal(SignalKind::window_change())?, orders.clone()));
    }
    let (handle, room) = (Handle::current(), Arc::clone(&window));
    std::thread::spawn(move || read_input(io::stdin().lock(), &handle, &room, &orders));
    tokio::select! {
        end = receive(from_job, &window) => end,
        Some(number) = stuck.recv() => Ok(End::Exited(128 + number)),
    }
}

/// A frame, and who wants to know when it has been sent.
type Order = (Frame, Option<oneshot::Sender<()>>);

async fn send(mut to_job: impl AsyncWrite + Unpin, mut orders: mpsc::Receiver<Order>) {
    while let Some((frame, sent)) = orders.recv().await {
        if write_frame(&mut to_job, frame.kind, &frame.payload)
            .await
            .is_err()
        {
            break;
        }
        if let Some(sent) = sent {
            let _ = sent.send(());
        }
    }
    // The other half says why nothing can be sent. Until then this one stays: its end would say that we have left.
    std::future::pending::<()>().await;
}

/// Reads input to its end, an empty frame, no faster than the program takes it.
fn read_input(mut input: impl Read, runtime: &Handle, window: &Semaphore, orders: &mpsc::Sender<Order>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = match input.read(&mut chunk) {
            Ok(count) => count,
            Err(why) if why.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        // CHUNK fits into 32 bits; the window is never closed.
        if let Ok(room) = runtime.block_on(window.acquire_many(u32::try_from(count).unwrap_or(0))) {
            room.forget();
        }
        let frame = Frame::new(attach::STDIN, &chunk[..count]);
        if orders.blocking_send((frame, None)).is_err() || count == 0 {
            return;
        }
    }
}

/// Sends signals of one kind on. One that cannot be sent is given back.
async fn forward(
    kind: SignalKind,
    mut signal: Signal,
    orders: mpsc::Sender<Order>,
    unsent: mpsc::Sender<i32>,
) {
    let number = kind.as_raw_value();
    while signal.recv().await.is_some() {
        let (sent_in, sent) = oneshot::channel();
        let order = (Frame::new(attach::SIGNAL, number.to_be_bytes()), Some(sent_in));
        let told = async { orders.send(order).await.is_ok() && sent.await.is_ok() };
        if !timeout(STUCK, told).await.unwrap_or(false) {
            let _ = unsent.send(number).await;
        }
    }
}

async fn resize(mut resized: Signal, orders: mpsc::Sender<Order>) {
    while resized.recv().await.is_some() {
        if let Some(size) = size().and_then(|size| serde_json::to_vec(&size).ok()) {
            let _ = orders.send((Frame::new(attach::RESIZE, size), None)).await;
        }
    }
}

/// Writes what the job says, until its last word.
async fn receive(mut from_job: impl AsyncRead + Unpin, window: &Semaphore) -> io::Result<End> {
    // Whoever reads our output may take their time, which signals must not wait for: not this thread writes.
    let (mut out, mut err) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        let frame = match read_frame(&mut from_job).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(End::Lost(None)),
            Err(why) => return Ok(End::Lost(Some(why))),
        };
        match frame.kind {
            attach::STDOUT => {
                out.write_all(&frame.payload).await?;
                out.flush().await?;
            }
            // Where nobody listens nothing is lost that anybody wanted.
            attach::STDERR => {
                let _ = err.write_all(&frame.payload).await;
                let _ = err.flush().await;
            }
            attach::TAKEN => widen(window, &frame.payload),
            attach::EXIT => {
                let status = <[u8; 4]>::try_from(frame.payload).map_or(255, i32::from_be_bytes);
                return Ok(End::Exited(status));
            }
            attach::ERROR => {
                return Ok(End::Failed(String::from_utf8_lossy(&frame.payload).into_owned()));
            }
            // Kinds that a newer server may send.
            _ => {}
        }
    }
}

/// Makes room for as much input as was taken, whatever is said for no more than a window.
fn widen(window: &Semaphore, taken: &[u8]) {
    let taken = taken.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    let most = attach::WINDOW.saturating_sub(window.available_permits());
    window.add_permits(most.min(usize::try_from(taken).unwrap_or(0)));
}

/// Keys go to the job as they are pressed, until this is dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that takes nothing holds up its input and nothing else; what it takes makes room for as much.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn input_waits_and_signals_do_not() {
        let (to_job, mut job) = tokio::io::duplex(1 << 10);
        let (orders, to_send) = mpsc::channel(QUEUE);
        let window = Arc::new(Semaphore::new(attach::WINDOW));
        let sending = tokio::spawn(send(to_job, to_send));
        let (room, input, handle) = (Arc::clone(&window), orders.clone(), Handle::current());
        std::thread::spawn(move || read_input(io::repeat(b'x'), &handle, &room, &input));

        let mut under_way = 0;
        while under_way < attach::WINDOW {
            under_way += read_frame(&mut job).await.unwrap().unwrap().payload.len();
        }
        assert_eq!(under_way, attach::WINDOW);
        let signal = Frame::new(attach::SIGNAL, 2_i32.to_be_bytes());
        orders.send((signal.clone(), None)).await.unwrap();
        assert_eq!(read_frame(&mut job).await.unwrap(), Some(signal));

        widen(&window, &5_u32.to_be_bytes());
        let chunk = u32::try_from(CHUNK).unwrap();
        widen(&window, &(chunk - 5).to_be_bytes());
        let next = read_frame(&mut job).await.unwrap().unwrap();
        assert_eq!((next.kind, next.payload.len()), (attach::STDIN, CHUNK));
        sending.abort();
    }

    #[test]
    fn no_more_room_is_made_than_there_is() {
        let window = Semaphore::new(attach::WINDOW);
        for odd in [&[][..], &[1, 2], &[255; 4], &[255; 9]] {
            widen(&window, odd);
            assert_eq!(window.available_permits(), attach::WINDOW);
        }
        window.try_acquire_many(10).unwrap().forget();
        widen(&window, &[255; 4]);
        assert_eq!(window.available_permits(), attach::WINDOW);
    }
}
