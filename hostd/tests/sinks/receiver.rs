//! A receiver of logs that can break off in every way.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flynn_api::sink::{LogAggregatorConfig, Sink, SinkKind};
use flynn_hostd::logs::record::{Id, Record};
use rand::Rng as _;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// How a receiver ends its connections.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Breaking {
    Never,
    /// The first eight, after so many records at most, by a reset or an orderly end, now and then after a stall.
    After(u64),
}

/// What was received.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// By PROCID: the lines, those that came twice left out, and the last one's id.
    pub(crate) lines: BTreeMap<String, (Vec<String>, Id)>,
    /// Lines that came again.
    pub(crate) twice: u64,
    pub(crate) connections: u64,
}

impl Received {
    /// Takes a record: whether it is new.
    fn take(&mut self, record: &Record<'_>) {
        let process = String::from_utf8_lossy(record.process).into_owned();
        let (lines, last) = self.lines.entry(process).or_default();
        if record.id <= *last {
            self.twice += 1;
            return;
        }
        *last = record.id;
        lines.push(String::from_utf8_lossy(record.text).into_owned());
    }

    pub(crate) fn of(&self, job: &str) -> usize {
        self.lines.get(job).map_or(0, |(lines, _)| lines.len())
    }
}

/// Takes logs, and breaks its connections off.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    pub(crate) received: Arc<Mutex<Received>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// One connection after the other; with `acknowledging` as a log aggregator does.
    pub(crate) fn start(breaking: Breaking, acknowledging: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (received, stop) = (Arc::<Mutex<Received>>::default(), Arc::<AtomicBool>::default());
        let (shared, stopped) = (Arc::clone(&received), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let count = {
                    let mut received = shared.lock().unwrap();
                    received.connections += 1;
                    received.connections
                };
                // A server that always breaks off within seconds never has anything for certain.
                let breaking = if count > 8 { Breaking::Never } else { breaking };
                let _ = serve(stream, breaking, acknowledging, &shared, &stopped);
            }
        });
        Self {
            address,
            received,
            stop,
            thread: Some(thread),
        }
    }

    /// Waits for something.
    pub(crate) fn until(&self, what: &str, done: impl Fn(&Received) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(&self.received.lock().unwrap()) {
            let received = self.received.lock().unwrap();
            let counts: Vec<_> = received
                .lines
                .iter()
                .map(|(job, (lines, _))| (job, lines.len()))
                .collect();
            assert!(Instant::now() < deadline, "waited in vain for {what}: {counts:?}");
            drop(received);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    stream: TcpStream,
    breaking: Breaking,
    acknowledging: bool,
    received: &Mutex<Received>,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut rng = rand::rng();
    let mut left = match breaking {
        Breaking::Never => u64::MAX,
        Breaking::After(records) => rng.random_range(0..records),
    };
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut answers = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut message = Vec::new();
    while left > 0 {
        match next(&mut reader, &mut message, stop) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => return Err(error),
        }
        let record =
            Record::parse(&message).unwrap_or_else(|| panic!("{:?}", String::from_utf8_lossy(&message)));
        received.lock().unwrap().take(&record);
        // Soon or late, but all of it.
        if acknowledging && (reader.buffer().is_empty() || rng.random_ratio(1, 20)) {
            let process = String::from_utf8_lossy(record.process);
            writeln!(answers, "{process} {} {}", record.id.run, record.id.seq)?;
        }
        left -= 1;
    }
    if rng.random_ratio(1, 4) {
        std::thread::sleep(Duration::from_millis(rng.random_range(0..300)));
    }
    if rng.random() {
        rustix::net::sockopt::set_socket_linger(&answers, Some(Duration::ZERO))?;
    } else {
        answers.shutdown(std::net::Shutdown::Write)?;
    }
    Ok(())
}

/// The next message; none at the end, or once it is to stop.
fn next(reader: &mut BufReader<TcpStream>, message: &mut Vec<u8>, stop: &AtomicBool) -> io::Result<bool> {
    let patient = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if !stop.load(Ordering::Relaxed) => Ok(()),
        _ => Err(error),
    };
    let mut length = Vec::new();
    while length.last() != Some(&b' ') {
        match reader.read_until(b' ', &mut length) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(error) => patient(error)?,
        }
    }
    let digits = std::str::from_utf8(&length).unwrap().trim_end();
    let length: usize = digits
        .parse()
        .unwrap_or_else(|_| panic!("{digits:?} is no length"));
    message.resize(length, 0);
    let mut filled = 0;
    while filled < length {
        match reader.read(&mut message[filled..]) {
            Ok(0) => return Ok(false),
            Ok(count) => filled += count,
            Err(error) => patient(error)?,
        }
    }
    Ok(true)
}

/// This receiver as a sink.
pub(crate) fn aggregator(receiver: &Receiver) -> Sink {
    let config = LogAggregatorConfig {
        addr: receiver.address.to_string(),
        ..LogAggregatorConfig::default()
    };
    Sink {
        id: "aggregator".into(),
        kind: SinkKind::Logaggregator,
        config: serde_json::to_value(config).unwrap(),
        host_managed: false,
    }
}
