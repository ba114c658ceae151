//! How fast one job can write without losing a line.
//!
//! It copies a file of numbered lines to its standard output, again and again. What is in its log at the end must be the
//! last of them without a gap, and its supervisor must have written at least as much as the job has.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flynn_api::host::{LogLine, LogStream};
use futures::TryStreamExt as _;
use tokio::time::timeout;

use super::ours::{FIFO, Host, PATIENCE, PROBE};
use super::subject;
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

/// The size of the file that is copied.
const FILE: usize = 64 << 20;

/// The digits of a line's number.
const DIGITS: usize = 9;

/// The rows of [`measure`].
pub(super) const SUBJECTS: [Subject; 4] = [
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
];

/// Takes the rows.
pub(super) fn measure(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let (copies, rounds) = thoroughness.pick((4, 3), (16, 7));
    let mut rows = Vec::new();
    for (length, subjects) in [(1024, &SUBJECTS[..2]), (100, &SUBJECTS[2..])] {
        let lines = FILE / length;
        fs::write(host.probe().join("lines"), numbered(lines, length)?)?;
        let mut rates = Vec::new();
        let mut cores = Vec::new();
        for _ in 0..rounds {
            let (rate, core) = once(host, copies, lines, length)?;
            eprintln!("    lines of {length}: {rate:.0} MB/s, {core:.2} cores of the supervisor");
            rates.push(rate);
            cores.push(core);
        }
        rows.push(subjects[0].row(&rates, &[]));
        rows.push(subjects[1].row(&cores, &[]));
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

/// One job; gives what it wrote in MB/s, and how many cores its supervisor took.
fn once(host: &Host, copies: usize, lines: usize, length: usize) -> Result<(f64, f64)> {
    // Once the last word is said, all but what a pipe holds has been read.
    let script = format!(
        "i=0; while [ $i -lt {copies} ]; do cat {PROBE}/lines || exit 1; i=$((i+1)); done; \
         echo written >{PROBE}/{FIFO}; sleep 1000 & wait"
    );
    let job = host.speaking(&host.image, &script);
    host.runtime.block_on(async {
        let written = host.expect("written")?;
        let started = host.start(&job).await?;
        let begun = Instant::now();
        let supervisor = host.api.job(&job.id).await?.supervisor_pid;
        let supervisor = supervisor.context("the job has no supervisor")?;
        let cpu_before = cpu(supervisor)?;
        let written = timeout(10 * PATIENCE, written)
            .await
            .context("it is not written in time")??;
        let took = written.duration_since(begun).as_secs_f64();
        let cores = (cpu(supervisor)? - cpu_before) / took;
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
