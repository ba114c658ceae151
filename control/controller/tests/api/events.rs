//! The stream of events and of formations.

use flynn_api::ErrorCode;
use flynn_api::client::controller::EventFilter;
use flynn_api::controller::{EventKind, Formation, Processes};

use crate::common::controller::{options, start, start_with};
use crate::common::gate::Gate;
use crate::common::{eventually, next, trial};

pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    vec![
        trial("events_are_filtered_and_carry_no_secret", filters),
        trial("a_stream_resumes_without_gap_or_duplicate", resume),
        trial(
            "a_stream_misses_nothing_while_the_controller_does_not_listen",
            deaf,
        ),
        trial("events_of_a_newer_version_stop_no_stream", newer),
        trial("a_stream_cannot_resume_where_events_are_gone", horizon),
        trial("history_stays_within_its_bounds", bounds),
        trial("formations_are_listed_as_of_one_moment", moment),
        trial("formations_come_whole_and_then_as_they_change", formations),
    ]
}

async fn filters() {
    let running = start().await;
    let client = &running.client;
    let (app, release, _) = running.running_app("shop", 1).await;
    running.app("other").await;
    let all = client.events(&EventFilter::default()).await.unwrap();
    assert!(
        all.windows(2).all(|pair| pair[0].id > pair[1].id),
        "the newest first"
    );
    let text = serde_json::to_string(&all).unwrap();
    assert!(
        !text.contains("s3cret-value") && text.contains("\"MODE\":\"test\""),
        "{text}"
    );
    let of = async |filter: EventFilter| -> Vec<EventKind> {
        client
            .events(&filter)
            .await
            .unwrap()
            .iter()
            .rev()
            .map(|event| event.object_type)
            .collect()
    };
    let types = vec!["release", "app_release"];
    let filter = EventFilter {
        object_types: types,
        app_id: Some("shop".into()),
        ..EventFilter::default()
    };
    assert_eq!(of(filter).await, [EventKind::Release, EventKind::AppRelease]);
    let filter = EventFilter {
        object_id: Some(release.id),
        ..EventFilter::default()
    };
    assert_eq!(
        of(filter).await,
        [EventKind::Release, EventKind::AppRelease, EventKind::Scale]
    );
    let filter = EventFilter {
        app_id: Some(app.id),
        count: Some(2),
        ..EventFilter::default()
    };
    assert_eq!(
        of(filter).await,
        [EventKind::Scale, EventKind::Job],
        "the last two"
    );
    running.stop().await;
}

fn of_apps() -> EventFilter {
    EventFilter {
        object_types: vec!["app"],
        ..EventFilter::default()
    }
}

async fn resume() {
    let running = start().await;
    let write = async |writer: usize| {
        for n in 0..40 {
            running.app(&format!("app-{writer}-{n}")).await;
        }
    };
    // The reader hangs up again and again, and goes on after the last event that it has seen.
    let read = async {
        let (mut seen, mut last) = (Vec::new(), 0);
        while seen.len() < 160 {
            let mut stream = running.client.event_stream(&of_apps(), Some(last)).await.unwrap();
            for _ in 0..=(seen.len() % 23) {
                let what = format!("the next of 160 events, after {} up to the id {last}", seen.len());
                let (id, event) = next(&mut stream, &what).await;
                assert_eq!(id.unwrap(), event.id.to_string());
                assert!(event.id > last, "in order");
                last = event.id;
                seen.push(event.object_id);
                if seen.len() == 160 {
                    break;
                }
            }
        }
        seen
    };
    let (seen, ..) = tokio::join!(read, write(0), write(1), write(2), write(3));
    let mut distinct = seen.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 160, "each once");

    let past = EventFilter {
        past: true,
        count: Some(3),
        ..of_apps()
    };
    let mut stream = running.client.event_stream(&past, None).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(next(&mut stream, "an event of the past").await.1.object_id);
    }
    assert_eq!(ids, seen[157..], "the last three of the past, in order");
    let late = running.app("late").await;
    assert_eq!(
        next(&mut stream, "a new event after the past").await.1.object_id,
        late.id
    );
    drop(stream);
    running.stop().await;
}

/// A reader that has read all there is depends on what the controller hears. Nothing may fall between, neither when
/// the controller begins to listen late nor when its connection breaks.
async fn deaf() {
    let mut options = options().await;
    let mut gate = Gate::before(&mut options);
    let running = start_with(options).await;
    running.app("before").await;
    let mut stream = running.client.event_stream(&of_apps(), Some(0)).await.unwrap();
    let mut name = async |what: &str| next(&mut stream, what).await.1.data["name"].clone();
    assert_eq!(name("what was there").await, "before");
    gate.holds().await;
    running.app("unheard").await;
    gate.open();
    assert_eq!(name("what came before the controller listened").await, "unheard");
    running.app("heard").await;
    assert_eq!(name("what the controller hears").await, "heard");
    gate.shut();
    gate.holds().await;
    running.app("unheard-again").await;
    gate.open();
    assert_eq!(name("what came while it did not listen").await, "unheard-again");
    drop(stream);
    running.stop().await;
}

