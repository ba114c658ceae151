//! What carries the logs of all jobs to one sink.
//!
//! Each job in turn has some hundred kilobytes sent, so that one that logs much keeps no other waiting. It knows jobs by
//! their directories alone, and a job's log is held for it from when that is there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::connection::{Connection, Heard, Target};
use super::cursors::Cursors;
use super::form::{Dress, Form};
use super::status::Progress;
use super::watch::{Changes, Watch};
use super::window::{Job, UNREAD, Window};
use crate::logs::reader::{Reader, Span, records};
use crate::logs::record::{Id, Record};
use crate::logs::segment::{self, Position, Segment};

/// Between attempts to take up a job.
const AGAIN: Duration = Duration::from_secs(5);

/// Between looks at what the other side has.
const TICK: Duration = Duration::from_millis(250);

/// Between writes of how far it has read.
const SAVE: Duration = Duration::from_secs(1);

/// What comes within this time is sent together.
const GATHER: Duration = Duration::from_millis(5);

/// Between attempts to connect, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Finds where the sink is.
pub(super) type Locate =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = io::Result<Target>> + Send>> + Send + Sync>;

/// What a shipper is made of.
pub(super) struct Parts {
    /// The sink's id.
    pub(super) sink: String,
    /// Where it is.
    pub(super) locate: Locate,
    /// How it wants records.
    pub(super) form: Form,
    /// Whether it says what it has.
    pub(super) acknowledges: bool,
    /// The directory of all jobs.
    pub(super) jobs: PathBuf,
    /// How far it has read.
    pub(super) cursors: Cursors,
    /// Where others see how it does.
    pub(super) progress: Arc<Progress>,
}

struct Shipper {
    parts: Parts,
    watch: Watch,
    jobs: BTreeMap<Job, Log>,
    /// Where those were that are not taken up yet.
    stored: BTreeMap<Job, Position>,
    /// Since when some could not be.
    missed: Option<Instant>,
    /// Those that may have something to be sent, the next one first.
    ready: VecDeque<Job>,
    window: Window,
    begun: Instant,
    saved: Instant,
    unsaved: bool,
    saving: Option<JoinHandle<io::Result<()>>>,
}

struct Log {
    dir: PathBuf,
    reader: Reader,
    ready: bool,
    /// How far the sink is known to have it.
    read: Option<Position>,
    held: Option<Segment>,
    /// The last record that was ever sent: what is lost before it has been told, or has arrived.
    last: Id,
    dress: Option<Dress>,
}

/// Why sending has come to an end.
enum End {
    Stopped,
    /// Orderly or not.
    Over(bool),
}

/// Ships until it is stopped.
pub(super) async fn run(parts: Parts, stop: CancellationToken) {
    let watch = loop {
        match Watch::new(&parts.jobs) {
            Ok(watch) => break watch,
            Err(error) => {
                let why = format!("cannot watch the jobs' logs: {error}");
                tracing::error!(sink = parts.sink, "{why}");
                parts.progress.disconnected(why);
            }
        }
        if stop.run_until_cancelled(sleep(BACKOFF.1)).await.is_none() {
            return;
        }
    };
    let (now, acknowledges) = (Instant::now(), parts.acknowledges);
    let stored = parts.cursors.read();
    let shipper = Shipper {
        parts,
        watch,
        jobs: BTreeMap::new(),
        stored,
        missed: None,
        ready: VecDeque::new(),
        window: Window::new(acknowledges),
        begun: now,
        saved: now,
        unsaved: false,
        saving: None,
    };
    shipper.run(&stop).await;
}

