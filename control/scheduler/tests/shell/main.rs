//! The whole scheduler against fakes of discoverd, the controller and a host.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod fake;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use fake::{Cluster, HOST};
use flynn_api::controller::{App, ExpandedFormation, JobState, ProcessType, Release};

fn formation(count: u32) -> ExpandedFormation {
    ExpandedFormation {
        app: App {
            id: "app".into(),
            name: "shop".into(),
            ..App::default()
        },
        release: Release {
            id: "release".into(),
            processes: BTreeMap::from([("web".into(), ProcessType::default())]),
            ..Release::default()
        },
        processes: BTreeMap::from([("web".into(), count)]),
        generation: 1,
        ..ExpandedFormation::default()
    }
}

#[tokio::test]
async fn keeps_what_is_wanted_and_tells_of_it() {
    let cluster = Cluster::start(vec![formation(2)], Vec::new(), true).await;
    cluster
        .wait("two run", |cluster| cluster.running().len() == 2)
        .await;
    let first = cluster.running()[0].clone();
    let state = |cluster: &Cluster, id: &str| cluster.reported(id).map(|report| report.state);
    cluster
        .wait("told that it is up", |cluster| {
            state(cluster, &first) == Some(JobState::Up)
        })
        .await;

    cluster.crash(&first);
    cluster
        .wait("told that it is down", |cluster| {
            state(cluster, &first) == Some(JobState::Down)
        })
        .await;
    assert_eq!(cluster.reported(&first).unwrap().exit_status, Some(3));
    cluster
        .wait("two run again", |cluster| cluster.running().len() == 2)
        .await;
    let replacement = cluster.running().into_iter().find(|id| {
        let jobs = cluster.jobs.lock().unwrap();
        jobs[id]
            .job
            .metadata
            .contains_key(flynn_scheduler::view::REPLACES)
    });
    cluster
        .wait("restarts are counted", |cluster| {
            cluster
                .reported(replacement.as_deref().unwrap())
                .is_some_and(|report| report.restarts == Some(1))
        })
        .await;

    *cluster.formations.lock().unwrap() = vec![formation(1)];
    cluster.changed();
    cluster
        .wait("one runs", |cluster| cluster.running().len() == 1)
        .await;
    let calls = cluster.calls.lock().unwrap().clone();
    let stop = calls.iter().position(|call| call.starts_with("stop")).unwrap();
    assert!(
        calls[stop - 1].starts_with("deregister"),
        "nobody is sent to a job that stops: {calls:?}"
    );
}

#[tokio::test]
async fn adopts_what_runs_and_stops_what_nobody_wants() {
    let adopted = formation(1).job("web", &format!("{HOST}-1"), 0).unwrap();
    let mut unwanted = formation(1);
    unwanted.app.id = "deleted".into();
    let unwanted = unwanted.job("web", &format!("{HOST}-2"), 0).unwrap();
    let mut one_off = formation(1).job("web", &format!("{HOST}-3"), 0).unwrap();
    one_off.metadata.remove(flynn_api::host::label::PROCESS_TYPE);
    let cluster = Cluster::start(vec![formation(1)], vec![adopted, unwanted, one_off], true).await;
    cluster
        .wait("the unwanted one is stopped", |cluster| {
            cluster.running().len() == 2
        })
        .await;
    assert_eq!(cluster.running(), [format!("{HOST}-1"), format!("{HOST}-3")]);
    cluster
        .wait("one-off jobs are reported", |cluster| {
            cluster.reported(&format!("{HOST}-3")).is_some()
        })
        .await;
    let calls = cluster.calls.lock().unwrap().clone();
    assert!(calls.iter().all(|call| call.ends_with("-2")), "{calls:?}");
}

#[tokio::test]
async fn without_the_controller_counts_are_kept_and_nothing_is_stopped() {
    let cluster = Cluster::start(vec![formation(2)], Vec::new(), true).await;
    cluster
        .wait("two run", |cluster| cluster.running().len() == 2)
        .await;
    cluster.controller_away.store(true, Ordering::Relaxed);
    *cluster.formations.lock().unwrap() = Vec::new();
    cluster.changed();
    let crashed = cluster.running()[0].clone();
    cluster.crash(&crashed);
    cluster
        .wait("the crashed one is replaced", |cluster| {
            cluster.running().len() == 2
        })
        .await;
    assert!(
        !cluster
            .calls
            .lock()
            .unwrap()
            .iter()
            .any(|call| call.starts_with("stop"))
    );

    cluster.controller_away.store(false, Ordering::Relaxed);
    let down = |report: &flynn_api::controller::Job| report.state == JobState::Down;
    cluster
        .wait("reports have waited", |cluster| {
            cluster.reported(&crashed).as_ref().is_some_and(down)
        })
        .await;
    cluster
        .wait("and now the list counts", |cluster| cluster.running().is_empty())
        .await;
}

#[tokio::test]
async fn a_host_is_given_up_on_two_signals_only() {
    let cluster = Cluster::start(vec![formation(1)], Vec::new(), true).await;
    cluster
        .wait("one runs", |cluster| cluster.running().len() == 1)
        .await;
    let job = cluster.running()[0].clone();
    let state = |cluster: &Cluster| cluster.reported(&job).map(|report| report.state);
    cluster
        .wait("told that it is up", |cluster| {
            state(cluster) == Some(JobState::Up)
        })
        .await;
    // One signal: it has left discoverd, but still answers.
    let hosts = cluster.services.lock().unwrap().remove("flynn-host").unwrap();
    cluster.changed();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(state(&cluster), Some(JobState::Up));
    // Back, and silent: again one signal.
    cluster
        .services
        .lock()
        .unwrap()
        .insert("flynn-host".into(), hosts);
    cluster.changed();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    cluster.kill_host();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(state(&cluster), Some(JobState::Up));
    cluster.services.lock().unwrap().remove("flynn-host");
    cluster.changed();
    cluster
        .wait("its job is over", |cluster| {
            state(cluster) == Some(JobState::Down)
        })
        .await;
    assert!(
        cluster
            .reported(&job)
            .unwrap()
            .host_error
            .unwrap()
            .contains("host is gone")
    );
}

#[tokio::test]
async fn who_does_not_lead_does_not_act() {
    let cluster = Cluster::start(vec![formation(1)], Vec::new(), false).await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert!(cluster.calls.lock().unwrap().is_empty() && cluster.reports.lock().unwrap().is_empty());
    let own = flynn_api::discovery::Instance::new("http", fake::OWN, BTreeMap::new());
    cluster
        .services
        .lock()
        .unwrap()
        .insert("scheduler".into(), vec![own]);
    cluster.changed();
    cluster
        .wait("it acts once it leads", |cluster| cluster.running().len() == 1)
        .await;
}
