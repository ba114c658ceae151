//! openraft's log storage: the log in memory, each change in the [`super::journal`].
//!
//! The journal is a file, or what a simulation has in its stead ([`Records`]).
//!
//! Snapshots keep the log short, so all of it fits in memory: reads never touch the disk. Changes go to the journal in
//! the order in which they are made, under the lock of the log, so vote and log are written one after the other.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend, RaftLogReader};
use tokio::sync::oneshot;

use super::journal::{Done, Encoded, Journal, Record};
use super::{Entry, LogId, Types, Vote};
use crate::metrics::Times;

/// A journal longer than this is rewritten when entries are purged.
const REWRITE_BYTES: u64 = 4 << 20;
/// Bytes of the entries that go to another member with one call, about, unless it is one alone.
const MAX_CALL: usize = 256 << 10;

/// Where the changes of a log go, in their order.
pub trait Records: Debug + Send + Sync + 'static {
    /// Appends records. With `done` they are synced before it is called; without, they are only written.
    fn append(&self, records: Encoded, done: Option<Done>) -> io::Result<()>;
    /// Replaces what is there by `records`, which amount to the same.
    fn rewrite(&self, records: Encoded) -> io::Result<()>;
    /// Bytes that are there.
    fn length(&self) -> u64;
}

impl Records for Journal {
    fn append(&self, records: Encoded, done: Option<Done>) -> io::Result<()> {
        self.append(records, done)
    }

    fn rewrite(&self, records: Encoded) -> io::Result<()> {
        self.rewrite(records)
    }

    fn length(&self) -> u64 {
        self.length()
    }
}

/// The log store. Clones share it.
#[derive(Debug)]
pub struct LogStore<J = Journal> {
    shared: Arc<Shared<J>>,
}

impl<J> Clone for LogStore<J> {
    fn clone(&self) -> Self {
        let shared = Arc::clone(&self.shared);
        Self { shared }
    }
}

#[derive(Debug)]
struct Shared<J> {
    log: Mutex<Log>,
    journal: J,
}

/// What the records of a journal add up to.
#[derive(Debug, Default, PartialEq)]
struct Log {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    entries: BTreeMap<u64, Entry>,
}

impl Log {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Vote(vote) => self.vote = Some(vote),
            Record::Entry(entry) => {
                self.entries.insert(entry.log_id.index, entry);
            }
            Record::TruncateAfter(last) => {
                let from = last.map_or(0, |last| last.index + 1);
                drop(self.entries.split_off(&from));
            }
            Record::Purge(upto) => {
                self.entries = self.entries.split_off(&(upto.index + 1));
                self.purged = self.purged.max(Some(upto));
            }
            Record::Committed(committed) => self.committed = committed,
        }
    }

    fn last(&self) -> Option<LogId> {
        let last = self.entries.last_key_value().map(|(_, entry)| entry.log_id);
        last.or(self.purged)
    }

    /// The shortest list of records that adds up to this log.
    fn records(&self) -> io::Result<Encoded> {
        let mut records = Encoded::default();
        if let Some(vote) = &self.vote {
            records.push(&Record::Vote(*vote))?;
        }
        if let Some(purged) = self.purged {
            records.push(&Record::Purge(purged))?;
        }
        for entry in self.entries.values() {
            records.push(&Record::Entry(entry.clone()))?;
        }
        records.push(&Record::Committed(self.committed))?;
        Ok(records)
    }
}

impl LogStore {
    /// Opens the log in the directory `dir`.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::recover(|each| Journal::open(&dir.join("journal"), each))
    }

    /// Whether a write waits for room on the disk.
    pub fn disk_is_full(&self) -> bool {
        self.shared.journal.disk_is_full()
    }

    /// Bytes on the disk.
    pub fn bytes(&self) -> u64 {
        self.shared.journal.length()
    }

    /// How long a batch takes to be written and synced.
    pub fn syncs(&self) -> &Times {
        self.shared.journal.syncs()
    }
}

impl<J: Records> LogStore<J> {
    /// The log of the journal that `open` opens; it gives each record that is there to the function that it gets.
    pub fn recover(open: impl FnOnce(&mut dyn FnMut(Record)) -> io::Result<J>) -> io::Result<Self> {
        let mut log = Log::default();
        let journal = open(&mut |record| log.apply(record))?;
        let log = Mutex::new(log);
        Ok(Self {
            shared: Arc::new(Shared { log, journal }),
        })
    }

    /// The last entry, which may be in the snapshot alone.
    pub fn last(&self) -> Option<LogId> {
        self.log().last()
    }

    /// The Raft term of the vote.
    pub fn term(&self) -> u64 {
        self.log().vote.map_or(0, |vote| vote.leader_id.term)
    }

    /// All entries that are not in the snapshot alone.
    pub fn entries(&self) -> Vec<Entry> {
        self.log().entries.values().cloned().collect()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.shared.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies `record` and orders it to be written; `synced` waits in the given channel.
    fn record(&self, record: Record, synced: Option<oneshot::Sender<io::Result<()>>>) -> io::Result<()> {
        let mut encoded = Encoded::default();
        encoded.push(&record)?;
        let mut log = self.log();
        log.apply(record);
        let done = synced.map(|synced| {
            Box::new(move |result| {
                // Whoever waited may have been cancelled.
                let _ = synced.send(result);
            }) as Done
        });
        self.shared.journal.append(encoded, done)
    }

    async fn record_synced(&self, record: Record) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        self.record(record, Some(sender))?;
        receiver
            .await
            .map_err(|_| io::Error::other("the journal has stopped"))?
    }
}

impl<C: Types, J: Records> RaftLogReader<C> for LogStore<J> {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        Ok(self
            .log()
            .entries
            .range(range)
            .map(|(_, entry)| entry.clone())
            .collect())
    }

    /// As many as fit in one call.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let log = self.log();
        let (mut weight, mut entries) = (0, Vec::new());
        for (_, entry) in log.entries.range(start..end) {
            weight += match &entry.payload {
                EntryPayload::Normal(command) => command.weight(),
                EntryPayload::Membership(_) | EntryPayload::Blank => 0,
            };
            if weight > MAX_CALL && !entries.is_empty() {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.log().vote)
    }
}

impl<C: Types, J: Records> RaftLogStorage<C> for LogStore<J> {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<C>, io::Error> {
        let log = self.log();
        Ok(LogState {
            last_purged_log_id: log.purged,
            last_log_id: log.last(),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.record_synced(Record::Vote(*vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Not synced: it is needed after a crash of the process, for answers without a quorum. After a power cut an
        // older one does no harm, since reads that must not go back in time ask the leader, which knows better: it was
        // elected since (`enable_leader_restore` is off).
        self.record(Record::Committed(committed), None)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.log().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<C>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut encoded = Encoded::default();
        let mut log = self.log();
        for entry in entries {
            let record = Record::Entry(entry);
            encoded.push(&record)?;
            log.apply(record);
        }
        self.shared
            .journal
            .append(encoded, Some(Box::new(|result| callback.io_completed(result))))
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.record_synced(Record::TruncateAfter(last)).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        // Not synced: entries that come back after a power cut are purged again.
        self.record(Record::Purge(upto), None)?;
        if self.shared.journal.length() > REWRITE_BYTES {
            let log = self.log();
            self.shared.journal.rewrite(log.records()?)?;
        }
        Ok(())
    }
}
