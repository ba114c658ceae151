//! A terminal at a job.

use std::io;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use flynn_api::client::Upgraded;
use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::host::{TtySize, attach};
use rustix::termios::{OptionalActions, Termios};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

/// How long input may be stuck before a signal ends this process and not the job's.
const STUCK: Duration = Duration::from_secs(2);

/// Carries this process's standard streams and signals until the job is over; gives its status.
pub(super) async fn attach(stream: Upgraded, terminal: bool) -> anyhow::Result<ExitCode> {
    let _raw = if terminal { Some(RawMode::enter()?) } else { None };
    let (from_job, to_job) = tokio::io::split(stream);
    // Whoever reads our output may take their time, and a signal is not to wait for them.
    let mut receiving = tokio::spawn(receive(from_job));
    let mut sending = tokio::spawn(send(to_job, terminal));
    let status = tokio::select! {
        status = &mut receiving => status,
        // Why nothing can be sent is said on the way back.
        sent = &mut sending => match sent {
            Ok(Ok(signal)) => Ok(Ok(128 + signal)),
            _ => receiving.await,
        },
    };
    sending.abort();
    Ok(ExitCode::from(u8::try_from(status??).unwrap_or(255)))
}

/// Writes what the job says; gives its status.
async fn receive(mut from_job: impl AsyncRead + Unpin) -> anyhow::Result<i32> {
    loop {
        let Some(frame) = read_frame(&mut from_job).await? else {
            anyhow::bail!("the connection to the job was cut; it may run on: see flynn-host ps");
        };
        match frame.kind {
            attach::STDOUT => write(&mut io::stdout(), &frame.payload)?,
            attach::STDERR => write(&mut io::stderr(), &frame.payload)?,
            attach::EXIT => {
                return Ok(<[u8; 4]>::try_from(frame.payload).map_or(255, i32::from_be_bytes));
            }
            attach::ERROR => anyhow::bail!("{}", String::from_utf8_lossy(&frame.payload)),
            _ => {}
        }
    }
}

fn write(out: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// Sends input and signals. A signal that cannot be sent, since the job does not read its input, is ours: gives it.
async fn send(mut to_job: impl AsyncWrite + Unpin, terminal: bool) -> io::Result<i32> {
    let mut stdin = tokio::io::stdin();
    let mut resized = signal(SignalKind::window_change())?;
    let mut forwarded = Forwarded::new()?;
    let mut chunk = vec![0; 16 << 10];
    let mut open = true;
    loop {
        let number = tokio::select! {
            read = stdin.read(&mut chunk), if open => {
                let count = read?;
                // An empty frame is the end of input.
                open = count > 0;
                let mut written = pin!(write_frame(&mut to_job, attach::STDIN, &chunk[..count]));
                tokio::select! {
                    biased;
                    written = &mut written => {
                        written?;
                        None
                    }
                    number = forwarded.next() => match timeout(STUCK, written).await {
                        Ok(written) => {
                            written?;
                            Some(number)
                        }
                        Err(_) => return Ok(number),
                    },
                }
            }
            _ = resized.recv(), if terminal => {
                if let Some(size) = terminal_size() {
                    write_frame(&mut to_job, attach::RESIZE, &serde_json::to_vec(&size)?).await?;
                }
                None
            }
            number = forwarded.next() => Some(number),
        };
        if let Some(number) = number {
            write_frame(&mut to_job, attach::SIGNAL, &number.to_be_bytes()).await?;
        }
    }
}

/// Signals that are the job's and not ours.
struct Forwarded {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl Forwarded {
    fn new() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.hangup.recv() => libc::SIGHUP,
            _ = self.interrupt.recv() => libc::SIGINT,
            _ = self.terminate.recv() => libc::SIGTERM,
        }
    }
}

/// The size of the terminal at standard output.
pub(super) fn terminal_size() -> Option<TtySize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    Some(TtySize {
        columns: size.ws_col,
        lines: size.ws_row,
    })
}

/// The terminal hands every key through while this is there.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> io::Result<Self> {
        let before = rustix::termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