/// While the cluster is upgraded, a newer controller writes to the same database.
async fn newer() {
    let running = start().await;
    let filter = EventFilter::default();
    let mut stream = running.client.event_stream(&filter, None).await.unwrap();
    let (client, connection) = running
        .options
        .database
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
        .batch_execute("INSERT INTO events (object_type, object_id, data) VALUES ('wish', 'x', '{}')")
        .await
        .unwrap();
    let app = running.app("shop").await;
    let unknown = next(&mut stream, "an event of an unknown type").await.1;
    assert_eq!(
        (unknown.object_type, unknown.object_id.as_str()),
        (EventKind::Other, "x")
    );
    assert_eq!(next(&mut stream, "the event after it").await.1.object_id, app.id);
    assert_eq!(
        running.client.events(&filter).await.unwrap().len(),
        3,
        "with its route's"
    );
    drop(stream);
    running.stop().await;
}

async fn horizon() {
    let running = start().await;
    running.app("shop").await;
    let (client, connection) = running
        .options
        .database
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
        .batch_execute("UPDATE event_horizon SET pruned_to = 2; DELETE FROM events WHERE id <= 2")
        .await
        .unwrap();
    let filter = EventFilter::default();
    let Err(gone) = running.client.event_stream(&filter, Some(1)).await else {
        panic!("there is a gap")
    };
    assert_eq!(gone.code, ErrorCode::PreconditionFailed);
    assert!(gone.message.contains("list the objects again"), "{gone}");
    running
        .client
        .event_stream(&filter, Some(2))
        .await
        .expect("nothing is missing after that");
    running.stop().await;
}

async fn bounds() {
    let running = start().await;
    let (app, release, _) = running.running_app("shop", 0).await;
    let options = running.stop().await;
    let (client, connection) = options.database.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let sql = format!(
        "INSERT INTO events (object_type, object_id, data) SELECT 'app', 'x', '{{}}' FROM generate_series(1, 100500);
         INSERT INTO jobs (uuid, host_id, app_id, release_id, process_type, state, args, meta, updated_at)
         SELECT gen_random_uuid(), 'h', '{}', '{}', 'web', 'down', '[]', '{{}}', now() - interval '2 hours'
         FROM generate_series(1, 300)",
        app.id, release.id
    );
    client.batch_execute(&sql).await.unwrap();
    let running = start_with(options).await;
    let count = async |table: &str| -> i64 {
        client
            .query_one(&format!("SELECT count(*) FROM {table}"), &[])
            .await
            .unwrap()
            .get(0)
    };
    eventually("the oldest are gone", || async {
        (count("events").await == 100_000 && count("jobs").await == 200).then_some(())
    })
    .await;
    running.stop().await;
}

async fn formations() {
    let running = start().await;
    let client = &running.client;
    let (one, one_release, _) = running.running_app("one", 1).await;
    let (two, two_release, _) = running.running_app("two", 2).await;
    let mut stream = running
        .http()
        .events::<flynn_api::controller::ExpandedFormation>("/formations?current=true")
        .await
        .unwrap();
    let mut formation = async |what: &str| next(&mut stream, what).await.1;
    let first = [formation("the first").await, formation("the second").await];
    assert_eq!(first.map(|formation| formation.app.name), ["one", "two"]);
    assert_eq!(formation("the end of what was there").await.app.id, "");
    let put = async |count: u32| {
        let formation = Formation {
            app_id: one.id.clone(),
            release_id: one_release.id.clone(),
            processes: Processes::from([("web".into(), count)]),
            ..Formation::default()
        };
        client.put_formation(&formation).await.unwrap();
    };
    put(5).await;
    let changed = formation("the change").await;
    assert_eq!((changed.app.name.as_str(), changed.processes["web"]), ("one", 5));
    assert_eq!(
        (
            changed.artifacts.len(),
            changed.release.env["SECRET_KEY"].as_str()
        ),
        (1, "s3cret-value")
    );
    client.delete_formation(&two.id, &two_release.id).await.unwrap();
    let gone = formation("the deletion").await;
    assert!(gone.deleted && gone.release.id == two_release.id && gone.processes.is_empty());
    client.delete_app("one").await.unwrap();
    assert!(formation("what goes with its app").await.deleted);
    let active = eventually("nothing is wanted", || async {
        let active = client.active_formations().await.unwrap();
        active.is_empty().then_some(active)
    });
    active.await;
    drop(stream);
    running.stop().await;
}

/// What the scheduler acts on: were it half old and half new, it would start or stop what nobody wants it to.
async fn moment() {
    let running = start().await;
    let (app, old, _) = running.running_app("shop", 2).await;
    let new = running.release(&app).await;
    let formation = Formation {
        app_id: app.id.clone(),
        release_id: new.id.clone(),
        processes: Processes::from([("web".into(), 1)]),
        ..Formation::default()
    };
    running.client.put_formation(&formation).await.unwrap();
    let (client, connection) = running
        .options
        .database
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    // The list stops in its midst, once it has read the first formation, for it reads that one's release next.
    client
        .batch_execute("BEGIN; LOCK TABLE releases IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let write = async {
        let waits = "SELECT 1 FROM pg_locks WHERE relation = 'releases'::regclass AND NOT granted";
        eventually("the list is half read", || async {
            (!client.query(waits, &[]).await.unwrap().is_empty()).then_some(())
        })
        .await;
        let turn = format!(
            "UPDATE formations SET processes = CASE release_id WHEN '{}' THEN '{{\"web\": 1}}'::jsonb
             ELSE '{{\"web\": 2}}'::jsonb END; COMMIT",
            old.id
        );
        client.batch_execute(&turn).await.unwrap();
    };
    let (list, ()) = tokio::join!(running.client.active_formations(), write);
    let counts = list
        .unwrap()
        .into_iter()
        .map(|formation| formation.processes["web"]);
    assert_eq!(counts.collect::<Vec<_>>(), [2, 1], "before the change, both");
    running.stop().await;
}
