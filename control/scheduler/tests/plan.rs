//! The planner's rules, one by one.

use std::collections::BTreeMap;

use flynn_api::Meta;
use flynn_api::controller::{
    App, ExpandedFormation, JobState as Told, ProcessType, Release, SYSTEM_APP, VolumeReq,
};
use flynn_api::host::{ActiveJob, Job, JobState};
use flynn_scheduler::plan::{Desired, Plan, plan};
use flynn_scheduler::report::Outbox;
use flynn_scheduler::view::View;
use jiff::{SignedDuration, Timestamp};

const START: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(START + seconds).expect("a time")
}

fn formation(release: &str, count: u32, process: ProcessType) -> ExpandedFormation {
    ExpandedFormation {
        app: App {
            id: "app".into(),
            name: "app".into(),
            ..App::default()
        },
        release: Release {
            id: release.into(),
            processes: BTreeMap::from([("web".into(), process)]),
            ..Release::default()
        },
        processes: BTreeMap::from([("web".into(), count)]),
        ..ExpandedFormation::default()
    }
}

fn active(job: Job, status: JobState) -> ActiveJob {
    ActiveJob {
        job,
        status,
        host_id: String::new(),
        internal_ip: None,
        ports: Vec::new(),
        user_namespace: None,
        pid: None,
        supervisor_pid: None,
        paused: false,
        created_at: at(-100),
        started_at: Some(at(-90)),
        ended_at: status.is_terminal().then(|| at(-1)),
        exit_status: None,
        error: None,
        restarts: 0,
        oom_killed: false,
        healthy: status == JobState::Running,
    }
}

/// Hosts with these jobs, all well.
fn view(hosts: &[(&str, Vec<ActiveJob>)]) -> View {
    let mut view = View::default();
    view.registered(
        &hosts.iter().map(|(id, _)| ((*id).to_owned(), false)).collect(),
        at(0),
    );
    for (id, jobs) in hosts {
        view.answering(id, true, at(0));
        let asked = view.ask();
        let jobs = jobs
            .iter()
            .map(|active| (active.job.id.clone(), active.clone()))
            .collect();
        view.list(id, asked, &jobs, at(0));
    }
    view
}

fn running(formation: &ExpandedFormation, id: &str) -> ActiveJob {
    active(formation.job("web", id, 0).expect("a job"), JobState::Running)
}

fn desired(formations: &[ExpandedFormation]) -> Desired {
    Desired::new(formations.to_vec(), at(0))
}

fn starts(plan: &Plan) -> Vec<&str> {
    plan.starts.iter().map(|start| start.host.as_str()).collect()
}

fn stops(plan: &Plan) -> Vec<&str> {
    plan.stops.iter().map(|stop| stop.id.as_str()).collect()
}

#[test]
fn jobs_spread_and_omni_jobs_are_everywhere() {
    let hosts = view(&[("a", vec![]), ("b", vec![]), ("c", vec![])]);
    let three = desired(&[formation("r", 3, ProcessType::default())]);
    assert_eq!(starts(&plan(&three, &hosts, at(0))), ["a", "b", "c"]);
    let omni = desired(&[formation(
        "r",
        2,
        ProcessType {
            omni: true,
            ..ProcessType::default()
        },
    )]);
    assert_eq!(
        starts(&plan(&omni, &hosts, at(0))),
        ["a", "a", "b", "b", "c", "c"]
    );
}

#[test]
fn tags_decide_and_what_cannot_be_placed_is_said() {
    let mut hosts = view(&[("a", vec![]), ("b", vec![])]);
    hosts.host("b", at(0)).facts.tags = Meta::from([("disk".into(), "ssd".into())]);
    let mut wanted = formation("r", 2, ProcessType::default());
    wanted.tags = BTreeMap::from([("web".into(), Meta::from([("disk".into(), "ssd".into())]))]);
    assert_eq!(
        starts(&plan(&desired(std::slice::from_ref(&wanted)), &hosts, at(0))),
        ["b", "b"]
    );
    let misplaced = view(&[("a", vec![running(&wanted, "a-1")])]);
    let planned = plan(&desired(&[wanted]), &misplaced, at(0));
    assert_eq!(stops(&planned), ["a-1"]);
    assert!(planned.blocked[0].reason.contains("tags"), "{planned:?}");
}

