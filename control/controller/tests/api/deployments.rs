//! Deployments, with the test in the scheduler's place.

use flynn_api::ErrorCode;
use flynn_api::controller::{App, Deployment, Formation, Job, JobState, Processes, Release, VolumeReq};
use futures::StreamExt as _;

use crate::common::controller::{Running, job, start, start_with};
use crate::common::{eventually, soon, trial};

pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    vec![
        trial("deploy_with_nothing_running_sets_the_release", nothing_runs),
        trial("deploy_brings_the_new_up_before_the_old_goes", complete),
        trial("deploy_fails_when_jobs_keep_going_down", crash_loop),
        trial("deploy_fails_when_time_runs_out", timeout),
        trial("deploy_outlives_its_controller", restart),
        trial("deploys_of_two_controllers_are_one", two_controllers),
        trial("deploy_in_turn_one_down_one_up", in_turn),
        trial("deploy_in_turn_goes_back_when_it_fails", in_turn_back),
        trial("deploy_of_what_keeps_data_hands_over", hands_over),
    ]
}

async fn status(running: &Running, deployment: &Deployment) -> Deployment {
    running.client.deployment(&deployment.id).await.unwrap()
}

async fn finished(running: &Running, deployment: &Deployment) -> Deployment {
    eventually("the deployment is over", || async {
        let deployment = status(running, deployment).await;
        deployment.finished_at.is_some().then_some(deployment)
    })
    .await
}

/// Waits until so many `web` of a release are wanted.
async fn wanted(running: &Running, app: &App, release: &Release, web: u32) {
    eventually(&format!("{web} of {} are wanted", release.id), || async {
        let formation = running
            .client
            .formation(&app.id, &release.id)
            .await
            .unwrap_or_default();
        (formation.processes.get("web").copied().unwrap_or(0) == web).then_some(())
    })
    .await;
}

async fn report(running: &Running, job: &Job, state: JobState) {
    running
        .client
        .put_job(&Job {
            state,
            exit_status: None,
            ..job.clone()
        })
        .await
        .unwrap();
}

async fn nothing_runs() {
    let running = start().await;
    let client = &running.client;
    let app = running.app("shop").await;
    let release = running.release(&app).await;
    let deployment = client.deploy("shop", &release.id).await.unwrap();
    assert_eq!(deployment.status, "complete");
    assert_eq!(client.app_release("shop").await.unwrap().id, release.id);
    let again = client.deploy("shop", &release.id).await.unwrap();
    assert_eq!(again.status, "complete", "the current release once more");
    assert_eq!(client.deployments("shop").await.unwrap().len(), 2);
    let events: Vec<_> = client
        .deployment_events(&deployment.id)
        .await
        .unwrap()
        .collect()
        .await;
    assert_eq!(
        events.last().unwrap().as_ref().unwrap().1.status,
        "complete",
        "and the stream ends"
    );
    let unknown = client
        .deploy("shop", "0b7a1c5e-1111-4222-8333-444455556666")
        .await
        .unwrap_err();
    assert!(
        unknown.message.starts_with("id: there is no release"),
        "{unknown}"
    );
    running.stop().await;
}

async fn complete() {
    let running = start().await;
    let client = &running.client;
    let (app, old, old_jobs) = running.running_app("shop", 2).await;
    let new = running.release(&app).await;
    let deployment = client.deploy("shop", &new.id).await.unwrap();
    assert_eq!(
        (deployment.status.as_str(), deployment.processes["web"]),
        ("pending", 2)
    );
    let refused = client.deploy("shop", &new.id).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(refused.message.contains(&deployment.id), "{refused}");
    let refused = client.delete_formation("shop", &old.id).await.unwrap_err();
    assert!(refused.message.contains("scaling has to wait"), "{refused}");
    let mut events = client.deployment_events(&deployment.id).await.unwrap();

    wanted(&running, &app, &new, 2).await;
    let jobs = [0, 1].map(|_| job(&app, &new, "web", JobState::Starting));
    for job in &jobs {
        report(&running, job, JobState::Starting).await;
    }
    report(&running, &jobs[0], JobState::Up).await;
    wanted(&running, &app, &old, 2).await;
    assert_eq!(
        client.app_release("shop").await.unwrap().id,
        old.id,
        "not before all are up"
    );
    report(&running, &jobs[1], JobState::Up).await;
    wanted(&running, &app, &old, 0).await;
    assert_eq!(client.app_release("shop").await.unwrap().id, new.id);
    assert_eq!(
        status(&running, &deployment).await.status,
        "running",
        "the old jobs have not ended"
    );
    for job in &old_jobs {
        report(&running, job, JobState::Stopping).await;
        report(&running, job, JobState::Down).await;
    }
    assert_eq!(finished(&running, &deployment).await.status, "complete");
    let mut seen = Vec::new();
    while let Some(event) = soon("the stream's end, after its steps", events.next()).await {
        let event = event.unwrap().1;
        seen.push(event.job_state.map_or(event.status, |state| format!("{state:?}")));
    }
    let expected = [
        "pending", "running", "Starting", "Starting", "Up", "Up", "running", "Stopping", "Down", "Stopping",
        "Down", "complete",
    ];
    assert_eq!(seen, expected, "every step, and then the stream ends");

    // The way back is a deployment as well.
    let back = client.deploy("shop", &old.id).await.unwrap();
    wanted(&running, &app, &old, 2).await;
    for _ in 0..2 {
        report(&running, &job(&app, &old, "web", JobState::Up), JobState::Up).await;
    }
    for job in &jobs {
        report(&running, job, JobState::Down).await;
    }
    assert_eq!(finished(&running, &back).await.status, "complete");
    assert_eq!(client.app_release("shop").await.unwrap().id, old.id);
    running.stop().await;
}

