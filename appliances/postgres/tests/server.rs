//! The appliance against the machine's PostgreSQL: keepers in processes of their own, a discoverd in memory.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/discoverd.rs"]
mod discoverd;
#[path = "support/keeper.rs"]
mod keeper;

use std::path::{Path, PathBuf};
use std::time::Duration;

use discoverd::Discoverd;
use flynn_api::client::Http;
use flynn_api::sirenia::{Role, State};
use keeper::{Keeper, PASSWORD, children, until};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::{Signal, kill_process};

/// Where Debian and Ubuntu have PostgreSQL's programs: 15 as in our images, or what the machine has.
fn programs() -> Option<PathBuf> {
    let versions =
        ["15", "16", "17"].map(|version| Path::new("/usr/lib/postgresql").join(version).join("bin"));
    versions
        .into_iter()
        .find(|programs| programs.join("initdb").exists())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "keeper") {
        return keeper::main(&arguments[1..]);
    }
    flynn_api::tls::install_provider();
    let missing = missing();
    if let Some(why) = &missing {
        eprintln!("skipped: {why}");
    }
    let trial = |name: &str, test: fn() -> Result<(), Failed>| {
        Trial::test(name, test).with_ignored_flag(missing.is_some())
    };
    let trials = vec![
        trial("a_database_is_made_used_stopped_and_found_again", || {
            run(whole_life())
        }),
        trial("what_was_acknowledged_outlives_any_kill", || run(kills())),
        trial("a_database_that_was_half_made_is_made_anew", || run(half_made())),
        trial("a_keeper_waits_for_discoverd_and_does_without", || {
            run(discoverd_away())
        }),
        trial("a_second_peer_takes_nothing_over", || run(second_peer())),
        trial("a_volume_has_one_keeper", || run(one_keeper())),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// What this machine lacks.
fn missing() -> Option<String> {
    if programs().is_none() {
        return Some("there is no PostgreSQL in /usr/lib/postgresql (Debian package postgresql-15)".into());
    }
    let accounts = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let root = rustix::process::geteuid().is_root();
    (root && !accounts.contains("postgres:")).then(|| "there is no user `postgres`".into())
}

fn run(test: impl Future<Output = ()>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(test);
    Ok(())
}

async fn state(discoverd: &Discoverd) -> State {
    until("a state", || async {
        serde_json::from_value(discoverd.service().meta?.data).ok()
    })
    .await
}

async fn whole_life() {
    let discoverd = Discoverd::new();
    let (plain, tls, _guard) = discoverd.listen().await;
    let mut keeper = Keeper::new(&discoverd, (plain, tls));
    keeper.start();
    let client = keeper.ready().await;
    client
        .batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (7)")
        .await
        .unwrap();

    let first = state(&discoverd).await;
    assert!(first.singleton && first.freeze.is_some() && first.generation == 1);
    let service = discoverd.service();
    assert_eq!(service.leader.as_ref(), Some(&first.primary.id));
    assert_eq!(first.primary.addr, format!("{}:5432", keeper.address));
    assert_eq!(first.primary.meta["FLYNN_APP_NAME"], "postgres");
    let status = keeper.status().await.unwrap();
    assert_eq!(status.peer.role, Role::Primary);
    assert!(status.database.read_write && status.database.running && !status.database.xlog.is_empty());

    assert!(keeper.connect("wrong").await.is_err());
    let settings = "SELECT current_setting('data_checksums'), current_setting('fsync')";
    let row = client.query_one(settings, &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1)), ("on", "on"));
    secret_is_kept(&keeper);

    // Without the password nobody stops it.
    let http = Http::new(&format!("http://{}:5433", keeper.address)).unwrap();
    assert!(http.post::<()>("/stop", &()).await.is_err());
    http.get::<serde_json::Value>("/.well-known/status")
        .await
        .unwrap();

    let postmaster = keeper.postmaster().unwrap();
    assert!(keeper.stop().await.success());
    assert!(
        rustix::process::test_kill_process(postmaster).is_err(),
        "the server is down"
    );
    assert!(discoverd.service().instances.is_empty(), "deregistered");

    // The same volume elsewhere, and another password.
    keeper.move_away();
    keeper.password = "another".into();
    keeper.start();
    let client = keeper.ready().await;
    assert_eq!(
        client
            .query_one("SELECT n FROM t", &[])
            .await
            .unwrap()
            .get::<_, i32>(0),
        7
    );
    assert!(keeper.connect(PASSWORD).await.is_err());
    let moved = until("the lead moves", || async {
        let state = state(&discoverd).await;
        (state.primary.addr == format!("{}:5432", keeper.address)).then_some(state)
    })
    .await;
    assert_eq!((moved.generation, &moved.primary.meta), (1, &first.primary.meta));
    assert_eq!(discoverd.service().leader, Some(moved.primary.id));

    let http = Http::new(&format!("http://{}:5433", keeper.address))
        .unwrap()
        .password("another");
    http.post::<()>("/stop", &()).await.unwrap();
    assert!(keeper.ended().await.success());
}

