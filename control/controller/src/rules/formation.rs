//! Formations: what may be asked for, and when it is there.

use std::collections::BTreeMap;

use flynn_api::controller::{App, JobState, Processes, Release, SYSTEM_CRITICAL, Tags};
use flynn_api::{Error, Meta, Result};

use super::name;
use crate::data::jobs::Counts;

/// Jobs of one process type at most, per release (per host for omni types).
const MAX_COUNT: u32 = 1000;

/// Checks counts and tags against the release that they are for.
pub(crate) fn check(release: &Release, processes: &Processes, tags: &Tags) -> Result<()> {
    for (field, kind) in processes
        .keys()
        .map(|kind| ("processes", kind))
        .chain(tags.keys().map(|kind| ("tags", kind)))
    {
        if !release.processes.contains_key(kind) {
            let known: Vec<_> = release.processes.keys().map(String::as_str).collect();
            let known = if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            };
            let why = format!("the release has no such process type; it has: {known}");
            return Err(Error::invalid_field(&format!("{field}.{kind}"), why));
        }
    }
    for (kind, count) in processes {
        if *count > MAX_COUNT {
            let field = format!("processes.{kind}");
            return Err(Error::invalid_field(
                &field,
                format!("{count} is more than {MAX_COUNT}"),
            ));
        }
    }
    tags.iter()
        .try_for_each(|(kind, tags)| name::meta(&format!("tags.{kind}"), tags))
}

/// Refuses to take the last processes of an app that the platform cannot do without.
pub(crate) fn keep_critical(app: &App, total_after: u64) -> Result<()> {
    if total_after == 0 && app.meta.get(SYSTEM_CRITICAL).is_some_and(|value| value == "true") {
        let name = &app.name;
        let why = format!("{name} is critical to the platform: at least one of its processes has to stay");
        return Err(Error::conflict(why));
    }
    Ok(())
}

/// Whether any process type is omni, so that [`expected`] depends on the hosts.
pub(crate) fn depends_on_hosts(release: &Release, processes: &Processes) -> bool {
    processes
        .iter()
        .any(|(kind, count)| *count > 0 && is_omni(release, kind))
}

fn is_omni(release: &Release, kind: &str) -> bool {
    release.processes.get(kind).is_some_and(|process| process.omni)
}

/// How many jobs of each type there are once a formation is there: omni types count per host that has the tags.
pub(crate) fn expected(release: &Release, processes: &Processes, tags: &Tags, hosts: &[Meta]) -> Processes {
    let fits = |kind: &str, host: &Meta| {
        tags.get(kind)
            .is_none_or(|tags| tags.iter().all(|(key, value)| host.get(key) == Some(value)))
    };
    let count = |kind: &str, count: u32| {
        if !is_omni(release, kind) {
            return count;
        }
        let hosts = hosts.iter().filter(|host| fits(kind, host)).count();
        count.saturating_mul(u32::try_from(hosts).unwrap_or(u32::MAX))
    };
    processes
        .iter()
        .map(|(kind, n)| (kind.clone(), count(kind, *n)))
        .collect()
}

/// The jobs in one state, by type. One-off jobs are not counted.
pub(crate) fn in_state(counts: &Counts, state: JobState) -> BTreeMap<String, u32> {
    counts
        .iter()
        .filter(|((kind, found), _)| *found == state && !kind.is_empty())
        .map(|((kind, _), n)| (kind.clone(), *n))
        .collect()
}

/// The jobs that are not down, by type. One-off jobs are not counted.
pub(crate) fn alive(counts: &Counts) -> BTreeMap<String, u32> {
    let mut alive = BTreeMap::new();
    for ((kind, _), n) in counts.iter().filter(|((kind, _), _)| !kind.is_empty()) {
        *alive.entry(kind.clone()).or_default() += n;
    }
    alive
}

/// Whether the jobs are those that were expected: each type has its number up, no more, and none is still stopping.
pub(crate) fn is_reached(expected: &Processes, counts: &Counts) -> bool {
    let up = in_state(counts, JobState::Up);
    let of = |map: &BTreeMap<String, u32>, kind: &str| map.get(kind).copied().unwrap_or(0);
    in_state(counts, JobState::Stopping).is_empty()
        && expected
            .keys()
            .chain(up.keys())
            .all(|kind| of(expected, kind) == of(&up, kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::controller::ProcessType;

    fn release() -> Release {
        let omni = ProcessType {
            omni: true,
            ..ProcessType::default()
        };
        let processes = [("web".into(), ProcessType::default()), ("agent".into(), omni)].into();
        Release {
            processes,
            ..Release::default()
        }
    }

    fn processes(counts: &[(&str, u32)]) -> Processes {
        counts.iter().map(|(kind, n)| ((*kind).to_owned(), *n)).collect()
    }

    #[test]
    fn unknown_types_are_named_with_those_that_are_there() {
        let error = check(&release(), &processes(&[("wbe", 1)]), &Tags::new()).unwrap_err();
        assert_eq!(
            error.message,
            "processes.wbe: the release has no such process type; it has: agent, web"
        );
        assert!(check(&release(), &processes(&[("web", 1001)]), &Tags::new()).is_err());
    }

    #[test]
    fn omni_types_count_per_host_with_the_tags() {
        let hosts = [Meta::from([("disk".into(), "ssd".into())]), Meta::new()];
        let wanted = processes(&[("web", 3), ("agent", 1)]);
        let all = expected(&release(), &wanted, &Tags::new(), &hosts);
        assert_eq!(all, processes(&[("web", 3), ("agent", 2)]));
        let tags = Tags::from([("agent".into(), Meta::from([("disk".into(), "ssd".into())]))]);
        assert_eq!(expected(&release(), &wanted, &tags, &hosts)["agent"], 1);
        assert!(depends_on_hosts(&release(), &wanted));
        assert!(!depends_on_hosts(
            &release(),
            &processes(&[("web", 3), ("agent", 0)])
        ));
    }

    #[test]
    fn reached_means_up_and_nothing_left_over() {
        let count = |list: &[(&str, JobState, u32)]| -> Counts {
            list.iter()
                .map(|(kind, state, n)| (((*kind).to_owned(), *state), *n))
                .collect()
        };
        let wanted = processes(&[("web", 2)]);
        assert!(is_reached(&wanted, &count(&[("web", JobState::Up, 2)])));
        assert!(!is_reached(
            &wanted,
            &count(&[("web", JobState::Up, 1), ("web", JobState::Starting, 1)])
        ));
        assert!(!is_reached(
            &wanted,
            &count(&[("web", JobState::Up, 2), ("web", JobState::Stopping, 1)])
        ));
        assert!(!is_reached(&processes(&[]), &count(&[("web", JobState::Up, 1)])));
        assert!(
            is_reached(&processes(&[("web", 0)]), &count(&[("", JobState::Up, 1)])),
            "one-off jobs"
        );
    }

    #[test]
    fn the_platform_keeps_what_it_needs() {
        let meta = [(SYSTEM_CRITICAL.to_owned(), "true".to_owned())].into();
        let app = App {
            meta,
            ..App::default()
        };
        assert!(keep_critical(&app, 0).is_err() && keep_critical(&app, 1).is_ok());
        assert!(keep_critical(&App::default(), 0).is_ok());
    }
}
