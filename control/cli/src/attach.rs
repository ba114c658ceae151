//! A job's terminal on this one: standard streams, size, signals, exit status.

use std::io::{self, Read as _, Write as _};
use std::process::ExitCode;

use flynn_api::client::Upgraded;
use flynn_api::client::attach::{Frame, read_frame, write_frame};
use flynn_api::host::attach as kind;
use flynn_api::{Error, ErrorCode};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::failure::{Failure, Result, local};
use crate::output;
use crate::terminal::{self, RawMode};

/// Signals that go to the job instead of ending this process.
const FORWARDED: [fn() -> SignalKind; 6] = [
    SignalKind::interrupt,
    SignalKind::terminate,
    SignalKind::hangup,
    SignalKind::quit,
    SignalKind::user_defined1,
    SignalKind::user_defined2,
];

/// Frames that wait to be sent.
const QUEUE: usize = 16;

/// Connects this process's streams to a job's until it ends, and ends as it did.
pub(crate) async fn run(connection: Upgraded, tty: bool) -> Result<ExitCode> {
    let raw = if tty {
        Some(RawMode::enter().map_err(|why| local("the terminal cannot be used", &why))?)
    } else {
        None
    };
    let (reader, writer) = tokio::io::split(connection);
    let (sender, frames) = mpsc::channel(QUEUE);
    let input = sender.clone();
    std::thread::spawn(move || read_input(&input));
    tokio::spawn(forward_signals(sender, tty));
    let sending = tokio::spawn(send(writer, frames));
    let done = receive(reader).await;
    sending.abort();
    drop(raw);
    done
}

/// Reads standard input to its end. It runs in a thread of its own, which ends with the process.
fn read_input(frames: &mpsc::Sender<Frame>) {
    let mut buffer = vec![0; 32 << 10];
    loop {
        let read = match io::stdin().lock().read(&mut buffer) {
            Ok(read) => read,
            Err(why) if why.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        // An empty frame is the end of the input.
        let frame = Frame::new(kind::STDIN, &buffer[..read]);
        if frames.blocking_send(frame).is_err() || read == 0 {
            return;
        }
    }
}

async fn forward_signals(frames: mpsc::Sender<Frame>, tty: bool) {
    let listen = |of: SignalKind| signal(of).ok().map(|signal| (of.as_raw_value(), signal));
    for kind_of in FORWARDED {
        if let Some((number, signal)) = listen(kind_of()) {
            tokio::spawn(forward(number, signal, frames.clone()));
        }
    }
    if !tty {
        return;
    }
    let Some((_, mut resized)) = listen(SignalKind::window_change()) else {
        return;
    };
    while resized.recv().await.is_some() {
        let Some(size) = terminal::size().and_then(|size| serde_json::to_vec(&size).ok()) else {
            continue;
        };
        if frames.send(Frame::new(kind::RESIZE, size)).await.is_err() {
            return;
        }
    }
}

async fn forward(number: i32, mut signal: Signal, frames: mpsc::Sender<Frame>) {
    while signal.recv().await.is_some() {
        if frames
            .send(Frame::new(kind::SIGNAL, number.to_be_bytes()))
            .await
            .is_err()
        {
            return;
        }
    }
}

async fn send(mut writer: WriteHalf<Upgraded>, mut frames: mpsc::Receiver<Frame>) {
    while let Some(frame) = frames.recv().await {
        // The reading side finds out why.
        if write_frame(&mut writer, frame.kind, &frame.payload)
            .await
            .is_err()
        {
            return;
        }
    }
}

async fn receive(mut reader: ReadHalf<Upgraded>) -> Result<ExitCode> {
    let lost = |why: &str| {
        let message = format!(
            "the connection to the job was lost{why}. It may still run: flynn ps; stop it with flynn kill"
        );
        Failure::from(Error::new(ErrorCode::Unavailable, message))
    };
    loop {
        let frame = read_frame(&mut reader)
            .await
            .map_err(|why| lost(&format!(": {why}")))?;
        let Some(frame) = frame else { return Err(lost("")) };
        match frame.kind {
            kind::STDOUT => output::bytes(&frame.payload)?,
            // Nobody listens there any more: nothing is lost that anybody wanted.
            kind::STDERR => {
                let _ = io::stderr().write_all(&frame.payload);
            }
            kind::EXIT => {
                let status = frame
                    .payload
                    .first_chunk()
                    .map_or(1, |bytes| i32::from_be_bytes(*bytes));
                return Ok(ExitCode::from(u8::try_from(status).unwrap_or(255)));
            }
            kind::ERROR => {
                let why = String::from_utf8_lossy(&frame.payload).into_owned();
                return Err(Error::internal(format!("the job could not be run: {why}")).into());
            }
            // Kinds that a newer server may send.
            _ => {}
        }
    }
}
