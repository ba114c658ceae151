//! The database goes away and comes back while the controller is at work.

use std::time::Duration;

use flynn_api::ErrorCode;
use flynn_api::client::controller::EventFilter;
use flynn_api::controller::{App, JobState};
use tokio_postgres::NoTls;

use crate::common::cluster::Cluster;
use crate::common::controller::{job, options_on, start, start_with};
use crate::common::{eventually, next, trial};

pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    vec![
        trial("the_database_goes_and_comes_back", goes_and_comes_back),
        trial("a_change_that_may_have_been_made_is_not_denied", unknown),
        trial("it_waits_for_its_database", waits),
        trial("a_database_without_room_says_so", without_room),
        trial("controllers_that_start_together_migrate_once", together),
    ]
}

async fn goes_and_comes_back() {
    let cluster = Cluster::start();
    let running = start_with(options_on(&cluster).await).await;
    let client = &running.client;
    let (app, _, old_jobs) = running.running_app("shop", 1).await;
    let new = running.release(&app).await;
    let deployment = client.deploy("shop", &new.id).await.unwrap();
    let filter = EventFilter {
        object_types: vec!["app"],
        ..EventFilter::default()
    };
    let mut stream = client.event_stream(&filter, None).await.unwrap();
    running.app("before").await;
    assert_eq!(
        next(&mut stream, "the first event").await.1.data["name"],
        "before"
    );

    cluster.kill();
    let refused = client
        .create_app(&App {
            name: "never".into(),
            ..App::default()
        })
        .await
        .unwrap_err();
    assert_eq!(
        (refused.code, refused.retry),
        (ErrorCode::Unavailable, true),
        "{refused}"
    );
    assert!(refused.message.contains("try again"), "{refused}");
    let unhealthy = running
        .http()
        .get::<serde_json::Value>("/.well-known/status")
        .await
        .unwrap_err();
    assert_eq!(unhealthy.code, ErrorCode::Unavailable);
    client.ping().await.expect("it is there itself");

    cluster.launch();
    let wish = App {
        name: "after".into(),
        ..App::default()
    };
    eventually("it serves again", || async {
        client.create_app(&wish).await.ok()
    })
    .await;
    let event = next(&mut stream, "the stream goes on").await.1;
    assert_eq!(event.data["name"], "after", "nothing lost, nothing twice");
    drop(stream);
    assert_eq!(
        client.app("shop").await.unwrap().id,
        app.id,
        "what was acknowledged is there"
    );

    // And so does the deployment.
    client
        .put_job(&job(&app, &new, "web", JobState::Up))
        .await
        .unwrap();
    eventually("the new release is current", || async {
        (client.app_release("shop").await.ok()?.id == new.id).then_some(())
    })
    .await;
    let mut down = old_jobs[0].clone();
    down.state = JobState::Down;
    client.put_job(&down).await.unwrap();
    eventually("the deployment is complete", || async {
        (client.deployment(&deployment.id).await.ok()?.status == "complete").then_some(())
    })
    .await;
    running.stop().await;
}

async fn without_room() {
    let running = start().await;
    let (client, connection) = running.options.database.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    // What PostgreSQL answers when a table cannot grow.
    let full = "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$; \
                CREATE TRIGGER full_disk BEFORE INSERT ON apps EXECUTE FUNCTION full_disk()";
    client.batch_execute(full).await.unwrap();
    let wish = App {
        name: "shop".into(),
        ..App::default()
    };
    let refused = running.client.create_app(&wish).await.unwrap_err();
    assert_eq!(
        (refused.code, refused.retry),
        (ErrorCode::LimitExceeded, true),
        "{refused}"
    );
    assert!(
        refused.message.contains("disk") && refused.message.contains("make room"),
        "{refused}"
    );
    client
        .batch_execute("DROP FUNCTION full_disk CASCADE")
        .await
        .unwrap();
    running
        .client
        .create_app(&wish)
        .await
        .expect("with room it goes on");
    running.stop().await;
}

async fn unknown() {
    let running = start().await;
    let (client, connection) = running.options.database.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    // The server's process ends while it commits. Whether before or after, nobody hears.
    let end = "CREATE FUNCTION fall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$; \
               CREATE CONSTRAINT TRIGGER fall AFTER INSERT ON apps DEFERRABLE INITIALLY DEFERRED \
               FOR EACH ROW EXECUTE FUNCTION fall()";
    client.batch_execute(end).await.unwrap();
    let wish = App {
        name: "shop".into(),
        ..App::default()
    };
    let broken = running.client.create_app(&wish).await.unwrap_err();
    assert_eq!(
        (broken.code, broken.retry, broken.may_be_done()),
        (ErrorCode::Timeout, true, true),
        "{broken}"
    );
    assert!(broken.message.contains("is not known"), "{broken}");
    client.batch_execute("DROP FUNCTION fall CASCADE").await.unwrap();
    // Until the end of that connection is seen, it may be taken up once more.
    eventually("the next one has another connection", || async {
        running.client.create_app(&wish).await.ok()
    })
    .await;
    running.stop().await;
}

async fn waits() {
    let cluster = Cluster::start();
    let options = options_on(&cluster).await;
    cluster.kill();
    let starting = tokio::spawn(start_with(options));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!starting.is_finished(), "it waits");
    cluster.launch();
    let running = starting.await.unwrap();
    running.app("shop").await;
    running.stop().await;
}

async fn together() {
    let options = crate::common::controller::options().await;
    let starting = [0, 1, 2].map(|_| start_with(options.clone()));
    let running = futures::future::join_all(starting).await;
    running[0].app("shop").await;
    assert_eq!(running[2].client.app("shop").await.unwrap().name, "shop");
    for controller in running {
        controller.stop().await;
    }
}
