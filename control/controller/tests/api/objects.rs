//! Apps, artifacts, releases, formations, jobs.

use flynn_api::controller::{App, EventKind, Formation, JobState, Processes, Release, ScaleRequest};
use flynn_api::{Digest, Env, ErrorCode};
use uuid::Uuid;

use crate::common::controller::{job, start};
use crate::common::{eventually, trial};

pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    vec![
        trial("apps_live_from_creation_to_deletion", apps),
        trial("the_same_artifact_is_registered_once", artifacts),
        trial("releases_never_change_and_name_what_is_there", releases),
        trial("what_is_in_use_cannot_be_deleted", deletions),
        trial("formations_carry_a_generation", formations),
        trial("scale_requests_end_when_the_jobs_are_there", scale),
        trial("critical_apps_keep_a_process", critical),
        trial("jobs_go_forward_only", jobs),
        trial("privileges_are_for_the_platform", privileges),
    ]
}

async fn apps() {
    let running = start().await;
    let client = &running.client;
    let (app, release, jobs) = running.running_app("shop", 1).await;
    assert_eq!(client.app("shop").await.unwrap().id, app.id);
    assert_eq!(
        client.app(&app.id).await.unwrap().release_id.as_ref(),
        Some(&release.id)
    );
    let routes = client.routes("shop").await.unwrap();
    assert_eq!(
        (routes[0].domain.as_str(), routes[0].service.as_str()),
        ("shop.flynn.localhost", "shop-web")
    );

    let again = client
        .create_app(&App {
            name: "shop".into(),
            ..App::default()
        })
        .await
        .unwrap_err();
    assert_eq!(again.code, ErrorCode::ObjectExists, "{again}");
    let wish = App {
        id: Uuid::new_v4().to_string(),
        name: "fixed".into(),
        ..App::default()
    };
    let first = client.create_app(&wish).await.unwrap();
    assert_eq!(
        client.create_app(&wish).await.unwrap(),
        first,
        "bootstrap may repeat itself"
    );
    assert!(!client.create_app(&App::default()).await.unwrap().name.is_empty());

    let changed = App {
        deploy_timeout: 7,
        meta: [("k".into(), "v".into())].into(),
        ..app.clone()
    };
    let changed = App {
        release_id: None,
        created_at: None,
        updated_at: None,
        ..changed
    };
    assert_eq!(client.update_app(&changed).await.unwrap().deploy_timeout, 7);

    client.delete_app("shop").await.unwrap();
    assert_eq!(client.app("shop").await.unwrap_err().code, ErrorCode::NotFound);
    assert!(
        client
            .all_routes()
            .await
            .unwrap()
            .iter()
            .all(|route| route.domain != "shop.flynn.localhost")
    );
    assert!(
        client.active_formations().await.unwrap().is_empty(),
        "its jobs are no longer wanted"
    );
    let mut down = jobs[0].clone();
    down.state = JobState::Down;
    client
        .put_job(&down)
        .await
        .expect("jobs of a deleted app still end");
    assert_ne!(running.app("shop").await.id, app.id, "the name is free again");
    running.stop().await;
}

async fn artifacts() {
    let running = start().await;
    let first = running.artifact().await;
    let mut again = first.clone();
    (again.id, again.created_at) = (String::new(), None);
    assert_eq!(running.client.create_artifact(&again).await.unwrap(), first);
    assert_eq!(running.client.artifact(&first.id).await.unwrap(), first);
    again.hashes.as_mut().unwrap().sha512_256 = Digest::of(b"another");
    let error = running.client.create_artifact(&again).await.unwrap_err();
    assert_eq!(error.detail.unwrap()["field"], "hashes.sha512_256");
    running.stop().await;
}

async fn releases() {
    let running = start().await;
    let client = &running.client;
    let app = running.app("shop").await;
    let one = running.artifact().await;
    let two = running.artifact().await;
    let wish = Release {
        id: Uuid::new_v4().to_string(),
        app_id: Some(app.id.clone()),
        artifact_ids: vec![two.id.clone(), one.id.clone(), two.id.clone()],
        env: Env::from([("A_KEY".into(), "s3cret".into())]),
        processes: [("web".to_owned(), flynn_api::controller::ProcessType::default())].into(),
        ..Release::default()
    };
    let release = client.create_release(&wish).await.unwrap();
    assert_eq!(
        release.artifact_ids, wish.artifact_ids,
        "layers keep their order, repetition included"
    );
    assert_eq!(
        client.create_release(&wish).await.unwrap(),
        release,
        "the same once more"
    );
    let other = Release {
        env: Env::new(),
        ..wish.clone()
    };
    assert_eq!(
        client.create_release(&other).await.unwrap_err().code,
        ErrorCode::ObjectExists
    );
    assert_eq!(client.release(&release.id).await.unwrap().env["A_KEY"], "s3cret");

    let unknown = Uuid::new_v4().to_string();
    let wrong = Release {
        id: String::new(),
        artifact_ids: vec![one.id, unknown.clone()],
        ..wish.clone()
    };
    let error = client.create_release(&wrong).await.unwrap_err();
    assert!(
        error
            .message
            .starts_with(&format!("artifacts[1]: there is no artifact {unknown}")),
        "{error}"
    );
    let wrong = Release {
        id: String::new(),
        app_id: Some("nobody".into()),
        ..wish
    };
    assert!(
        client
            .create_release(&wrong)
            .await
            .unwrap_err()
            .message
            .starts_with("app_id: ")
    );
    running.stop().await;
}

