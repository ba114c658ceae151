//! What takes a job's log as a log aggregator does, and sees that nothing is missing.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flynn_api::sink::{LogAggregatorConfig, Sink, SinkKind};
use flynn_hostd::logs::record::{Framed, Id, Record, framed};

use super::logs::DIGITS;
use super::ours::PATIENCE;

/// What is read at once.
const CHUNK: usize = 1 << 20;

/// Takes one job's lines on one connection.
pub(super) struct Receiver {
    address: SocketAddr,
    thread: Mutex<Option<JoinHandle<Result<Instant>>>>,
}

impl Receiver {
    /// Of a job that counts to `period` again and again, until there are `total` lines.
    pub(super) fn start(job: &str, period: usize, total: usize) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let job = job.to_owned();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            take(stream, &job, period, total)
        });
        Ok(Self {
            address,
            thread: Mutex::new(Some(thread)),
        })
    }

    pub(super) fn sink(&self) -> Result<Sink> {
        let config = LogAggregatorConfig {
            addr: self.address.to_string(),
            ..LogAggregatorConfig::default()
        };
        Ok(Sink {
            id: "receiver".into(),
            kind: SinkKind::Logaggregator,
            config: serde_json::to_value(config)?,
            host_managed: true,
        })
    }

    /// When it had all.
    pub(super) async fn all(&self) -> Result<Instant> {
        let thread = self.thread.lock().map_or(None, |mut thread| thread.take());
        let thread = thread.context("it was asked before")?;
        let begun = Instant::now();
        while !thread.is_finished() {
            ensure!(begun.elapsed() < PATIENCE, "the sink does not get all");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the receiver has panicked"))?
    }
}

fn take(mut stream: TcpStream, job: &str, period: usize, total: usize) -> Result<Instant> {
    let mut buffer = vec![0; CHUNK];
    let (mut filled, mut count) = (0, 0);
    let mut last = Id::default();
    loop {
        let read = stream.read(&mut buffer[filled..])?;
        ensure!(read > 0, "the connection ended after {count} of {total} lines");
        filled += read;
        let mut from = 0;
        let mut has: BTreeMap<&[u8], Id> = BTreeMap::new();
        while let Framed::Whole { from: start, to } = framed(&buffer[from..filled]) {
            let record = Record::parse(&buffer[from + start..from + to]).context("not our form")?;
            from += to;
            has.insert(record.process, record.id);
            // Others of this host log as well.
            if !record.process.ends_with(job.as_bytes()) {
                continue;
            }
            ensure!(record.id.seq == last.seq + 1, "{:?} follows {last:?}", record.id);
            last = record.id;
            let number = record.text.get(..DIGITS).context("a line without a number")?;
            let number: usize = std::str::from_utf8(number)?.parse()?;
            if number != count % period {
                bail!("line {number} is in the place of {}", count % period);
            }
            count += 1;
        }
        for (process, Id { run, seq }) in has {
            writeln!(stream, "{} {run} {seq}", String::from_utf8_lossy(process))?;
        }
        buffer.copy_within(from..filled, 0);
        filled -= from;
        if count == total {
            return Ok(Instant::now());
        }
    }
}
