//! A member's disk: what the journal wrote, how much of it is synced, and the snapshot.
//!
//! The journal's bytes are made by [`Encoded::frame`] and read by [`journal::scan`], as with a file; what is simulated
//! is the thread that writes and syncs them, batch after batch, and what a power cut leaves of them.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use flynn_discovery::raft::journal::{self, Done, Encoded, Record};
use flynn_discovery::raft::log::Records;
use flynn_discovery::raft::snapshot::{self, Snapshots};
use flynn_discovery::raft::{Snapshot, SnapshotMeta};
use rand::RngExt as _;

use crate::executor::{self, Process, draw, spawn_on};
use crate::seen::Seen;

/// The journal is said to be that many times longer, so that it is rewritten now and then.
const EXAGGERATED: u64 = 256;
const SECTOR: usize = 512;

enum Order {
    Append(Encoded, Option<Done>),
    Rewrite(Encoded),
}

struct State {
    journal: Vec<u8>,
    synced: usize,
    snapshot: Option<Vec<u8>>,
    /// How long a sync takes, in microseconds, up to twice as long.
    sync: u64,
    orders: VecDeque<Order>,
    busy: bool,
    seen: Seen,
}

/// A disk. Clones share it; it outlives the processes that use it.
#[derive(Clone)]
pub(crate) struct Disk(Arc<Mutex<State>>);

/// Microseconds.
const USUAL_SYNC: u64 = 150;

impl Disk {
    pub(crate) fn new(seen: Seen) -> Self {
        Self(Arc::new(Mutex::new(State {
            journal: journal::header().to_vec(),
            synced: journal::header().len(),
            snapshot: None,
            sync: USUAL_SYNC,
            orders: VecDeque::new(),
            busy: false,
            seen,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Makes syncs that slow (in microseconds), or as fast as usual.
    pub(crate) fn slow(&self, sync: Option<u64>) {
        self.state().sync = sync.unwrap_or(USUAL_SYNC);
    }

    /// The process that used it is gone.
    pub(crate) fn abandon(&self) {
        let mut state = self.state();
        let orders = std::mem::take(&mut state.orders);
        state.busy = false;
        drop(state);
        drop(orders);
    }

    /// Power is lost: what was not synced is there in part, or not at all; of what is there a sector may hold zeros.
    pub(crate) fn cut_power(&self) {
        let mut state = self.state();
        let (synced, length) = (state.synced, state.journal.len());
        if synced == length {
            return;
        }
        let left = draw(|random| random.random_range(synced..=length));
        let lost = format!("{left} left, {synced} synced, {length} written");
        state.seen.note_of("unsynced writes were lost", lost);
        state.journal.truncate(left);
        let sectors = synced.div_ceil(SECTOR)..left.div_ceil(SECTOR);
        if !sectors.is_empty() && draw(|random| random.random_bool(0.3)) {
            let from = draw(|random| random.random_range(sectors)) * SECTOR;
            let to = (from + SECTOR).min(left);
            state.journal[from..to].fill(0);
            state.seen.note("a sector was not written");
        }
    }

    /// The journal, for the log of that process.
    pub(crate) fn open(
        &self,
        process: Process,
        each: &mut dyn FnMut(Record),
    ) -> io::Result<SimulatedJournal> {
        let mut state = self.state();
        let end = journal::scan(&state.journal, each)
            .map_err(|(at, why)| io::Error::other(format!("damaged at {at}: {why}")))?
            .ok_or_else(|| io::Error::other("never used"))?;
        if end < state.journal.len() {
            state.journal.truncate(end);
            state.seen.note("a torn end was cut off");
        }
        state.synced = end;
        drop(state);
        let disk = self.clone();
        Ok(SimulatedJournal { disk, process })
    }

    pub(crate) fn seen(&self) -> Seen {
        self.state().seen.clone()
    }

    pub(crate) fn snapshots(&self) -> SimulatedSnapshots {
        SimulatedSnapshots(self.clone())
    }

    fn order(&self, process: Process, order: Order) {
        let mut state = self.state();
        state.orders.push_back(order);
        if !state.busy {
            state.busy = true;
            drop(state);
            let disk = self.clone();
            drop(spawn_on(process, async move { disk.write().await }));
        }
    }

    /// As the journal's thread does it: whatever came while the last batch was being synced goes out as one.
    async fn write(&self) {
        loop {
            let (mut batch, mut waiting) = (Encoded::default(), Vec::new());
            let rewritten = {
                let mut state = self.state();
                match state.orders.pop_front() {
                    None => {
                        state.busy = false;
                        return;
                    }
                    Some(Order::Rewrite(records)) => Some(records),
                    Some(Order::Append(records, done)) => {
                        batch.extend(&records);
                        waiting.extend(done);
                        while let Some(Order::Append(..)) = state.orders.front()
                            && let Some(Order::Append(records, done)) = state.orders.pop_front()
                        {
                            batch.extend(&records);
                            waiting.extend(done);
                        }
                        None
                    }
                }
            };
            if let Some(records) = rewritten {
                self.sync().await;
                let mut state = self.state();
                state.journal = journal::header().to_vec();
                let frame = records.frame(state.journal.len() as u64).unwrap();
                state.journal.extend(frame);
                state.synced = state.journal.len();
                state.seen.note("the journal was rewritten");
                continue;
            }
            {
                let mut state = self.state();
                let frame = batch.frame(state.synced as u64).unwrap();
                state.journal.extend(frame);
            }
            if waiting.is_empty() {
                continue;
            }
            self.sync().await;
            {
                let mut state = self.state();
                state.synced = state.journal.len();
            }
            for done in waiting {
                done(Ok(()));
            }
        }
    }

    async fn sync(&self) {
        let usual = self.state().sync;
        let took = draw(|random| random.random_range(usual..=usual * 2));
        if usual > USUAL_SYNC {
            self.state().seen.note("a sync was slow");
        }
        executor::sleep(Duration::from_micros(took)).await;
    }
}

/// The journal in place of a file.
pub(crate) struct SimulatedJournal {
    disk: Disk,
    process: Process,
}

impl std::fmt::Debug for SimulatedJournal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimulatedJournal").finish_non_exhaustive()
    }
}

impl Records for SimulatedJournal {
    fn append(&self, records: Encoded, done: Option<Done>) -> io::Result<()> {
        self.disk.order(self.process, Order::Append(records, done));
        Ok(())
    }

    fn rewrite(&self, records: Encoded) -> io::Result<()> {
        self.disk.order(self.process, Order::Rewrite(records));
        Ok(())
    }

    fn length(&self) -> u64 {
        self.disk.state().journal.len() as u64 * EXAGGERATED
    }
}

/// The snapshot in place of a file.
#[derive(Clone)]
pub(crate) struct SimulatedSnapshots(Disk);

impl Snapshots for SimulatedSnapshots {
    async fn load(&self) -> io::Result<Option<Snapshot>> {
        let bytes = self.0.state().snapshot.clone();
        let Some(bytes) = bytes else { return Ok(None) };
        let (meta, data) = snapshot::decode::<SnapshotMeta>(&bytes).map_err(io::Error::other)?;
        let snapshot = data.to_vec();
        Ok(Some(Snapshot { meta, snapshot }))
    }

    async fn save(&self, meta: &SnapshotMeta, data: Vec<u8>) -> io::Result<()> {
        let bytes = snapshot::encode(meta, &data)?;
        self.0.sync().await;
        let mut state = self.0.state();
        state.snapshot = Some(bytes);
        state.seen.note("a snapshot was written");
        Ok(())
    }
}