impl Shipper {
    async fn run(mut self, stop: &CancellationToken) {
        self.look();
        let mut pause = BACKOFF.0;
        loop {
            let Some(connected) = stop.run_until_cancelled(self.connect()).await else {
                break;
            };
            let why = match connected {
                Ok(connection) => {
                    tracing::info!(sink = self.parts.sink, "connected");
                    self.parts.progress.connected();
                    let since = Instant::now();
                    let end = self.carry(connection, stop).await;
                    // One that breaks at once is not hammered.
                    if since.elapsed() > BACKOFF.1 {
                        pause = BACKOFF.0;
                    }
                    let End::Over(orderly) = end else { break };
                    self.rewind(orderly);
                    let why = if orderly {
                        "it has closed the connection"
                    } else {
                        "the connection broke"
                    };
                    why.to_owned()
                }
                Err(error) => error.to_string(),
            };
            tracing::warn!(sink = self.parts.sink, why, "not connected");
            self.parts.progress.disconnected(why);
            let wait = self.attend(sleep(pause));
            if stop.run_until_cancelled(wait).await.is_none() {
                break;
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
        if let Some(saving) = self.saving.take() {
            let _ = saving.await;
        }
        if self.unsaved
            && let Err(error) = self.parts.cursors.write(self.read())
        {
            tracing::warn!(sink = self.parts.sink, %error, "cannot write how far it has read");
        }
    }

    async fn connect(&mut self) -> io::Result<Connection> {
        let target = (self.parts.locate)();
        let connecting = async { Connection::open(&target.await?).await };
        self.attend(connecting).await
    }

    /// Looks after jobs that come while something is awaited.
    async fn attend<T>(&mut self, awaited: impl Future<Output = T>) -> T {
        let mut awaited = pin!(awaited);
        loop {
            tokio::select! {
                biased;
                done = &mut awaited => return done,
                changes = self.watch.changes() => self.notice(changes),
            }
        }
    }

    fn notice(&mut self, changes: io::Result<Changes>) {
        let changes = changes.unwrap_or_else(|error| {
            tracing::warn!(sink = self.parts.sink, %error, "cannot watch the jobs' logs");
            Changes::default()
        });
        for id in &changes.logs {
            self.make_ready(id);
        }
        if changes.jobs || changes.lost {
            self.look();
        }
        if changes.lost {
            self.make_all_ready();
        }
    }

    /// Takes up jobs that have come, and drops those that are gone. Jobs go on from where it is stored that they were.
    fn look(&mut self) {
        let ids: BTreeSet<Job> = match self.watch.ids() {
            Ok(ids) => ids.into_iter().collect(),
            Err(error) => return tracing::warn!(sink = self.parts.sink, %error, "cannot list the jobs"),
        };
        let before = self.jobs.len();
        self.jobs.retain(|id, _| ids.contains(id));
        self.unsaved |= self.jobs.len() < before;
        self.parts.progress.retain(|id| ids.contains(id));
        self.stored.retain(|id, _| ids.contains(id));
        let is_known = self.missed.take().is_some();
        for id in ids {
            if !self.jobs.contains_key(&id) {
                let position = self.stored.get(&id).copied();
                match self.take_up(&id, position) {
                    // It has just gone.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => {
                        self.missed = Some(Instant::now());
                        if !is_known {
                            tracing::warn!(sink = self.parts.sink, job = &*id, %error, "cannot watch its log; trying on");
                        }
                    }
                    Ok(()) => drop(self.stored.remove(&id)),
                }
                self.make_ready(&id);
            }
        }
    }

    fn take_up(&mut self, id: &Job, stored: Option<Position>) -> io::Result<()> {
        let dir = self.parts.jobs.join(&**id).join("log");
        // Not its parents: the job may just go.
        match std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.watch.add(id, &dir)?;
        // What was removed before its time is not its loss.
        let oldest = || segment::list(&dir).ok()?.first().copied().map(Position::start);
        let position = stored.or_else(|| Some(oldest().unwrap_or_default()));
        self.unsaved = true;
        let mut log = Log {
            reader: Reader::new(&dir, position),
            dir,
            ready: false,
            read: position,
            held: None,
            last: position.map_or_else(Id::default, before),
            dress: None,
        };
        log.hold(&self.parts.sink);
        self.parts.progress.moved(id, position, position);
        self.jobs.insert(Job::clone(id), log);
        Ok(())
    }

    fn make_ready(&mut self, id: &Job) {
        if let Some(log) = self.jobs.get_mut(id)
            && !std::mem::replace(&mut log.ready, true)
        {
            self.ready.push_back(Job::clone(id));
        }
    }

    fn make_all_ready(&mut self) {
        let ids: Vec<Job> = self.jobs.keys().cloned().collect();
        for id in &ids {
            self.make_ready(id);
        }
    }

    /// Sends on one connection until that is over.
    async fn carry(&mut self, mut connection: Connection, stop: &CancellationToken) -> End {
        self.make_all_ready();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut bytes, mut dressed) = (Vec::new(), Vec::new());
        loop {
            let full = self.parts.acknowledges && self.window.unread(connection.sent()) > UNREAD;
            let next = if full { None } else { self.ready.pop_front() };
            if let Some(id) = next {
                let sending = self.send(&id, &mut connection, &mut bytes, &mut dressed);
                match stop.run_until_cancelled(sending).await {
                    None => return End::Stopped,
                    Some(Err(orderly)) => return End::Over(orderly),
                    Some(Ok(())) => {}
                }
                // Between two jobs only what is there already is looked at.
                tokio::select! {
                    biased;
                    _ = tick.tick() => self.tick(&connection),
                    // Others have their turn as well, however much this one has to say.
                    changes = self.watch.changes() => self.notice(changes),
                    () = std::future::ready(()) => {}
                }
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => return End::Stopped,
                heard = connection.hear() => match heard {
                    Heard::Has(job, id) => self.acknowledged(&job, id),
                    Heard::Over(orderly) => return End::Over(orderly),
                },
                changes = self.watch.changes() => {
                    self.notice(changes);
                    sleep(GATHER).await;
                }
                _ = tick.tick() => self.tick(&connection),
            }
        }
    }

