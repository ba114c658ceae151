//! How fast one job can write without losing a line: to its log alone, and to a sink as well.
//!
//! It copies a file of numbered lines to its standard output, again and again. What is in its log at the end must be the
//! last of them without a gap, and its supervisor must have written at least as much as the job has. The sink
//! ([`Receiver`]) must have got each line once, in order; it acknowledges what it has, as a log aggregator does, and the
//! time counts until it has all.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flynn_api::host::{LogLine, LogStream};
use futures::TryStreamExt as _;
use tokio::time::timeout;

use super::ours::{FIFO, Host, PATIENCE, PROBE};
use super::receiver::Receiver;
use super::subject;
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

/// The size of the file that is copied.
const FILE: usize = 64 << 20;

/// The digits of a line's number.
pub(super) const DIGITS: usize = 9;

/// The rows of [`measure`].
pub(super) const SUBJECTS: [Subject; 8] = [
    subject(
        "one job's log in lines of 1 KiB",
        "MB/s",
        None,
        Goal::AtLeast(200.0),
    ),
    subject("  cores of its supervisor", "", None, Goal::AtMost(1.0)),
    subject(
        "one job's log in lines of 100 bytes",
        "MB/s",
        None,
        Goal::AtLeast(60.0),
    ),
    subject("  cores of its supervisor", "", None, Goal::AtMost(1.0)),
    subject(
        "one job's log to disk and sink in lines of 1 KiB",
        "MB/s",
        None,
        Goal::AtLeast(200.0),
    ),
    subject("  cores of supervisor and daemon", "", None, Goal::AtMost(1.0)),
    subject(
        "one job's log to disk and sink in lines of 100 bytes",
        "MB/s",
        None,
        Goal::AtLeast(60.0),
    ),
    subject("  cores of supervisor and daemon", "", None, Goal::AtMost(1.0)),
];

/// Takes the rows.
pub(super) fn measure(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let (copies, rounds) = thoroughness.pick((4, 3), (16, 7));
    let mut rows = Vec::new();
    let (alone, with_sink) = SUBJECTS.split_at(4);
    for (subjects, to_sink) in [(alone, false), (with_sink, true)] {
        for (length, subjects) in [(1024, &subjects[..2]), (100, &subjects[2..])] {
            let lines = FILE / length;
            fs::write(host.probe().join("lines"), numbered(lines, length)?)?;
            let mut rates = Vec::new();
            let mut cores = Vec::new();
            for _ in 0..rounds {
                let (rate, core) = once(host, copies, lines, length, to_sink)?;
                let what = if to_sink { ", with a sink" } else { "" };
                eprintln!("    lines of {length}{what}: {rate:.0} MB/s, {core:.2} cores");
                rates.push(rate);
                cores.push(core);
            }
            rows.push(subjects[0].row(&rates, &[]));
            rows.push(subjects[1].row(&cores, &[]));
        }
    }
    Ok(rows)
}

/// So many lines of this length, their ends counted.
fn numbered(lines: usize, length: usize) -> Result<String> {
    let mut text = String::with_capacity(lines * length);
    let filling = "the quick brown fox jumps over the lazy dog; ".repeat(length / 40 + 1);
    for number in 0..lines {
        writeln!(text, "{number:0DIGITS$} {}", &filling[..length - DIGITS - 2])?;
    }
    Ok(text)
}

/// One job; gives what it wrote in MB/s, and how many cores that took: its supervisor's, and with a sink the daemon's.
fn once(host: &Host, copies: usize, lines: usize, length: usize, to_sink: bool) -> Result<(f64, f64)> {
    // Once the last word is said, all but what a pipe holds has been read.
    let script = format!(
        "i=0; while [ $i -lt {copies} ]; do cat {PROBE}/lines || exit 1; i=$((i+1)); done; \
         echo written >{PROBE}/{FIFO}; sleep 1000 & wait"
    );
    let job = host.speaking(&host.image, &script);
    let receiver = to_sink
        .then(|| Receiver::start(&job.id, lines, lines * copies))
        .transpose()?;
    host.runtime.block_on(async {
        if let Some(receiver) = &receiver {
            host.api.put_sink(&receiver.sink()?).await?;
            // Logs of the jobs before.
            let caught_up = async {
                loop {
                    let sinks = host.api.sinks().await?;
                    if sinks.iter().all(|sink| sink.connected && sink.waiting_bytes == 0) {
                        return anyhow::Ok(());
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            timeout(PATIENCE, caught_up)
                .await
                .context("the sink does not catch up")??;
        }
        let written = host.expect("written")?;
        let started = host.start(&job).await?;
        let begun = Instant::now();
        // The program may speak before the daemon has heard of it.
        let supervisor = host
            .until("the job's supervisor", async || {
                host.api.job(&job.id).await.ok()?.supervisor_pid
            })
            .await?;
        let used = || {
            let daemon = if to_sink { cpu(host.daemon_pid())? } else { 0.0 };
            anyhow::Ok(cpu(supervisor)? + daemon)
        };
        let before = used()?;
        let mut end = timeout(10 * PATIENCE, written)
            .await
            .context("it is not written in time")??;
        if let Some(receiver) = &receiver {
            end = receiver.all().await?;
        }
        let took = end.duration_since(begun).as_secs_f64();
        let cores = (used()? - before) / took;
        let bytes = lines * length * copies;
        let stored = async {
            while written_by(supervisor)? < bytes as u64 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, stored)
            .await
            .context("its supervisor has written less than the job")??;
        let id = started.id.clone();
        host.stop(started).await?;
        let log = host.api.log(&id, None, false).await?;
        let log: Vec<LogLine> = log.map_ok(|(_, line)| line).try_collect().await?;
        gapless(&log, lines)?;
        if let Some(receiver) = &receiver {
            let dropped = host
                .api
                .sinks()
                .await?
                .iter()
                .map(|sink| sink.dropped_lines)
                .sum::<u64>();
            ensure!(dropped == 0, "{dropped} lines did not reach the sink");
            host.api.remove_sink(&receiver.sink()?.id).await?;
        }
        #[expect(clippy::cast_precision_loss, reason = "some gigabytes")]
        let megabytes = bytes as f64 / 1e6;
        Ok((megabytes / took, cores))
    })
}

/// Whether these lines are the last that were written, without a gap.
fn gapless(log: &[LogLine], lines: usize) -> Result<()> {
    let numbers = log.iter().map(|line| {
        ensure!(
            line.stream == LogStream::Stdout,
            "the supervisor says {}",
            line.msg
        );
        let number = line.msg.get(..DIGITS).context("a line without a number")?;
        Ok(number.parse::<usize>()?)
    });
    let numbers = numbers.collect::<Result<Vec<_>>>()?;
    ensure!(
        numbers.last() == Some(&(lines - 1)),
        "the last line is {:?}, not {}",
        numbers.last(),
        lines - 1
    );
    let gap = numbers.windows(2).find(|pair| pair[1] != (pair[0] + 1) % lines);
    ensure!(gap.is_none(), "there is a gap: {gap:?}");
    Ok(())
}

/// Seconds of CPU that a process has taken.
fn cpu(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("an odd stat")?;
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u32>);
    let ticks = ticks.sum::<Result<u32, _>>()?;
    #[expect(clippy::cast_precision_loss, reason = "a hundred")]
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    Ok(f64::from(ticks) / per_second)
}

/// Bytes that a process has written, wherever to.
fn written_by(pid: u32) -> Result<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "));
    Ok(line.context("an odd io")?.parse()?)
}
