//! What clients did and were told, and whether it can have been.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use flynn_linearizability::{Action, BUDGET, Operation, Verdict, check};

/// Each written value is another.
pub(crate) type Value = u64;

/// Operations that are shown of a history which cannot have been.
const SHOWN: usize = 40;

/// The histories of all registers.
pub(crate) struct History {
    began: Instant,
    registers: Vec<Mutex<Vec<Record>>>,
}

struct Record {
    client: u32,
    /// None for a read without an answer, and for what never took effect.
    action: Option<Action<Value>>,
    began: Duration,
    ended: Option<Duration>,
    /// The index that discoverd named for the value.
    index: Option<u64>,
}

/// An operation that is under way. When it is dropped, nobody knows what became of it.
pub(crate) struct Pending<'a> {
    history: &'a History,
    register: usize,
    at: usize,
}

impl History {
    pub(crate) fn new(registers: usize) -> Self {
        Self {
            began: Instant::now(),
            registers: (0..registers).map(|_| Mutex::default()).collect(),
        }
    }

    pub(crate) fn registers(&self) -> usize {
        self.registers.len()
    }

    /// Since the beginning.
    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Begins an operation; `action` is what it will have done if it takes effect unheard of.
    pub(crate) fn begin(&self, register: usize, client: u32, action: Option<Action<Value>>) -> Pending<'_> {
        let mut records = self.records(register);
        records.push(Record {
            client,
            action,
            began: self.now(),
            ended: None,
            index: None,
        });
        Pending {
            history: self,
            register,
            at: records.len() - 1,
        }
    }

    fn records(&self, register: usize) -> MutexGuard<'_, Vec<Record>> {
        self.registers[register]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations that were answered: reads and writes.
    pub(crate) fn answered(&self) -> (usize, usize) {
        let (mut reads, mut writes) = (0, 0);
        for register in 0..self.registers() {
            for record in self
                .records(register)
                .iter()
                .filter(|record| record.ended.is_some())
            {
                match record.action {
                    Some(Action::Read(_)) => reads += 1,
                    Some(Action::Swap { .. }) => writes += 1,
                    _ => {}
                }
            }
        }
        (reads, writes)
    }

    /// Writes of which nobody knows what became of them.
    pub(crate) fn unknown(&self) -> usize {
        let unknown = |record: &&Record| record.ended.is_none() && record.action.is_some();
        (0..self.registers())
            .map(|register| self.records(register).iter().filter(unknown).count())
            .sum()
    }

    /// What a register held, by the index that was named for it.
    pub(crate) fn values(&self, register: usize) -> BTreeMap<u64, Value> {
        let known = |record: &Record| match record.action {
            Some(Action::Read(Some(value)) | Action::Swap { to: value, .. }) => Some((record.index?, value)),
            _ => None,
        };
        self.records(register).iter().filter_map(known).collect()
    }

    /// Fails if there is something that cannot have been.
    pub(crate) fn judge(&self) -> Result<()> {
        for register in 0..self.registers() {
            judge(register, &self.records(register))?;
        }
        Ok(())
    }
}

impl Pending<'_> {
    /// It did this, and its answer names the index of the value.
    pub(crate) fn did(self, action: Action<Value>, index: Option<u64>) {
        let now = self.history.now();
        let mut records = self.history.records(self.register);
        let record = &mut records[self.at];
        record.action = Some(action);
        record.ended = Some(now);
        record.index = index;
    }

    /// It never takes effect: so it was said.
    pub(crate) fn did_nothing(self) {
        self.history.records(self.register)[self.at].action = None;
    }
}

fn judge(register: usize, records: &[Record]) -> Result<()> {
    let told: Vec<&Record> = records.iter().filter(|record| record.action.is_some()).collect();
    let operations: Vec<Operation<Value>> = told.iter().map(|record| operation(record)).collect();
    match check(None, &operations, BUDGET) {
        Verdict::Linearizable => {}
        Verdict::Undecided => bail!("the history of key-{register} is too hard to check"),
        Verdict::Violation(violation) => bail!(
            "the history of key-{register} is not linearizable: there is no place for the operation marked with >, \
             when it can have held {:?} at most\n{}",
            violation.held,
            around(&told, violation.operation)
        ),
    }
    indexes(register, &told)
}

fn operation(record: &Record) -> Operation<Value> {
    let micros = |at: Duration| u64::try_from(at.as_micros()).expect("a test does not take so long");
    Operation {
        client: record.client,
        action: record.action.clone().expect("there is one"),
        began: micros(record.began),
        ended: record.ended.map(micros),
    }
}

/// An index belongs to one value, and whoever comes later sees no earlier one.
fn indexes(register: usize, told: &[&Record]) -> Result<()> {
    let mut values = BTreeMap::new();
    let mut known: HashMap<Value, u64> = HashMap::new();
    let mut ends: Vec<(Duration, u64)> = Vec::new();
    for record in told {
        let (Some(index), Some(ended)) = (record.index, record.ended) else {
            continue;
        };
        let Some(Action::Read(Some(value)) | Action::Swap { to: value, .. }) = record.action else {
            continue;
        };
        let one =
            *values.entry(index).or_insert(value) == value && *known.entry(value).or_insert(index) == index;
        ensure!(
            one,
            "key-{register} has two values at index {index}, or one value has two indexes:\n{}",
            line(record)
        );
        ends.push((ended, index));
    }
    ends.sort_unstable();
    // By end: the highest index that anybody had been told by then.
    let mut highest = 0;
    for (_, index) in &mut ends {
        highest = highest.max(*index);
        *index = highest;
    }
    for record in told.iter().filter(|record| record.ended.is_some()) {
        let before = ends.partition_point(|(ended, _)| *ended < record.began);
        let (Some(index), Some((_, told))) = (record.index, ends[..before].last()) else {
            continue;
        };
        ensure!(
            index >= *told,
            "key-{register} was at index {told} before this operation began:\n{}",
            line(record)
        );
    }
    Ok(())
}

/// The operations next to one, in the order of their beginnings.
fn around(told: &[&Record], at: usize) -> String {
    let end = told[at].ended.unwrap_or(Duration::MAX);
    let mut order: Vec<usize> = (0..told.len())
        .filter(|other| told[*other].began <= end)
        .collect();
    order.sort_by_key(|other| told[*other].began);
    let mut text = String::new();
    for other in &order[order.len().saturating_sub(SHOWN)..] {
        let mark = if *other == at { '>' } else { ' ' };
        let _ = writeln!(text, "{mark} {}", line(told[*other]));
    }
    text
}

fn line(record: &Record) -> String {
    let ended = record.ended.map_or("unknown".to_owned(), |ended| {
        format!("{:.6}", ended.as_secs_f64())
    });
    format!(
        "{:>11.6} to {ended:>11}  client {:>3}  {:?} at {:?}",
        record.began.as_secs_f64(),
        record.client,
        record.action,
        record.index
    )
}