    /// Sends what a job has logged, up to a bound. An error says whether the end was orderly.
    async fn send(
        &mut self,
        id: &Job,
        connection: &mut Connection,
        bytes: &mut Vec<u8>,
        dressed: &mut Vec<u8>,
    ) -> Result<(), bool> {
        let Some(log) = self.jobs.get_mut(id) else {
            return Ok(());
        };
        log.ready = false;
        let span = match log.reader.read(bytes) {
            Ok(span) => span,
            Err(error) => {
                tracing::warn!(job = &**id, %error, "cannot read its log");
                return Ok(());
            }
        };
        if bytes.is_empty() {
            return Ok(());
        }
        let lost = log.lost(&span, bytes);
        let plain = self.parts.form.is_plain() && lost == 0;
        if !plain {
            log.write(&self.parts, id, lost, bytes, dressed);
        }
        let sent: &[u8] = if plain { bytes } else { dressed };
        let window = &mut self.window;
        let mut read = Vec::new();
        let result = connection
            .send(sent, |job, id| {
                if let Some(position) = window.acknowledged(&job, id) {
                    read.push((Job::from(job), position));
                }
            })
            .await;
        if let Err(orderly) = result {
            // Of this the window does not know.
            log.reader.seek(span.from);
            self.known(read);
            return Err(orderly);
        }
        let progress = &self.parts.progress;
        progress.lost(lost);
        progress.sent(sent.len(), span.records);
        if let Some(to) = span.to {
            log.last = log.last.max(before(to));
            progress.moved(id, span.to, log.read);
            self.window
                .sent(self.begun.elapsed(), id, span.from, to, connection.sent());
        }
        self.known(read);
        // There may be more.
        self.make_ready(id);
        Ok(())
    }

    fn acknowledged(&mut self, job: &str, id: Id) {
        if let Some(position) = self.window.acknowledged(job, id) {
            self.known([(Job::from(job), position)]);
        }
    }

