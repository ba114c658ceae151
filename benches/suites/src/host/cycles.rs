//! Jobs are started and stopped, eight at once, again and again: what is left?

use std::cell::Cell;
use std::time::Instant;

use anyhow::Result;
use futures::future::try_join_all;

use super::census::Census;
use super::ours::Host;
use super::subject;
use crate::inside::memory;
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

const AT_ONCE: u32 = 8;

/// More than the ended jobs that a daemon keeps: from then on its memory has no reason to grow.
const WARM_UP: u32 = 320;

/// The rows of [`measure`].
pub(super) const SUBJECTS: [Subject; 2] = [
    subject(
        "start/stop cycles, 8 at once: leaked",
        "things",
        None,
        Goal::AtMost(0.0),
    ),
    subject("  the daemon has grown by", "MB", None, Goal::AtMost(1.0)),
];

/// Takes the rows.
pub(super) fn measure(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let count = thoroughness.pick(500, 10_000);
    cycle(host, WARM_UP)?;
    let (before, memory_before) = (Census::of(host)?, memory_of(host)?);
    let begun = Instant::now();
    cycle(host, count)?;
    let took = begun.elapsed().as_secs_f64();
    eprintln!(
        "    {count} cycles in {took:.1} s, {:.1} each second",
        f64::from(count) / took
    );
    let (after, memory_after) = (Census::of(host)?, memory_of(host)?);
    let leaked = after.more_than(&before);
    eprintln!("    before {before:?}\n    after  {after:?}\n    more: {leaked:?}");
    let things: u64 = leaked.iter().map(|(_, count)| count).sum();
    let samples = count as usize;
    #[expect(clippy::cast_precision_loss, reason = "a few leaked things")]
    let things = things as f64;
    Ok(vec![
        SUBJECTS[0].figure(things, samples),
        SUBJECTS[1].figure(memory_after - memory_before, samples),
    ])
}

/// Starts and stops so many jobs. None may hang, and each ends well.
fn cycle(host: &Host, count: u32) -> Result<()> {
    let left = Cell::new(count);
    let worker = async || -> Result<()> {
        while let Some(rest) = left.get().checked_sub(1) {
            left.set(rest);
            let job = host.speaking(&host.image, "sleep 1000 & wait");
            let started = host.start(&job).await?;
            host.stop(started).await?;
        }
        Ok(())
    };
    let workers = (0..AT_ONCE).map(|_| worker());
    host.runtime.block_on(try_join_all(workers)).map(drop)
}

/// Megabytes of the daemon, shared pages by the share.
fn memory_of(host: &Host) -> Result<f64> {
    memory::of_pid(host.daemon_pid()).map(|process| memory::megabytes(process.pss))
}
