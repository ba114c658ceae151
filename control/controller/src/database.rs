//! The connection to PostgreSQL: a small pool, migrations at start, and what its failures mean to callers.

use std::path::Path;
use std::time::Duration;

use deadpool_postgres::{
    Client, Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime, Timeouts,
};
use flynn_api::client::Http;
use flynn_api::server::disk;
use flynn_api::{Error, ErrorCode, Result, sirenia};
use tokio_postgres::config::Host;
use tokio_postgres::error::{DbError, Severity, SqlState};
use tokio_postgres::{Config, NoTls};

use crate::data::LOCK_SPACE;

/// Connections at most.
const POOL: usize = 8;
/// How long a call waits for a connection.
const WAIT: Duration = Duration::from_secs(5);
/// Settings of each connection: nothing waits for ever.
const SETTINGS: &str = "-c statement_timeout=15000 -c lock_timeout=8000 \
                        -c idle_in_transaction_session_timeout=30000 -c application_name=flynn-controller";
/// How long the appliance may take to say why its server does not serve.
const ASK: Duration = Duration::from_secs(1);
/// Between attempts to reach the database at the start, at most.
const RETRY: Duration = Duration::from_millis(500);
/// One attempt of so many is logged.
const QUIET: u32 = 20;
/// The second half of the migration lock's key.
const MIGRATION_LOCK: i32 = 100;

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// The database.
#[derive(Clone)]
pub(crate) struct Database {
    pool: Pool,
    config: Config,
}

impl Database {
    /// For this configuration. Nothing is opened yet.
    pub(crate) fn new(mut config: Config) -> anyhow::Result<Self> {
        config
            .connect_timeout(WAIT)
            .tcp_user_timeout(Duration::from_secs(15))
            .keepalives_idle(Duration::from_secs(15))
            .options(SETTINGS);
        let manager_config = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let manager = Manager::from_config(config.clone(), NoTls, manager_config);
        let timeouts = Timeouts {
            wait: Some(WAIT),
            create: Some(WAIT),
            recycle: Some(WAIT),
        };
        let pool = Pool::builder(manager)
            .max_size(POOL)
            .timeouts(timeouts)
            .runtime(Runtime::Tokio1)
            .build()?;
        Ok(Self { pool, config })
    }

    /// How a connection of one's own is made.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// A connection from the pool.
    pub(crate) async fn client(&self) -> Result<Client> {
        let client = self.pool.get().await.map_err(|why| match why {
            PoolError::Backend(why) => explain(why),
            PoolError::Timeout(_) => away(&"no connection became free in time"),
            why => away(&why),
        });
        match client {
            Err(error) if error.code == ErrorCode::Unavailable => Err(self.with_reason(error).await),
            client => client,
        }
    }

    /// Adds what the appliance, which outlives its server, knows of why it does not serve.
    async fn with_reason(&self, mut error: Error) -> Error {
        let Some(Host::Tcp(host)) = self.config.get_hosts().first() else {
            return error;
        };
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        let asked = async {
            let http = Http::new(&format!("http://{host}:{}", port + 1))?;
            http.get::<sirenia::Status>("/status").await
        };
        if let Ok(Ok(status)) = tokio::time::timeout(ASK, asked).await
            && let Some(why) = status.peer.problem.or(status.database.error)
        {
            error.message = format!("{}. The database says: {why}", error.message);
        }
        error
    }

    /// Waits until the database answers, and brings its schema up to date.
    ///
    /// Several controllers may start at once: they do it one after the other, under an advisory lock.
    pub(crate) async fn migrate(&self) -> anyhow::Result<()> {
        let mut attempts = 0_u32;
        let (mut client, connection) = loop {
            match self.config.connect(NoTls).await {
                Ok(connected) => break connected,
                Err(why) => {
                    if attempts.is_multiple_of(QUIET) {
                        let server = describe(&self.config);
                        tracing::warn!(why = %chain(&why), %server, "waiting for PostgreSQL");
                    }
                    // Short: a cluster that starts waits for this.
                    tokio::time::sleep(RETRY.min(Duration::from_millis(50) * (attempts + 1))).await;
                    attempts = attempts.saturating_add(1);
                }
            }
        };
        let driver = tokio::spawn(connection);
        // Another controller's migration may take longer than a statement usually may.
        client
            .batch_execute("SET statement_timeout = 0; SET lock_timeout = 0")
            .await?;
        client
            .execute("SELECT pg_advisory_lock($1, $2)", &[&LOCK_SPACE, &MIGRATION_LOCK])
            .await?;
        let report = migrations::migrations::runner().run_async(&mut client).await?;
        for migration in report.applied_migrations() {
            tracing::info!(%migration, "the database has been migrated");
        }
        // The lock goes with the connection.
        drop(client);
        driver.await??;
        Ok(())
    }
}

