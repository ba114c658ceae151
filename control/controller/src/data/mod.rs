//! What the controller keeps, one module per resource. All SQL is here; nothing else is.
//!
//! A mutation happens in a [`Change`]: a transaction together with the events that tell of it. Events are written
//! at its very end, under one lock that is held until the commit. So the ids of events become visible in their
//! order, and whoever has read up to id n will never find a smaller one later.

pub(crate) mod apps;
pub(crate) mod artifacts;
pub(crate) mod certificates;
pub(crate) mod deployments;
pub(crate) mod events;
pub(crate) mod formations;
pub(crate) mod jobs;
pub(crate) mod releases;
pub(crate) mod routes;
pub(crate) mod scales;

use deadpool_postgres::{Client, GenericClient, Transaction};
use flynn_api::controller::EventKind;
use flynn_api::{Error, Result};
use serde::Serialize;
use tokio_postgres::types::ToSql;
use tokio_postgres::{IsolationLevel, Row};
use uuid::Uuid;

use crate::database::{explain, explain_commit};

/// Longest answer of a listing that grows with history: the newest entries.
pub(crate) const LIST_LIMIT: i64 = 1000;

pub(crate) type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A transaction and the events that tell of it. Dropped without [`Change::commit`], nothing has happened.
pub(crate) struct Change<'a> {
    tx: Transaction<'a>,
    events: Vec<events::NewEvent>,
}

impl<'a> Change<'a> {
    /// Begins one.
    pub(crate) async fn begin(client: &'a mut Client) -> Result<Self> {
        let tx = client.transaction().await.map_err(explain)?;
        Ok(Self {
            tx,
            events: Vec::new(),
        })
    }

    /// The transaction.
    pub(crate) fn tx(&self) -> &Transaction<'a> {
        &self.tx
    }

    /// Says what has changed. `data` must carry no secret.
    pub(crate) fn tell(
        &mut self,
        kind: EventKind,
        app_id: Option<&str>,
        object_id: &str,
        data: &impl Serialize,
    ) -> Result<()> {
        self.events
            .push(events::NewEvent::new(kind, app_id, object_id, data)?);
        Ok(())
    }

    /// Makes it so.
    pub(crate) async fn commit(self) -> Result<()> {
        events::store(&self.tx, &self.events).await?;
        self.tx.commit().await.map_err(explain_commit)
    }
}

/// A transaction that reads everything as it was at one moment.
pub(crate) async fn snapshot(client: &mut Client) -> Result<Transaction<'_>> {
    client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
        .map_err(explain)
}

/// Locks that a transaction takes for itself, released at its end. Each is taken before [`Lock::Events`].
#[derive(Clone, Copy)]
pub(crate) enum Lock {
    /// Events get their ids.
    Events = 1,
    /// Routes are looked at as a whole: paths of a domain, free ports.
    Routes = 2,
}

/// The first half of the keys of our advisory locks.
pub(crate) const LOCK_SPACE: i32 = 0x666c_796e;

/// Waits for a lock.
pub(crate) async fn lock(c: &impl GenericClient, lock: Lock) -> Result<()> {
    rows(
        c,
        "SELECT pg_advisory_xact_lock($1, $2)",
        &[&LOCK_SPACE, &(lock as i32)],
    )
    .await
    .map(drop)
}

/// All rows of a statement that stays prepared.
pub(crate) async fn rows(c: &impl GenericClient, sql: &str, params: Params<'_>) -> Result<Vec<Row>> {
    let statement = c.prepare_cached(sql).await.map_err(explain)?;
    c.query(&statement, params).await.map_err(explain)
}

/// The one row of a statement, if there is one.
pub(crate) async fn one(c: &impl GenericClient, sql: &str, params: Params<'_>) -> Result<Option<Row>> {
    Ok(rows(c, sql, params).await?.into_iter().next())
}

/// The one row of a statement that always has one.
pub(crate) async fn only(c: &impl GenericClient, sql: &str, params: Params<'_>) -> Result<Row> {
    one(c, sql, params)
        .await?
        .ok_or_else(|| Error::internal("the database gave no row where one was due"))
}

/// How many rows a statement changed.
pub(crate) async fn run(c: &impl GenericClient, sql: &str, params: Params<'_>) -> Result<u64> {
    let statement = c.prepare_cached(sql).await.map_err(explain)?;
    c.execute(&statement, params).await.map_err(explain)
}

/// The id in a text from outside.
pub(crate) fn id_of(what: &str, text: &str) -> Result<Uuid> {
    Uuid::try_parse(text).map_err(|_| Error::not_found(what, format!("{text:?}: an id is a UUID")))
}

/// A column that holds JSON.
pub(crate) fn json<T: serde::de::DeserializeOwned>(row: &Row, column: &str) -> Result<T> {
    let tokio_postgres::types::Json(value) = row.try_get(column).map_err(explain)?;
    Ok(value)
}

/// A column that holds an id.
pub(crate) fn id(row: &Row, column: &str) -> Result<String> {
    Ok(row.try_get::<_, Uuid>(column).map_err(explain)?.to_string())
}

/// A column that may hold an id.
pub(crate) fn optional_id(row: &Row, column: &str) -> Result<Option<String>> {
    Ok(row
        .try_get::<_, Option<Uuid>>(column)
        .map_err(explain)?
        .map(|id| id.to_string()))
}

/// Any other column.
pub(crate) fn get<'a, T: tokio_postgres::types::FromSql<'a>>(row: &'a Row, column: &str) -> Result<T> {
    row.try_get(column).map_err(explain)
}

/// The word that JSON uses for a value of a small enum.
pub(crate) fn word(value: &impl Serialize) -> Result<String> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => Ok(word),
        _ => Err(Error::internal("a value that should be one word is not")),
    }
}

/// The value of a small enum from its word.
pub(crate) fn of_word<T: serde::de::DeserializeOwned>(word: &str) -> Result<T> {
    serde_json::from_value(serde_json::Value::String(word.to_owned())).map_err(|_| {
        Error::internal(format!(
            "the database holds {word:?}, which this version does not know"
        ))
    })
}