#[test]
fn nothing_is_done_before_enough_is_known() {
    let wanted = formation("r", 1, ProcessType::default());
    let hosts = view(&[("a", vec![running(&wanted, "a-1")])]);
    assert_eq!(
        plan(&Desired::default(), &hosts, at(0)),
        Plan::default(),
        "the list has not been read"
    );
    // One host's jobs are not known yet: what is missing may run there.
    let mut hosts = view(&[("a", vec![])]);
    hosts.registered(&BTreeMap::from([("a".into(), false), ("b".into(), false)]), at(0));
    let planned = plan(&desired(std::slice::from_ref(&wanted)), &hosts, at(0));
    assert_eq!((planned.starts.len(), planned.wake_at), (0, Some(at(60))));
    assert_eq!(
        starts(&plan(&desired(&[wanted]), &hosts, at(60))),
        ["a"],
        "but not for ever"
    );
}

#[test]
fn a_list_older_than_a_job_says_nothing_about_it() {
    let unknown = running(&formation("other", 1, ProcessType::default()), "a-1");
    let hosts = view(&[("a", vec![unknown])]);
    let older = Desired::new(Vec::new(), at(-200));
    assert!(plan(&older, &hosts, at(0)).stops.is_empty());
    assert_eq!(stops(&plan(&desired(&[]), &hosts, at(0))), ["a-1"]);
}

#[test]
fn the_platform_keeps_its_last_job() {
    let mut old = formation("old", 0, ProcessType::default());
    old.app.meta = Meta::from([(SYSTEM_APP.into(), "true".into())]);
    let mut new = formation("new", 1, ProcessType::default());
    new.app.meta = old.app.meta.clone();
    let job = running(&old, "a-1");
    let hosts = view(&[("a", vec![job.clone()])]);
    assert!(
        plan(&desired(&[]), &hosts, at(0)).stops.is_empty(),
        "no formation at all"
    );
    assert!(
        plan(&desired(&[old.clone()]), &hosts, at(0)).stops.is_empty(),
        "scaled to nothing"
    );
    assert!(
        plan(&desired(&[old.clone(), new.clone()]), &hosts, at(0))
            .stops
            .is_empty(),
        "the new one is not up"
    );
    let both = view(&[("a", vec![job, running(&new, "a-2")])]);
    assert_eq!(stops(&plan(&desired(&[old, new]), &both, at(0))), ["a-1"]);
}

#[test]
fn what_cannot_be_shared_is_handed_over() {
    let data = ProcessType {
        volumes: vec![VolumeReq {
            path: "/data".into(),
            delete_on_stop: false,
            limit: None,
        }],
        ..ProcessType::default()
    };
    let port = ProcessType {
        host_network: true,
        omni: true,
        ..ProcessType::default()
    };
    for process in [data, port] {
        let mut old = formation("old", 0, process.clone());
        old.app.meta = Meta::from([(SYSTEM_APP.into(), "true".into())]);
        let mut new = formation("new", 1, process.clone());
        new.app.meta = old.app.meta.clone();
        let mut job = running(&old, "a-1");
        let both = desired(&[old.clone(), new]);
        let mut hosts = view(&[("a", vec![job.clone()])]);
        assert!(
            plan(&desired(&[old]), &hosts, at(0)).stops.is_empty(),
            "nobody takes over yet"
        );
        let planned = plan(&both, &hosts, at(0));
        assert_eq!((stops(&planned), starts(&planned)), (vec!["a-1"], vec![]));
        assert!(planned.blocked[0].reason.contains("stopping"), "{planned:?}");
        hosts.stopping("a-1", at(0));
        assert!(
            plan(&both, &hosts, at(1)).starts.is_empty(),
            "the old job has not ended"
        );
        job.status = JobState::Done;
        job.healthy = false;
        job.ended_at = Some(at(2));
        hosts.observe("a", &job, at(2));
        let planned = plan(&both, &hosts, at(2));
        assert_eq!((starts(&planned), planned.starts[0].volume_index), (vec!["a"], 0));
    }
}

