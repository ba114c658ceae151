//! The stream of events: one connection listens, everyone else follows it.
//!
//! A subscription reads from the database what it has missed and then goes over to what is broadcast. Who falls
//! behind reads from the database again. Either way each event comes once, in the order of the ids.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::Result;
use flynn_api::controller::Event;
use futures::Stream;
use futures::future::poll_fn;
use tokio::sync::{Notify, broadcast};
use tokio_postgres::{AsyncMessage, NoTls};

use crate::data::events::{self, BATCH, Filter};
use crate::database::Database;

/// Events that a slow subscriber may lag behind before it reads from the database again.
const BACKLOG: usize = 256;
/// Between looks at the database when nothing is heard.
const POLL: Duration = Duration::from_secs(10);

/// Where subscriptions come from. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Feed {
    database: Database,
    sender: broadcast::Sender<Arc<Event>>,
    /// What comes after this event is broadcast.
    from: i64,
}

impl Feed {
    /// A feed of what comes after the events that are there now. Silent until [`Feed::run`].
    ///
    /// Where it begins is settled here, before anyone can subscribe, and not once it listens: an event in between
    /// would never reach a subscription that has read the database before it.
    pub(crate) async fn new(database: Database) -> Result<Self> {
        let from = events::newest(&database.client().await?).await?;
        Ok(Self {
            database,
            sender: broadcast::channel(BACKLOG).0,
            from,
        })
    }

    /// Listens for ever; reconnects when the database goes away, and catches up by id.
    pub(crate) async fn run(self) {
        let mut last = self.from;
        loop {
            if let Err(why) = self.listen(&mut last).await {
                tracing::warn!(%why, "the stream of events broke off; connecting again");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Relays events until the connection breaks off. `last` is the last one that has been broadcast.
    async fn listen(&self, last: &mut i64) -> anyhow::Result<()> {
        let (client, mut connection) = self.database.config().connect(NoTls).await?;
        let heard = Arc::new(Notify::new());
        let notify = Arc::clone(&heard);
        let mut driver = tokio::spawn(async move {
            while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
                if let AsyncMessage::Notification(_) = message? {
                    notify.notify_one();
                }
            }
            Ok::<_, tokio_postgres::Error>(())
        });
        let result = async {
            client
                .batch_execute(&format!("LISTEN {}", events::CHANNEL))
                .await?;
            loop {
                // Once more after each silence as well: whatever was not heard is found.
                *last = self.relay(*last).await?;
                tokio::select! {
                    () = heard.notified() => {}
                    ended = &mut driver => {
                        ended??;
                        anyhow::bail!("the connection was closed");
                    }
                    // Silence may mean that nothing happens, or that the connection is dead.
                    () = tokio::time::sleep(POLL) => client.batch_execute("").await?,
                }
            }
        }
        .await;
        driver.abort();
        result
    }

    /// Broadcasts all events after `from`; gives the last one's id.
    async fn relay(&self, mut from: i64) -> Result<i64> {
        loop {
            let batch = events::after(&self.database.client().await?, from, &Filter::default()).await?;
            let whole = batch.len() < usize::try_from(BATCH).unwrap_or(usize::MAX);
            for event in batch {
                from = event.id;
                // Nobody may be listening.
                let _ = self.sender.send(Arc::new(event));
            }
            if whole {
                return Ok(from);
            }
        }
    }

    /// The id of the newest event.
    pub(crate) async fn newest(&self) -> Result<i64> {
        events::newest(&self.database.client().await?).await
    }

    /// All events after `from` that pass the filter, and those to come. `first` are given before them.
    pub(crate) fn subscribe(&self, from: i64, filter: Filter, first: Vec<Event>) -> Subscription {
        Subscription {
            receiver: self.sender.subscribe(),
            database: self.database.clone(),
            filter,
            last: from,
            catching_up: true,
            pending: first.into(),
        }
    }

    /// Tells that something has changed, without saying what.
    pub(crate) fn changes(&self) -> broadcast::Receiver<Arc<Event>> {
        self.sender.subscribe()
    }
}

/// One reader of the feed.
pub(crate) struct Subscription {
    receiver: broadcast::Receiver<Arc<Event>>,
    database: Database,
    filter: Filter,
    last: i64,
    catching_up: bool,
    pending: VecDeque<Event>,
}

impl Subscription {
    /// The next event; none when the controller stops.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                self.last = self.last.max(event.id);
                return Some(event);
            }
            if self.catching_up {
                match self.catch_up().await {
                    Ok(batch) => {
                        self.catching_up = batch.len() >= usize::try_from(BATCH).unwrap_or(usize::MAX);
                        self.pending = batch.into();
                    }
                    // The database is away: the subscriber waits as it would for an event.
                    Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                }
                continue;
            }
            match self.receiver.recv().await {
                Ok(event) if event.id > self.last => {
                    self.last = event.id;
                    if self.filter.matches(&event) {
                        return Some(Event::clone(&event));
                    }
                }
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => self.catching_up = true,
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }

    async fn catch_up(&self) -> Result<Vec<Event>> {
        events::after(&self.database.client().await?, self.last, &self.filter).await
    }

    /// As a stream.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Event> + Send {
        futures::stream::unfold(self, |mut subscription| async move {
            subscription.next().await.map(|event| (event, subscription))
        })
    }
}
