//! Many jobs come and go: nothing may be left of them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use flynn_api::host::JobState;
use flynn_hostd::container::OwnLayer;
use futures::future::join_all;

use crate::host::{Host, pids_below};
use crate::network::{config, networked};

const AT_ONCE: usize = 8;

/// What there is of a host, by name.
type Counts = BTreeMap<&'static str, u64>;

pub(crate) async fn cycles_leave_nothing() {
    let cycles = if std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1") {
        10_000
    } else {
        40
    };
    let host = Host::boot().await;
    host.api.configure_network(&config()).await.unwrap();
    // A job that keeps the image in use.
    host.run(&networked(&host, "exec sleep 1000000")).await;
    // What is made once and kept is there after these: connections, groups, the first of everything.
    cycle(&host, 2 * AT_ONCE).await;
    let at_rest = host
        .until(async || {
            let counts = counts(&host).await;
            // The daemon; the job's supervisor, init and program; a supervisor that waits for the next job.
            (counts["processes"] == 5 && counts["working files"] == 4).then_some(counts)
        })
        .await;
    let Some(before) = at_rest else {
        panic!("something is left of a few: {:?}", counts(&host).await)
    };
    cycle(&host, cycles).await;
    let settled = host
        .until(async || {
            let counts = counts(&host).await;
            counts
                .iter()
                .all(|(what, count)| count <= &before[what])
                .then_some(())
        })
        .await;
    assert!(
        settled.is_some(),
        "of {before:?} has become {:?}",
        counts(&host).await
    );
}

/// Starts and stops so many jobs.
async fn cycle(host: &Host, count: usize) {
    let left = Cell::new(count);
    let worker = async || {
        while let Some(rest) = left.get().checked_sub(1) {
            left.set(rest);
            let job = networked(host, "exec sleep 1000000");
            let running = host.run(&job).await;
            assert_eq!(running.status, JobState::Running, "{running:?}");
            host.api.stop_job(&job.id).await.unwrap();
            let ended = host.end(&job.id).await;
            assert_eq!(
                (ended.status, ended.exit_status),
                (JobState::Done, Some(143)),
                "{ended:?}"
            );
        }
    };
    join_all((0..AT_ONCE).map(|_| worker())).await;
}

async fn counts(host: &Host) -> Counts {
    let entries = |dir: &Path| fs::read_dir(dir).map_or(0, Iterator::count) as u64;
    let lines = |file: &str| fs::read_to_string(file).unwrap().lines().count() as u64;
    let mut pids: Vec<_> = host.groups.iter().flat_map(|group| pids_below(group)).collect();
    pids.sort_unstable();
    pids.dedup();
    let maps = host.api.network().await.unwrap().maps;
    let of_living = [&OwnLayer::NAMES[..], &["root", "launch.json"]].concat();
    let jobs = fs::read_dir(host.state.join("jobs")).unwrap().flatten();
    let working = jobs.map(|job| {
        of_living
            .iter()
            .filter(|name| job.path().join(name).exists())
            .count()
    });
    [
        ("processes", pids.len() as u64),
        (
            "cgroups",
            host.groups.iter().map(|group| groups_below(group)).sum(),
        ),
        ("mounts", lines("/proc/thread-self/mountinfo")),
        ("interfaces", lines("/proc/thread-self/net/dev")),
        ("map entries", maps.iter().map(|map| map.entries).sum()),
        (
            "the daemon's descriptors",
            entries(Path::new(&format!("/proc/{}/fd", host.daemon_pid()))),
        ),
        ("sockets of jobs", entries(Path::new("/run/flynn/jobs"))),
        ("working files", working.sum::<usize>() as u64),
    ]
    .into()
}

fn groups_below(group: &Path) -> u64 {
    let children = fs::read_dir(group).into_iter().flatten().flatten();
    let children = children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    children.map(|entry| 1 + groups_below(&entry.path())).sum()
}