/// A volume is its app's and process type's: whichever release comes next finds it, on whichever host it is.
#[test]
fn the_next_release_goes_to_its_volumes() {
    let process = |limit| ProcessType {
        volumes: vec![VolumeReq {
            path: "/data".into(),
            delete_on_stop: false,
            limit,
        }],
        ..ProcessType::default()
    };
    let volume = flynn_api::spec::volume_id("app", "web", "/data", 0);
    for owner in ["a", "b", "c"] {
        let mut hosts = view(&[("a", vec![]), ("b", vec![]), ("c", vec![])]);
        hosts.host(owner, at(0)).volumes = [volume.clone()].into();
        for (release, limit) in [("old", None), ("new", None), ("larger", Some(1 << 30))] {
            let wanted = formation(release, 1, process(limit));
            let planned = plan(&desired(std::slice::from_ref(&wanted)), &hosts, at(0));
            assert_eq!(
                (starts(&planned), planned.starts[0].volume_index),
                (vec![owner], 0)
            );
            let job = wanted.job("web", "x", 0).expect("a job");
            assert_eq!(job.config.volumes[0].volume_id, volume);
            assert_eq!(job.config.volumes[0].limit, limit);
        }
        // Another one has data of its own, and waits for no host.
        let two = desired(&[formation("new", 2, process(None))]);
        let mut indices: Vec<_> = plan(&two, &hosts, at(0))
            .starts
            .iter()
            .map(|start| (start.volume_index, start.host == owner))
            .collect();
        indices.sort_unstable();
        assert_eq!(indices, [(0, true), (1, false)]);
        // And nothing begins anew elsewhere while its host is away.
        hosts.answering(owner, false, at(0));
        let one = desired(&[formation("new", 1, process(None))]);
        assert!(plan(&one, &hosts, at(0)).starts.is_empty());
    }
}

/// What the controller would take of this: it refuses states that go backward while `restarts` do not grow.
#[test]
fn jobs_that_come_back_are_told_of_as_up() {
    for (resurrect, restarts) in [(true, 1), (false, 0)] {
        let process = ProcessType {
            resurrect,
            ..ProcessType::default()
        };
        let mut job = running(&formation("r", 1, process), "a-1");
        let mut hosts = view(&[("a", vec![job.clone()])]);
        let mut outbox = Outbox::default();
        let mut told = Vec::new();
        let mut tell = |hosts: &View| {
            outbox.update(hosts);
            while let Some(report) = outbox.first().cloned() {
                told.push((report.state, report.restarts.unwrap()));
                outbox.taken(report);
            }
        };
        tell(&hosts);
        // Its host is without power, and comes back; or it was only out of reach.
        hosts.registered(&BTreeMap::new(), at(10));
        hosts.answering("a", false, at(10));
        tell(&hosts);
        hosts.registered(&BTreeMap::from([("a".into(), false)]), at(100));
        hosts.answering("a", true, at(100));
        job.restarts = restarts;
        let asked = hosts.ask();
        hosts.list("a", asked, &BTreeMap::from([("a-1".into(), job)]), at(100));
        tell(&hosts);
        let states: Vec<_> = told.iter().map(|(state, _)| *state).collect();
        assert_eq!(states, [Told::Up, Told::Down, Told::Up]);
        assert!(told[2].1 > told[1].1, "{told:?}");
    }
}

#[test]
fn the_first_to_go_are_those_that_do_not_run_yet_and_then_the_newest() {
    let wanted = formation("r", 1, ProcessType::default());
    let mut newest = running(&wanted, "a-2");
    newest.created_at = at(-50);
    let starting = ActiveJob {
        healthy: false,
        ..running(&wanted, "a-3")
    };
    let hosts = view(&[("a", vec![running(&wanted, "a-1"), newest, starting])]);
    assert_eq!(stops(&plan(&desired(&[wanted]), &hosts, at(0))), ["a-3", "a-2"]);
}

