//! Events: what has changed, in order.

use deadpool_postgres::GenericClient;
use flynn_api::controller::{Event, EventKind};
use flynn_api::{Error, ErrorCode, Result};
use serde::Serialize;
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{Lock, get, lock, of_word, one, only, optional_id, rows, run, word};

/// The channel that tells of new events.
pub(crate) const CHANNEL: &str = "flynn_events";

/// How many events are kept.
pub(crate) const KEPT: i64 = 100_000;

/// How many are read at once.
pub(crate) const BATCH: i64 = 500;

/// An event to be.
pub(crate) struct NewEvent {
    kind: String,
    app_id: Option<Uuid>,
    object_id: String,
    data: Value,
}

impl NewEvent {
    pub(crate) fn new(
        kind: EventKind,
        app_id: Option<&str>,
        object_id: &str,
        data: &impl Serialize,
    ) -> Result<Self> {
        let data = serde_json::to_value(data).map_err(|e| Error::internal(format!("event data: {e}")))?;
        let app_id = app_id
            .filter(|id| !id.is_empty())
            .map(|id| super::id_of("app", id))
            .transpose()?;
        Ok(Self {
            kind: word(&kind)?,
            app_id,
            object_id: object_id.to_owned(),
            data,
        })
    }
}

/// Writes events as the last step of a transaction.
pub(crate) async fn store(c: &impl GenericClient, events: &[NewEvent]) -> Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    lock(c, Lock::Events).await?;
    for event in events {
        run(
            c,
            "INSERT INTO events (app_id, object_type, object_id, data) VALUES ($1, $2, $3, $4)",
            &[&event.app_id, &event.kind, &event.object_id, &Json(&event.data)],
        )
        .await?;
    }
    rows(c, "SELECT pg_notify($1, '')", &[&CHANNEL]).await.map(drop)
}

/// Which events are wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Filter {
    /// Of this app only.
    pub(crate) app_id: Option<Uuid>,
    /// Of these kinds only, unless empty.
    pub(crate) kinds: Vec<EventKind>,
    /// About this object only.
    pub(crate) object_id: Option<String>,
}

impl Filter {
    /// Whether this one is wanted.
    pub(crate) fn matches(&self, event: &Event) -> bool {
        let app = self
            .app_id
            .is_none_or(|id| event.app_id.as_deref() == Some(&id.to_string()));
        let kind = self.kinds.is_empty() || self.kinds.contains(&event.object_type);
        let object = self.object_id.as_ref().is_none_or(|id| *id == event.object_id);
        app && kind && object
    }

    fn words(&self) -> Result<Vec<String>> {
        self.kinds.iter().map(word).collect()
    }
}

const COLUMNS: &str = "id, app_id, object_type, object_id, data, created_at";

fn read(row: &Row) -> Result<Event> {
    Ok(Event {
        id: get(row, "id")?,
        app_id: optional_id(row, "app_id")?,
        object_type: of_word(get(row, "object_type")?)?,
        object_id: get(row, "object_id")?,
        data: get(row, "data")?,
        created_at: get(row, "created_at")?,
    })
}

/// One event.
pub(crate) async fn find(c: &impl GenericClient, id: i64) -> Result<Event> {
    let sql = format!("SELECT {COLUMNS} FROM events WHERE id = $1");
    one(c, &sql, &[&id])
        .await?
        .as_ref()
        .map(read)
        .transpose()?
        .ok_or_else(|| Error::not_found("event", id))
}

/// The newest event's id.
pub(crate) async fn newest(c: &impl GenericClient) -> Result<i64> {
    let sql = "SELECT greatest((SELECT max(id) FROM events), (SELECT pruned_to FROM event_horizon)) AS id";
    get(&only(c, sql, &[]).await?, "id")
}

/// Refuses to go on from an event whose successors may be gone.
pub(crate) async fn check_resumable(c: &impl GenericClient, from: i64) -> Result<()> {
    let pruned: i64 = get(
        &only(c, "SELECT pruned_to FROM event_horizon", &[]).await?,
        "pruned_to",
    )?;
    if from >= pruned {
        return Ok(());
    }
    let message = format!(
        "events up to {pruned} are no longer kept, so the stream cannot go on after {from} without a gap: \
         list the objects again, then stream without Last-Event-Id"
    );
    Err(Error::new(ErrorCode::PreconditionFailed, message))
}

/// The first events after `from`, oldest first.
pub(crate) async fn after(c: &impl GenericClient, from: i64, filter: &Filter) -> Result<Vec<Event>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM events WHERE id > $1 AND ($2::uuid IS NULL OR app_id = $2)
         AND (cardinality($3::text[]) = 0 OR object_type = ANY ($3)) AND ($4::text IS NULL OR object_id = $4)
         ORDER BY id LIMIT $5"
    );
    let params: super::Params<'_> = &[&from, &filter.app_id, &filter.words()?, &filter.object_id, &BATCH];
    rows(c, &sql, params).await?.iter().map(read).collect()
}

/// The last `count` events up to `to` and after `since`, newest first.
pub(crate) async fn past(
    c: &impl GenericClient,
    to: i64,
    since: i64,
    count: i64,
    filter: &Filter,
) -> Result<Vec<Event>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM events WHERE id <= $1 AND ($2::uuid IS NULL OR app_id = $2)
         AND (cardinality($3::text[]) = 0 OR object_type = ANY ($3)) AND ($4::text IS NULL OR object_id = $4)
         AND id > $5 ORDER BY id DESC LIMIT $6"
    );
    let params: super::Params<'_> = &[
        &to,
        &filter.app_id,
        &filter.words()?,
        &filter.object_id,
        &since,
        &count,
    ];
    rows(c, &sql, params).await?.iter().map(read).collect()
}

/// Forgets all but the newest `kept` events.
pub(crate) async fn prune(c: &impl GenericClient, kept: i64) -> Result<u64> {
    // Ids have holes where transactions failed: at most `kept` events stay.
    let to = newest(c).await? - kept;
    run(
        c,
        "UPDATE event_horizon SET pruned_to = $1 WHERE pruned_to < $1",
        &[&to],
    )
    .await?;
    run(c, "DELETE FROM events WHERE id <= $1", &[&to]).await
}