    /// Looks at what the other side has, and keeps it.
    fn tick(&mut self, connection: &Connection) {
        if !self.parts.acknowledges
            && !self.window.is_empty()
            && let Some(taken) = connection.taken()
        {
            let read = self.window.taken(self.begun.elapsed(), taken);
            self.known(read);
        }
        if self.missed.is_some_and(|missed| missed.elapsed() >= AGAIN) {
            self.look();
        }
        let busy = self.saving.as_ref().is_some_and(|saving| !saving.is_finished());
        if self.unsaved && !busy && self.saved.elapsed() >= SAVE {
            let (cursors, read) = (self.parts.cursors.clone(), self.read());
            let sink = self.parts.sink.clone();
            // It waits for the disk.
            self.saving = Some(tokio::task::spawn_blocking(move || {
                let written = cursors.write(read);
                written.inspect_err(|error| tracing::warn!(sink, %error, "cannot write how far it has read"))
            }));
            self.unsaved = false;
            self.saved = Instant::now();
        }
    }

    /// Notes how far the sink is known to have logs.
    fn known(&mut self, read: impl IntoIterator<Item = (Job, Position)>) {
        for (id, position) in read {
            if let Some(log) = self.jobs.get_mut(&id) {
                log.read = Some(position);
                log.hold(&self.parts.sink);
                self.parts.progress.moved(&id, log.reader.position(), log.read);
                self.unsaved = true;
            }
        }
    }

    fn read(&self) -> BTreeMap<Job, Position> {
        let read = |(id, log): (&Job, &Log)| Some((Job::clone(id), log.read?));
        let taken_up = self.jobs.iter().filter_map(read);
        let others = self
            .stored
            .iter()
            .map(|(id, position)| (Job::clone(id), *position));
        others.chain(taken_up).collect()
    }

    /// What was sent and may be lost is to be sent again.
    fn rewind(&mut self, orderly: bool) {
        for (id, position) in self.window.over(orderly) {
            if let Some(log) = self.jobs.get_mut(&id) {
                log.reader.seek(position);
                self.parts.progress.moved(&id, position, log.read);
            }
        }
    }
}

impl Log {
    /// Has the log kept from where the sink is known to have it.
    fn hold(&mut self, sink: &str) {
        let segment = self
            .read
            .map_or_else(Segment::default, |position| position.segment);
        if self.held != Some(segment) {
            match segment::hold(&self.dir, sink, segment) {
                Ok(()) => self.held = Some(segment),
                Err(error) => tracing::debug!(dir = %self.dir.display(), %error, "cannot hold the log"),
            }
        }
    }

    /// How many records were removed that never were sent.
    fn lost(&self, span: &Span, bytes: &[u8]) -> u64 {
        let first = records(bytes).next().map(|(_, record)| record.id);
        match first {
            Some(first) if span.lost > 0 && first.run == self.last.run => {
                span.lost.min(first.seq.saturating_sub(self.last.seq + 1))
            }
            Some(first) if first <= self.last => 0,
            _ => span.lost,
        }
    }

    /// Gives records the form that the sink wants, behind a word on how many are lost.
    fn write(&mut self, parts: &Parts, id: &Job, lost: u64, bytes: &[u8], to: &mut Vec<u8>) {
        to.clear();
        let dress = self.dress.get_or_insert_with(|| {
            let job = crate::files::read_json(&parts.jobs.join(&**id).join("job.json"));
            parts.form.dress(&job.ok().flatten().unwrap_or_default())
        });
        if lost > 0
            && let Some((_, first)) = records(bytes).next()
        {
            let Id { run, seq } = first.id;
            let seq = seq.saturating_sub(1);
            let data = format!("[flynn run=\"{run}\" seq=\"{seq}\" dropped=\"{lost}\"]");
            let text = format!("{lost} lines of this job's log were dropped: they were not taken in time");
            let word = Record {
                priority: b"<12>1",
                kind: b"ID3",
                data: data.as_bytes(),
                text: text.as_bytes(),
                ..first
            };
            parts.form.write(dress, &word, to);
        }
        for (_, record) in records(bytes) {
            parts.form.write(dress, &record, to);
        }
    }
}

/// The record in front of a position.
fn before(position: Position) -> Id {
    Id {
        run: position.segment.0.run,
        seq: position.next.saturating_sub(1),
    }
}
