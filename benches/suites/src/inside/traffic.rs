//! The two ends of a TCP load between network namespaces, one process and one thread each, pinned to a CPU.
//!
//! `answer` says on its first line by which port it can be reached, and each end says last what it has seen. Whoever started
//! them compares: what one sent, the other must have got. Any wrong byte, any error, ends both.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt::set_tcp_congestion;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::{Deserialize, Serialize};

/// What goes over the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pattern {
    /// One byte there and one byte back, again and again
    Requests,
    /// A connection for each byte there and back
    Connections,
    /// As much as it takes
    Stream,
}

impl Pattern {
    /// As an argument.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Connections => "connections",
            Self::Stream => "stream",
        }
    }
}

/// How to answer.
#[derive(clap::Args)]
pub(crate) struct Answer {
    #[arg(long)]
    pattern: Pattern,
    #[arg(long)]
    cpu: usize,
    /// Any when 0
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Series of connections follow one another
    #[arg(long)]
    stay: bool,
}

/// How to run a peer.
#[derive(clap::Args)]
pub(crate) struct Settled {
    #[arg(long)]
    cpu: usize,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Becomes another program, on one CPU and before all others.
pub(crate) fn settled(args: &Settled) -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    settle(args.cpu)?;
    let [program, arguments @ ..] = args.command.as_slice() else {
        bail!("no command");
    };
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot start {program}"))
}

/// How to ask.
#[derive(clap::Args)]
pub(crate) struct Ask {
    #[arg(long)]
    pattern: Pattern,
    #[arg(long)]
    cpu: usize,
    #[arg(long)]
    millis: u64,
    #[arg(long)]
    to: SocketAddr,
}

/// What one end has seen: exchanges, or bytes of a stream.
#[derive(Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) count: u64,
    /// From the first to the last of them.
    pub(crate) seconds: f64,
    /// The CPU time that this end's process took.
    pub(crate) cpu_seconds: f64,
}

/// Ends a series of connections.
const LAST: u8 = 0xff;

/// What is written at once, and what is read at most at once.
const CHUNK: usize = 128 << 10;

/// How much of the pattern there is: no power of two, so that a shifted stream is seen.
const PERIOD: usize = 65_521;

/// Takes what comes and answers it.
pub(crate) fn answer(args: &Answer) -> Result<Seen> {
    settle(args.cpu)?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, args.port)).context("cannot listen")?;
    println!("{}", listener.local_addr()?.port());
    match args.pattern {
        Pattern::Requests => answer_requests(accept(&listener)?),
        Pattern::Connections => answer_connections(&listener, args.stay),
        Pattern::Stream => answer_stream(accept(&listener)?),
    }
}

/// Sends for as long as it is told.
pub(crate) fn ask(args: &Ask) -> Result<Seen> {
    settle(args.cpu)?;
    let time = Duration::from_millis(args.millis);
    match args.pattern {
        Pattern::Requests => ask_requests(args.to, time),
        Pattern::Connections => ask_connections(args.to, time),
        Pattern::Stream => ask_stream(args.to, time),
    }
}

fn answer_requests(mut stream: TcpStream) -> Result<Seen> {
    let clock = Clock::start()?;
    let (mut byte, mut count) = ([0], 0);
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&[!byte[0]])?;
        count += 1;
    }
    clock.stop(count)
}

fn ask_requests(to: SocketAddr, time: Duration) -> Result<Seen> {
    let mut stream = connect(to)?;
    let clock = Clock::start()?;
    let mut count = 0;
    while !clock.is_over(count, time) {
        exchange(&mut stream, count.to_le_bytes()[0])?;
        count += 1;
    }
    clock.stop(count)
}

fn answer_connections(listener: &TcpListener, stay: bool) -> Result<Seen> {
    let clock = Clock::start()?;
    let mut count = 0;
    loop {
        let mut stream = accept(listener)?;
        let mut byte = [0];
        if let Err(error) = stream.read_exact(&mut byte) {
            // Somebody who only looks whether anybody is there.
            ensure!(stay, "a connection ended without a byte: {error}");
            continue;
        }
        // This end closes first, so that it is this end's address on which the kernel waits: the other's ports are free.
        stream.write_all(&[!byte[0]])?;
        if byte[0] == LAST && !stay {
            return clock.stop(count);
        }
        count += 1;
    }
}

fn ask_connections(to: SocketAddr, time: Duration) -> Result<Seen> {
    let clock = Clock::start()?;
    let mut count = 0;
    while !clock.is_over(count, time) {
        connection(to, count.to_le_bytes()[0] & 0x7f)?;
        count += 1;
    }
    let seen = clock.stop(count)?;
    connection(to, LAST)?;
    Ok(seen)
}

fn connection(to: SocketAddr, byte: u8) -> Result<()> {
    let mut stream = connect(to)?;
    exchange(&mut stream, byte)?;
    ensure!(stream.read(&mut [0])? == 0, "more came than was asked for");
    Ok(())
}