#[test]
fn what_its_host_restarts_is_not_replaced_unless_the_host_is_gone() {
    let wanted = formation(
        "r",
        1,
        ProcessType {
            resurrect: true,
            ..ProcessType::default()
        },
    );
    let crashed = active(wanted.job("web", "a-1", 0).expect("a job"), JobState::Crashed);
    let mut hosts = view(&[("a", vec![crashed]), ("b", vec![])]);
    assert!(
        plan(&desired(std::slice::from_ref(&wanted)), &hosts, at(0))
            .starts
            .is_empty()
    );
    hosts.answering("a", false, at(1));
    assert!(
        plan(&desired(std::slice::from_ref(&wanted)), &hosts, at(1))
            .starts
            .is_empty(),
        "one signal is not enough"
    );
    hosts.registered(&BTreeMap::from([("b".into(), false)]), at(2));
    assert_eq!(starts(&plan(&desired(&[wanted]), &hosts, at(2))), ["b"]);
}

#[test]
fn restarts_wait_longer_and_longer() {
    let wanted = formation("r", 1, ProcessType::default());
    let crashed = |restarts: u32| {
        let mut job = wanted.job("web", "a-1", 0).expect("a job");
        job.metadata
            .insert(flynn_scheduler::view::RESTARTS.into(), restarts.to_string());
        ActiveJob {
            started_at: Some(at(-2)),
            ..active(job, JobState::Crashed)
        }
    };
    let planned = |restarts: u32, now: i64| {
        let hosts = view(&[("a", vec![crashed(restarts)])]);
        plan(&desired(std::slice::from_ref(&wanted)), &hosts, at(now))
    };
    assert_eq!(planned(4, 0).starts[0].restarts, 5);
    assert_eq!(
        (planned(5, 8).starts.len(), planned(5, 0).wake_at),
        (0, Some(at(-1) + SignedDuration::from_secs(10)))
    );
    assert_eq!(planned(5, 9).starts[0].replaces.as_deref(), Some("a-1"));
    assert_eq!(
        (planned(15, 28).starts.len(), planned(15, 29).starts.len()),
        (0, 1)
    );
}

#[test]
fn a_drained_host_s_jobs_go_when_others_are_up() {
    let two = formation("r", 2, ProcessType::default());
    let here = || vec![running(&two, "a-1"), running(&two, "a-2")];
    let mut hosts = view(&[("a", here()), ("b", vec![])]);
    hosts.host("a", at(0)).facts.draining = true;
    let wanted = desired(std::slice::from_ref(&two));
    let first = plan(&wanted, &hosts, at(0));
    assert_eq!(starts(&first), ["b", "b"]);
    assert!(stops(&first).is_empty(), "nothing stops before others are up");
    // One is up, the other still comes.
    let coming = active(two.job("web", "b-2", 0).unwrap(), JobState::Starting);
    let mut hosts = view(&[("a", here()), ("b", vec![running(&two, "b-1"), coming])]);
    hosts.host("a", at(0)).facts.draining = true;
    let second = plan(&wanted, &hosts, at(0));
    assert!(starts(&second).is_empty());
    assert_eq!(stops(&second).len(), 1);
    // With nowhere to go they stay, and it is said.
    let mut alone = view(&[("a", here())]);
    alone.host("a", at(0)).facts.draining = true;
    let stuck = plan(&wanted, &alone, at(0));
    assert!(stops(&stuck).is_empty() && !stuck.blocked.is_empty());
    // Nobody wants them any more: they need no others.
    let none = desired(&[formation("r", 0, ProcessType::default())]);
    assert_eq!(stops(&plan(&none, &alone, at(0))), ["a-1", "a-2"]);
}

#[test]
fn what_belongs_to_a_host_stays_while_it_is_drained() {
    let omni = formation(
        "r",
        1,
        ProcessType {
            omni: true,
            ..ProcessType::default()
        },
    );
    let volume = VolumeReq {
        path: "/data".into(),
        ..VolumeReq::default()
    };
    let data = formation(
        "r",
        1,
        ProcessType {
            volumes: vec![volume],
            ..ProcessType::default()
        },
    );
    for formation in [omni, data] {
        let mut hosts = view(&[("a", vec![running(&formation, "a-1")])]);
        hosts.host("a", at(0)).facts.draining = true;
        let plan = plan(&desired(std::slice::from_ref(&formation)), &hosts, at(0));
        assert!(stops(&plan).is_empty() && starts(&plan).is_empty());
    }
}