/// The password is in no command line and in no environment of the server's.
fn secret_is_kept(keeper: &Keeper) {
    let postmaster = keeper.postmaster().unwrap();
    for pid in children(postmaster).into_iter().chain([postmaster]) {
        for file in ["cmdline", "environ"] {
            let path = format!("/proc/{}/{file}", pid.as_raw_nonzero());
            // A process may have ended meanwhile.
            let text = std::fs::read(path).unwrap_or_default();
            assert!(
                !String::from_utf8_lossy(&text).contains("battery"),
                "{file} of {pid:?}"
            );
        }
    }
}

async fn kills() {
    let discoverd = Discoverd::new();
    let (plain, tls, _guard) = discoverd.listen().await;
    let mut keeper = Keeper::new(&discoverd, (plain, tls));
    keeper.start();
    keeper
        .ready()
        .await
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();
    let mut acknowledged = 0;
    for round in 0..4 {
        let client = keeper.ready().await;
        for _ in 0..20 {
            client
                .execute("INSERT INTO t VALUES ($1)", &[&acknowledged])
                .await
                .unwrap();
            acknowledged += 1;
        }
        let postmaster = keeper.postmaster().unwrap();
        match round {
            // The server's parent process: the keeper starts it again.
            0 => kill_process(postmaster, Signal::KILL).unwrap(),
            // One of its children: it recovers by itself.
            1 => kill_process(children(postmaster)[0], Signal::KILL).unwrap(),
            // All of it; and the process id that it leaves behind is in use again.
            _ => {
                keeper.power_off().await;
                let path = keeper.volume().join("pg/postmaster.pid");
                let text = std::fs::read_to_string(&path).unwrap();
                let rest = text.split_once('\n').unwrap().1;
                std::fs::write(&path, format!("{}\n{rest}", std::process::id())).unwrap();
                keeper.start();
            }
        }
        let count = until("every row is there again", || async {
            let client = keeper.connect(&keeper.password).await.ok()?;
            client.query_one("SELECT count(*), max(n) FROM t", &[]).await.ok()
        })
        .await;
        assert_eq!(
            (count.get::<_, i64>(0), count.get::<_, i32>(1)),
            (i64::from(acknowledged), acknowledged - 1)
        );
    }
    until("it leads", || async {
        discoverd
            .service()
            .leader
            .filter(|leader| discoverd.service().instances.contains_key(leader))
    })
    .await;
    assert!(keeper.stop().await.success());
}

async fn half_made() {
    let discoverd = Discoverd::new();
    let (plain, tls, _guard) = discoverd.listen().await;
    let mut keeper = Keeper::new(&discoverd, (plain, tls));
    for millis in [0, 150, 400] {
        keeper.start();
        until("it is being made", || async {
            keeper.volume().join("pg.new").exists().then_some(())
        })
        .await;
        tokio::time::sleep(Duration::from_millis(millis)).await;
        keeper.kill().await;
        if keeper.volume().join("pg").exists() {
            break;
        }
    }
    keeper.start();
    let _ = keeper.ready().await;
    assert_eq!(state(&discoverd).await.generation, 1);
    assert!(keeper.stop().await.success());
}

async fn discoverd_away() {
    let discoverd = Discoverd::new();
    let (plain, tls, guard) = discoverd.listen().await;
    drop(guard);
    let mut keeper = Keeper::new(&discoverd, (plain, tls));
    keeper.start();
    let status = until("status", || keeper.status()).await;
    assert_eq!((status.peer.role, status.database.running), (Role::None, false));
    assert!(status.peer.problem.unwrap().contains("discoverd"));
    let guard = until("its ports are free again", || async {
        tokio::time::timeout(Duration::from_secs(5), discoverd.listen())
            .await
            .ok()
    })
    .await
    .2;
    let client = keeper.ready().await;
    drop(guard);
    client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    assert!(keeper.stop().await.success());
}

async fn second_peer() {
    let discoverd = Discoverd::new();
    let (plain, tls, _guard) = discoverd.listen().await;
    let mut first = Keeper::new(&discoverd, (plain, tls));
    first.start();
    let _ = first.ready().await;
    let before = state(&discoverd).await;
    let mut second = Keeper::new(&discoverd, (plain, tls));
    second.start();
    let told = || async {
        second
            .status()
            .await?
            .peer
            .problem
            .filter(|why| why.contains("singleton"))
    };
    until("it says why it waits", told).await;
    // Even when the first is gone.
    first.power_off().await;
    discoverd.expire(&before.primary.id);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(second.status().await.unwrap().peer.role, Role::Unassigned);
    assert_eq!(state(&discoverd).await, before);
    assert!(!second.volume().join("pg").exists());
    assert!(second.stop().await.success());
}

async fn one_keeper() {
    let discoverd = Discoverd::new();
    let (plain, tls, _guard) = discoverd.listen().await;
    let mut keeper = Keeper::new(&discoverd, (plain, tls));
    keeper.start();
    let client = keeper.ready().await;
    // The keeper dies and its server does not: the next waits for the server's end.
    let orphan = keeper.postmaster().unwrap();
    keeper.kill().await;
    client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    keeper.start();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(keeper.postmaster(), Some(orphan));
    kill_process(orphan, Signal::INT).unwrap();
    drop(client);
    let client = until("the next server", || async {
        let other = keeper.postmaster().filter(|pid| *pid != orphan);
        other.is_some().then_some(())?;
        keeper.connect(PASSWORD).await.ok()
    })
    .await;
    client.batch_execute("SELECT * FROM t").await.unwrap();
    assert!(keeper.stop().await.success());
}