fn exchange(stream: &mut TcpStream, byte: u8) -> Result<()> {
    stream.write_all(&[byte])?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    ensure!(answer[0] == !byte, "{byte} was answered with {}", answer[0]);
    Ok(())
}

fn answer_stream(mut stream: TcpStream) -> Result<Seen> {
    let (mut buffer, expected) = (vec![0; CHUNK], pattern());
    let clock = Clock::start()?;
    let mut count = 0_u64;
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        // The first and the last bytes of what was read: to compare all would cost more than to receive it.
        for at in [0, length.saturating_sub(8)] {
            let end = length.min(at + 8);
            let begin = phase(count + at as u64);
            if buffer[at..end] != expected[begin..begin + end - at] {
                bail!("byte {} of the stream is not what was sent", count + at as u64);
            }
        }
        count += length as u64;
    }
    let seen = clock.stop(count)?;
    stream.write_all(&count.to_be_bytes())?;
    Ok(seen)
}

fn ask_stream(to: SocketAddr, time: Duration) -> Result<Seen> {
    let mut stream = connect(to)?;
    let content = pattern();
    let clock = Clock::start()?;
    let mut count = 0_u64;
    while clock.begun.elapsed() < time {
        let begin = phase(count);
        stream.write_all(&content[begin..begin + CHUNK])?;
        count += CHUNK as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    ensure!(
        u64::from_be_bytes(received) == count,
        "{count} bytes were sent, and {} arrived",
        u64::from_be_bytes(received)
    );
    clock.stop(count)
}

/// Where in the pattern a byte of the stream is.
fn phase(offset: u64) -> usize {
    usize::try_from(offset % PERIOD as u64).unwrap_or_default()
}

/// The content of a stream, with a chunk more than its period.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(PERIOD)
    .collect();
    while bytes.len() < PERIOD + CHUNK {
        let more = bytes.len().min(PERIOD + CHUNK - bytes.len()).min(PERIOD);
        bytes.extend_from_within(..more);
    }
    bytes
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    configured(stream)
}

/// Sends at once, and with what the kernel's makers have as its default: machines differ in theirs.
fn configured(stream: TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    set_tcp_congestion(&stream, "cubic").context("cannot have cubic")?;
    Ok(stream)
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, _) = listener.accept().context("cannot accept")?;
    configured(stream)
}

/// Stays on one CPU and has it before builds and whatever else runs in the background.
fn settle(cpu: usize) -> Result<()> {
    const FIRST: &str = "-20";
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).with_context(|| format!("cannot stay on CPU {cpu}"))?;
    rustix::process::setpriority_process(None, FIRST.parse()?)?;
    // Where the kernel groups processes by session, priorities only hold within one. Where it does not, no file is there.
    rustix::process::setsid()?;
    if let Err(error) = fs::write("/proc/self/autogroup", FIRST)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).context("cannot give the session its priority");
    }
    Ok(())
}

/// Time by the wall, and on the CPU.
struct Clock {
    begun: Instant,
    cpu_seconds: f64,
}

impl Clock {
    fn start() -> Result<Self> {
        Ok(Self {
            begun: Instant::now(),
            cpu_seconds: cpu_seconds()?,
        })
    }

    /// Looks at the time once in a while only.
    fn is_over(&self, count: u64, time: Duration) -> bool {
        count.is_multiple_of(16) && self.begun.elapsed() >= time
    }

    fn stop(self, count: u64) -> Result<Seen> {
        Ok(Seen {
            count,
            seconds: self.begun.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds()? - self.cpu_seconds,
        })
    }
}

/// What the scheduler has given to this process.
fn cpu_seconds() -> Result<f64> {
    const PATH: &str = "/proc/thread-self/schedstat";
    let text = fs::read_to_string(PATH).context(PATH)?;
    let nanos: f64 = text.split(' ').next().context(PATH)?.parse().context(PATH)?;
    Ok(nanos / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_goes_on_after_its_period() {
        let content = pattern();
        assert_eq!(content.len(), PERIOD + CHUNK);
        assert_eq!(content[..CHUNK], content[PERIOD..]);
        assert_eq!(phase(PERIOD as u64 + 3), 3);
    }

    #[test]
    fn both_ends_agree() {
        for pattern in [Pattern::Requests, Pattern::Connections, Pattern::Stream] {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let to = listener.local_addr().unwrap();
            let answer = std::thread::spawn(move || match pattern {
                Pattern::Requests => answer_requests(accept(&listener).unwrap()),
                Pattern::Connections => answer_connections(&listener, false),
                Pattern::Stream => answer_stream(accept(&listener).unwrap()),
            });
            let time = Duration::from_millis(5);
            let asked = match pattern {
                Pattern::Requests => ask_requests(to, time),
                Pattern::Connections => ask_connections(to, time),
                Pattern::Stream => ask_stream(to, time),
            };
            let (asked, answered) = (asked.unwrap(), answer.join().unwrap().unwrap());
            assert!(asked.count > 0 && asked.count == answered.count, "{pattern:?}");
        }
    }
}