async fn deletions() {
    let running = start().await;
    let client = &running.client;
    let (app, release, jobs) = running.running_app("shop", 1).await;
    let refused = client.delete_release(&app.id, &release.id).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(
        refused
            .message
            .contains("current release of shop: deploy another"),
        "{refused}"
    );
    let next = running.release(&app).await;
    client.set_app_release(&app.id, &next.id).await.unwrap();
    let refused = client.delete_release(&app.id, &release.id).await.unwrap_err();
    assert!(refused.message.contains("scale it to nothing"), "{refused}");
    client.delete_formation(&app.id, &release.id).await.unwrap();
    let refused = client.delete_release(&app.id, &release.id).await.unwrap_err();
    assert!(refused.message.contains("jobs of it run"), "{refused}");
    let mut down = jobs[0].clone();
    down.state = JobState::Down;
    client.put_job(&down).await.unwrap();
    client.delete_release(&app.id, &release.id).await.unwrap();
    assert_eq!(
        client.release(&release.id).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    running.stop().await;
}

async fn formations() {
    let running = start().await;
    let client = &running.client;
    let app = running.app("shop").await;
    let release = running.release(&app).await;
    let with = |n: u32, generation: u64| Formation {
        app_id: app.id.clone(),
        release_id: release.id.clone(),
        processes: Processes::from([("web".into(), n)]),
        generation,
        ..Formation::default()
    };
    let first = client.put_formation(&with(1, 0)).await.unwrap();
    assert_eq!(
        client.put_formation(&with(1, 0)).await.unwrap(),
        first,
        "nothing changed"
    );
    let second = client.put_formation(&with(2, first.generation)).await.unwrap();
    assert_eq!(second.generation, first.generation + 1);
    let stale = client
        .put_formation(&with(3, first.generation))
        .await
        .unwrap_err();
    assert_eq!(stale.code, ErrorCode::PreconditionFailed);
    assert_eq!(stale.detail.unwrap()["generation"], second.generation);
    let expanded = client.active_formations().await.unwrap();
    assert_eq!(
        (expanded[0].app.name.as_str(), expanded[0].artifacts.len()),
        ("shop", 1)
    );
    assert_eq!(
        expanded[0].release.env["SECRET_KEY"], "s3cret-value",
        "the scheduler needs it in full"
    );
    client.delete_formation(&app.id, &release.id).await.unwrap();
    assert!(client.active_formations().await.unwrap().is_empty());
    let anew = client.put_formation(&with(1, 0)).await.unwrap();
    assert!(
        anew.generation > second.generation,
        "a generation never comes back"
    );
    let mut wrong = with(1, 0);
    wrong.processes.insert("wbe".into(), 1);
    let error = client.put_formation(&wrong).await.unwrap_err();
    assert!(error.message.starts_with("processes.wbe: "), "{error}");
    running.stop().await;
}

async fn scale() {
    let running = start().await;
    let client = &running.client;
    let (app, release, _) = running.running_app("shop", 1).await;
    let to = |n: u32| ScaleRequest {
        new_processes: Some(Processes::from([("web".into(), n)])),
        ..ScaleRequest::default()
    };
    let first = client.scale("shop", &release.id, &to(5)).await.unwrap();
    assert_eq!((first.state.as_str(), first.old_processes["web"]), ("pending", 1));
    let second = client.scale("shop", &release.id, &to(2)).await.unwrap();
    let filter = |id: &str| flynn_api::client::controller::EventFilter {
        object_id: Some(id.to_owned()),
        ..Default::default()
    };
    let states = async |id: &str| -> Vec<String> {
        let events = client.events(&filter(id)).await.unwrap();
        events
            .iter()
            .rev()
            .map(|event| event.data["state"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(states(&first.id).await, ["pending", "cancelled"]);
    client
        .put_job(&job(&app, &release, "web", JobState::Up))
        .await
        .unwrap();
    eventually("the request is complete", || async {
        (states(&second.id).await == ["pending", "complete"]).then_some(())
    })
    .await;
    running.stop().await;
}

async fn critical() {
    let running = start().await;
    let client = &running.client;
    let meta = [("flynn-system-app", "true"), ("flynn-system-critical", "true")];
    let meta = meta.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let app = client
        .create_app(&App {
            name: "router".into(),
            meta,
            ..App::default()
        })
        .await
        .unwrap();
    assert!(
        client.routes("router").await.unwrap().is_empty(),
        "the platform's apps get no default route"
    );
    let release = running.release(&app).await;
    let to = |n: u32| ScaleRequest {
        new_processes: Some(Processes::from([("web".into(), n)])),
        ..ScaleRequest::default()
    };
    client.scale("router", &release.id, &to(2)).await.unwrap();
    client.scale("router", &release.id, &to(1)).await.unwrap();
    let refused = client.scale("router", &release.id, &to(0)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(refused.message.contains("critical"), "{refused}");
    assert!(client.delete_formation("router", &release.id).await.is_err());
    assert!(client.delete_app("router").await.is_err());
    running.stop().await;
}

async fn jobs() {
    let running = start().await;
    let client = &running.client;
    let app = running.app("shop").await;
    let release = running.release(&app).await;
    let mut job = job(&app, &release, "web", JobState::Pending);
    let placed = std::mem::take(&mut job.id);
    let host = std::mem::take(&mut job.host_id);
    client.put_job(&job).await.unwrap();
    assert_eq!(
        client.job("shop", &job.uuid).await.unwrap().state,
        JobState::Pending
    );
    (job.id, job.host_id, job.state) = (placed.clone(), host, JobState::Up);
    client.put_job(&job).await.unwrap();
    client.put_job(&job).await.expect("a report may be repeated");
    assert_eq!(client.active_jobs().await.unwrap().len(), 1);
    job.state = JobState::Starting;
    let backward = client.put_job(&job).await.unwrap_err();
    assert_eq!(backward.code, ErrorCode::Conflict);
    assert!(
        backward.message.contains("up cannot become starting"),
        "{backward}"
    );
    (job.state, job.exit_status) = (JobState::Down, Some(3));
    client.put_job(&job).await.unwrap();
    let there = client.job("shop", &placed).await.unwrap();
    assert_eq!((there.state, there.exit_status), (JobState::Down, Some(3)));
    // After a power cut its host brings it back, under the same id.
    let back = |restarts| flynn_api::controller::Job {
        state: JobState::Up,
        exit_status: None,
        restarts: Some(restarts),
        ..job.clone()
    };
    assert_eq!(
        client.put_job(&back(0)).await.unwrap_err().code,
        ErrorCode::Conflict
    );
    client.put_job(&back(1)).await.unwrap();
    let there = client.job("shop", &placed).await.unwrap();
    assert_eq!((there.state, there.exit_status), (JobState::Up, None));
    job.restarts = Some(1);
    client.put_job(&job).await.unwrap();
    assert!(client.active_jobs().await.unwrap().is_empty());
    let filter = flynn_api::client::controller::EventFilter {
        object_types: vec!["job"],
        app_id: Some("shop".into()),
        ..Default::default()
    };
    let events = client.events(&filter).await.unwrap();
    assert_eq!(
        events.len(),
        5,
        "one for each change, none for repetition: {events:?}"
    );
    assert!(events.iter().all(|event| event.object_type == EventKind::Job));
    let mut foreign = job.clone();
    foreign.release_id = Uuid::new_v4().to_string();
    assert!(
        client
            .put_job(&foreign)
            .await
            .unwrap_err()
            .message
            .starts_with("release: ")
    );
    running.stop().await;
}

async fn privileges() {
    let running = start().await;
    let app = running.app("shop").await;
    let artifact = running.artifact().await;
    let process = flynn_api::controller::ProcessType {
        host_network: true,
        ..Default::default()
    };
    let release = Release {
        app_id: Some(app.id),
        artifact_ids: vec![artifact.id],
        processes: [("web".to_owned(), process)].into(),
        ..Release::default()
    };
    let refused = running.client.create_release(&release).await.unwrap_err();
    assert_eq!(refused.detail.unwrap()["field"], "processes.web.host_network");
    let of_nobody = Release {
        app_id: None,
        ..release
    };
    assert!(running.client.create_release(&of_nobody).await.is_err());
    running.stop().await;
}