/// The server, without its password.
fn describe(config: &Config) -> String {
    let hosts: Vec<_> = config
        .get_hosts()
        .iter()
        .map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        })
        .collect();
    format!("{}/{}", hosts.join(","), config.get_dbname().unwrap_or_default())
}

fn chain(why: &(dyn std::error::Error + 'static)) -> String {
    let mut text = why.to_string();
    let mut cause = why.source();
    while let Some(why) = cause {
        text.push_str(": ");
        text.push_str(&why.to_string());
        cause = why.source();
    }
    text
}

fn away(why: &dyn std::fmt::Display) -> Error {
    tracing::warn!(%why, "the database does not serve");
    // The container's writable layer is on its host's disk, where the database's volume may be as well.
    match disk::nearly_full(Path::new("/")) {
        Ok(Some(free)) => Error::unavailable(format!(
            "the controller's database is not there now. Nothing was changed. The disk of the controller's host is \
             full ({free} MiB left), which may be why: make room there (old layers, volumes, logs), and the \
             database comes back by itself"
        )),
        _ => Error::unavailable(
            "the controller's database is not there now. Nothing was changed; try again in a moment",
        ),
    }
}

/// What the failure of a commit means to the caller. Where the connection broke, it may have been made all the same.
pub(crate) fn explain_commit(why: tokio_postgres::Error) -> Error {
    let answer = why.as_db_error().and_then(DbError::parsed_severity);
    if answer == Some(Severity::Error) {
        return explain(why);
    }
    tracing::warn!(why = %chain(&why), "the database broke off in the midst of a commit");
    Error::new(
        ErrorCode::Timeout,
        "the controller's database broke off in the midst of the change, so whether it was made is not known: look at \
         the object, and try again if it was not",
    )
}

/// What a failure of the database means to the caller. Messages of the server stay in the log: they may quote data.
#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
pub(crate) fn explain(why: tokio_postgres::Error) -> Error {
    let Some(db) = why.as_db_error() else {
        return if why.is_closed()
            || std::error::Error::source(&why).is_some_and(<dyn std::error::Error>::is::<std::io::Error>)
        {
            away(&chain(&why))
        } else {
            tracing::error!(why = %chain(&why), "the database cannot be asked");
            Error::internal("the controller cannot ask its database; its log says why")
        };
    };
    let code = db.code();
    if code.code() == "FL001" {
        // Our own trigger: its words name two states and nothing else.
        return Error::conflict(format!("{}: states only go forward", db.message()));
    }
    if *code == SqlState::CHARACTER_NOT_IN_REPERTOIRE || *code == SqlState::UNTRANSLATABLE_CHARACTER {
        return Error::validation("a text contains a NUL character, which cannot be stored: remove it");
    }
    if *code == SqlState::T_R_SERIALIZATION_FAILURE
        || *code == SqlState::T_R_DEADLOCK_DETECTED
        || *code == SqlState::LOCK_NOT_AVAILABLE
    {
        let mut error = Error::conflict("another change of the same object was under way: try again");
        error.retry = true;
        return error;
    }
    if *code == SqlState::DISK_FULL {
        tracing::error!(message = db.message(), "the database has no room");
        return disk::full(
            "nothing was changed, for the disk of the host that the controller's database is on is full",
        );
    }
    // Class 08: connection; 53: resources; 57: an operator's or a timeout's intervention; read-only: a deposed primary.
    let class = &code.code()[..2];
    if matches!(class, "08" | "53" | "57") || *code == SqlState::READ_ONLY_SQL_TRANSACTION {
        return away(&db);
    }
    if *code == SqlState::UNIQUE_VIOLATION || *code == SqlState::FOREIGN_KEY_VIOLATION {
        tracing::warn!(
            constraint = db.constraint(),
            "a constraint of the database refused a change"
        );
        return Error::new(
            ErrorCode::Conflict,
            "another change at the same moment made this one impossible: read the object again, then retry",
        );
    }
    tracing::error!(
        code = code.code(),
        message = db.message(),
        "the database refused a statement"
    );
    Error::internal("the controller's database refused a statement; the controller's log says why")
}
