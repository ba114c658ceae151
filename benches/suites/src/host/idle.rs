//! What containers that do nothing have in memory, of ours.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::census::pids;
use super::ours::Host;
use super::subject;
use crate::inside::memory;
use crate::row::{Goal, Row, Subject};
use crate::suites::Thoroughness;

const CONTAINERS: u32 = 500;

/// How long they are left alone first.
const REST: Duration = Duration::from_secs(3);

/// The rows of [`measure`].
pub(super) const SUBJECTS: [Subject; 2] = [
    subject(
        "500 idle containers: supervisor and init (PSS), each",
        "MB",
        None,
        Goal::AtMost(2.0),
    ),
    subject("  the daemon", "MB", None, Goal::AtMost(50.0)),
];

/// Takes the rows.
pub(super) fn measure(host: &Host, _: Thoroughness) -> Result<Vec<Row>> {
    host.runtime.block_on(async {
        let jobs = (0..CONTAINERS).map(|_| host.speaking(&host.image, "exec sleep 1000000"));
        let jobs: Vec<_> = jobs.collect();
        stream::iter(&jobs)
            .map(|job| host.start(job))
            .buffer_unordered(8)
            .try_for_each(async |_| Ok(()))
            .await
    })?;
    std::thread::sleep(REST);
    let mut supervisors = (0_u32, 0);
    let mut daemon = 0;
    for pid in pids(host) {
        // Jobs' own processes have a name that is not ours.
        let process = memory::of_pid(pid)?;
        if pid == host.daemon_pid() {
            daemon = process.pss;
        } else if process.name.starts_with("flynn-host supervise") {
            supervisors = (supervisors.0 + 1, supervisors.1 + process.pss);
        }
    }
    // With the first job's, two processes each; and the supervisor that waits for the next job.
    let expected = 2 * (CONTAINERS + 1);
    ensure!(
        (expected..=expected + 1).contains(&supervisors.0),
        "there are {} supervisors and inits",
        supervisors.0
    );
    let each = memory::megabytes(supervisors.1) / f64::from(CONTAINERS + 1);
    Ok(vec![
        SUBJECTS[0].figure(each, CONTAINERS as usize),
        SUBJECTS[1].figure(memory::megabytes(daemon), 1),
    ])
}