async fn crash_loop() {
    let running = start().await;
    let client = &running.client;
    let (app, old, _) = running.running_app("shop", 1).await;
    let new = running.release(&app).await;
    let deployment = client.deploy("shop", &new.id).await.unwrap();
    wanted(&running, &app, &new, 1).await;
    for n in 0..6 {
        assert_eq!(
            status(&running, &deployment).await.error,
            None,
            "{n} failures are not yet too many"
        );
        let job = Job {
            exit_status: Some(7),
            ..job(&app, &new, "web", JobState::Down)
        };
        client.put_job(&job).await.unwrap();
    }
    let failed = finished(&running, &deployment).await;
    let why = failed.error.unwrap();
    assert_eq!(failed.status, "failed");
    assert!(
        why.contains("exit status 7") && why.contains("flynn log -j host1-"),
        "{why}"
    );
    assert_eq!(client.app_release("shop").await.unwrap().id, old.id);
    wanted(&running, &app, &old, 1).await;
    assert_eq!(
        client.formation("shop", &new.id).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    running.stop().await;
}

async fn timeout() {
    let running = start().await;
    let client = &running.client;
    let (app, old, _) = running.running_app("shop", 1).await;
    let patience = App {
        name: "shop".into(),
        deploy_timeout: 1,
        ..App::default()
    };
    client
        .update_app(&App {
            id: app.id.clone(),
            ..patience
        })
        .await
        .unwrap();
    let new = running.release(&app).await;
    let deployment = client.deploy("shop", &new.id).await.unwrap();
    let failed = finished(&running, &deployment).await;
    assert!(
        failed
            .error
            .unwrap()
            .contains("after 1 s there are not yet up: web 1")
    );
    wanted(&running, &app, &old, 1).await;
    wanted(&running, &app, &new, 0).await;
    running.stop().await;
}

async fn restart() {
    let mut running = start().await;
    let (app, old, old_jobs) = running.running_app("shop", 1).await;
    let new = running.release(&app).await;
    let deployment = running.client.deploy("shop", &new.id).await.unwrap();
    running = start_with(running.kill().await).await;
    wanted(&running, &app, &new, 1).await;
    running = start_with(running.kill().await).await;
    report(&running, &job(&app, &new, "web", JobState::Up), JobState::Up).await;
    wanted(&running, &app, &old, 0).await;
    running = start_with(running.kill().await).await;
    report(&running, &old_jobs[0], JobState::Down).await;
    assert_eq!(finished(&running, &deployment).await.status, "complete");
    running.stop().await;
}

async fn two_controllers() {
    let one = start().await;
    let two = start_with(one.options.clone()).await;
    let (app, old, old_jobs) = one.running_app("shop", 1).await;
    let new = one.release(&app).await;
    let (first, second) = tokio::join!(
        one.client.deploy("shop", &new.id),
        two.client.deploy("shop", &new.id)
    );
    let (deployment, refused) = match (first, second) {
        (Ok(deployment), Err(refused)) | (Err(refused), Ok(deployment)) => (deployment, refused),
        both => panic!("exactly one of them: {both:?}"),
    };
    assert_eq!(refused.code, ErrorCode::Conflict);
    wanted(&two, &app, &new, 1).await;
    report(&one, &job(&app, &new, "web", JobState::Up), JobState::Up).await;
    wanted(&two, &app, &old, 0).await;
    report(&two, &old_jobs[0], JobState::Down).await;
    assert_eq!(finished(&one, &deployment).await.status, "complete");
    let events: Vec<_> = two
        .client
        .deployment_events(&deployment.id)
        .await
        .unwrap()
        .collect()
        .await;
    let steps = events
        .iter()
        .filter(|event| event.as_ref().unwrap().1.job_state.is_none())
        .count();
    assert_eq!(steps, 4, "pending, running, running, complete: each step once");
    let formation = one.client.formation("shop", &new.id).await.unwrap();
    assert_eq!(formation.generation, 1, "put once");
    one.stop().await;
    two.stop().await;
}

/// An app of two `web` that is deployed in turn, its new release, and the deployment.
async fn begin_in_turn(running: &Running) -> (App, Release, Vec<Job>, Release, Deployment) {
    let (app, old, jobs) = running.running_app("shop", 2).await;
    let strategy = App {
        id: app.id.clone(),
        strategy: "one-down-one-up".into(),
        deploy_timeout: 60,
        ..App::default()
    };
    running.client.update_app(&strategy).await.unwrap();
    let new = running.release(&app).await;
    let deployment = running.client.deploy("shop", &new.id).await.unwrap();
    assert_eq!(deployment.strategy, "one-down-one-up");
    (app, old, jobs, new, deployment)
}

async fn in_turn() {
    let mut running = start().await;
    let (app, old, old_jobs, new, deployment) = begin_in_turn(&running).await;
    for (n, job_down) in (0..).zip(&old_jobs) {
        wanted(&running, &app, &old, 1 - n).await;
        wanted(&running, &app, &new, n).await;
        report(&running, job_down, JobState::Stopping).await;
        // The next controller goes on where this one was.
        running = start_with(running.kill().await).await;
        wanted(&running, &app, &new, n).await;
        report(&running, job_down, JobState::Down).await;
        wanted(&running, &app, &new, n + 1).await;
        assert_eq!(running.client.app_release("shop").await.unwrap().id, old.id);
        report(&running, &job(&app, &new, "web", JobState::Up), JobState::Up).await;
    }
    assert_eq!(finished(&running, &deployment).await.status, "complete");
    assert_eq!(running.client.app_release("shop").await.unwrap().id, new.id);
    running.stop().await;
}

async fn in_turn_back() {
    let running = start().await;
    let client = &running.client;
    let (app, old, old_jobs, new, deployment) = begin_in_turn(&running).await;
    wanted(&running, &app, &old, 1).await;
    report(&running, &old_jobs[0], JobState::Down).await;
    wanted(&running, &app, &new, 1).await;
    let last = job(&app, &new, "web", JobState::Starting);
    report(&running, &last, JobState::Starting).await;
    for _ in 0..6 {
        client
            .put_job(&Job {
                exit_status: Some(7),
                ..job(&app, &new, "web", JobState::Down)
            })
            .await
            .unwrap();
    }
    wanted(&running, &app, &new, 0).await;
    assert!(
        status(&running, &deployment)
            .await
            .error
            .unwrap()
            .contains("exit status 7"),
        "why it goes back is told at once"
    );
    wanted(&running, &app, &old, 1).await;
    report(&running, &last, JobState::Down).await;
    wanted(&running, &app, &old, 2).await;
    report(&running, &job(&app, &old, "web", JobState::Up), JobState::Up).await;
    let failed = finished(&running, &deployment).await;
    assert_eq!(failed.status, "failed");
    assert!(failed.error.unwrap().contains("exit status 7"));
    assert_eq!(client.app_release("shop").await.unwrap().id, old.id);
    assert_eq!(
        client.formation("shop", &new.id).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    running.stop().await;
}

/// The platform's own database goes and comes with such a deployment: both formations change in one transaction.
async fn hands_over() {
    let running = start().await;
    let client = &running.client;
    let meta = ["flynn-system-app", "flynn-system-critical"].map(|flag| (flag.to_owned(), "true".to_owned()));
    let app = App {
        name: "db".into(),
        meta: meta.into(),
        ..App::default()
    };
    let app = client.create_app(&app).await.unwrap();
    let mut release = running.release(&app).await;
    release.id.clear();
    release.created_at = None;
    release.processes.remove("worker");
    release.processes.get_mut("web").unwrap().volumes = vec![VolumeReq {
        path: "/data".into(),
        delete_on_stop: false,
        limit: None,
    }];
    let old = client.create_release(&release).await.unwrap();
    let new = client.create_release(&release).await.unwrap();
    assert_ne!(old.id, new.id, "equal releases are two");
    client.set_app_release(&app.id, &old.id).await.unwrap();
    let formation = Formation {
        app_id: app.id.clone(),
        release_id: old.id.clone(),
        processes: Processes::from([("web".into(), 1)]),
        ..Formation::default()
    };
    client.put_formation(&formation).await.unwrap();
    let old_job = job(&app, &old, "web", JobState::Up);
    client.put_job(&old_job).await.unwrap();

    let deployment = client.deploy("db", &new.id).await.unwrap();
    assert_eq!(deployment.strategy, "one-down-one-up", "whatever the app says");
    wanted(&running, &app, &new, 1).await;
    let given = client.formation("db", &old.id).await.unwrap().processes;
    assert_eq!(given.get("web"), Some(&0), "0, and not left out");
    // The scheduler tells of both at once, when the database is back.
    report(&running, &job(&app, &new, "web", JobState::Up), JobState::Up).await;
    report(&running, &old_job, JobState::Down).await;
    assert_eq!(finished(&running, &deployment).await.status, "complete");
    assert_eq!(client.app_release("db").await.unwrap().id, new.id);
    running.stop().await;
}
