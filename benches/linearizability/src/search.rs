//! The search for an order.
//!
//! Operations that have an end are looked at in the order of their ends. A configuration is the first of them that is
//! not through yet (`front`), what is through although it ends later or never (`ahead`), and what the register holds.
//! Which operations may come next follows from `front` alone: those that began before it ended.
//!
//! What keeps the search short, and loses no order that matters:
//! - What only looks is taken as soon as it is possible.
//! - Values that nobody ever speaks of again are one value.
//! - Of unknown operations that do the same, the one that began first is taken first; none is taken that changes
//!   nothing, and none that is overwritten before anybody has seen it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;

use crate::{Action, Operation, Verdict, Violation};

/// A value by number: 0 is none.
type Value = u32;

/// What is done to the register.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    /// Nothing; it must hold this.
    Is(Value),
    /// Nothing; it must hold something else.
    IsNot(Value),
    /// It holds this from now on.
    Set(Value),
    /// It held the first, and holds the second from now on.
    Swap(Value, Value),
}

impl Step {
    /// Whether it leaves alone a register that holds `value`, and is possible there.
    fn only_looks(self, value: Value) -> bool {
        match self {
            Self::Is(wanted) => value == wanted,
            Self::IsNot(other) => value != other,
            Self::Set(_) | Self::Swap(..) => false,
        }
    }

    /// What a register that holds `value` holds after it, if it writes and is possible there.
    fn writes(self, value: Value) -> Option<Value> {
        match self {
            Self::Set(to) => Some(to),
            Self::Swap(from, to) => (value == from).then_some(to),
            Self::Is(_) | Self::IsNot(_) => None,
        }
    }
}

/// Operations are known by number: those with an end first, in the order of their ends, then the unknown, in the order
/// of their beginnings.
type Number = u32;

#[derive(Clone, PartialEq, Eq, Hash)]
struct Configuration {
    front: Number,
    /// Sorted.
    ahead: Vec<Number>,
    value: Value,
    /// The value is of an unknown operation, and nobody has seen it yet.
    unseen: bool,
}

pub(crate) struct Search<V> {
    values: Vec<Option<V>>,
    steps: Vec<Step>,
    /// By number: its place in the history.
    places: Vec<usize>,
    /// How many have an end.
    ended: Number,
    /// By front: which of those with an end may come next.
    open: Vec<Vec<Number>>,
    /// By front: how many of the unknown have begun.
    begun: Vec<Number>,
    initial: Value,
}

impl<V: Clone + Eq + Hash> Search<V> {
    pub(crate) fn new(initial: Option<&V>, history: &[Operation<V>]) -> Self {
        let mut names = Names::default();
        let initial = names.number(initial);
        for operation in history {
            names.learn(&operation.action);
        }
        let mut ended: Vec<(u64, usize)> = Vec::new();
        let mut unknown: Vec<(u64, usize)> = Vec::new();
        for (place, operation) in history.iter().enumerate() {
            match (operation.ended, &operation.action) {
                (Some(at), _) => ended.push((at, place)),
                // One that nobody saw the answer of says nothing, unless it may have written.
                (None, Action::Read(_) | Action::Refused { .. }) => {}
                (None, Action::Write(_) | Action::Swap { .. }) => unknown.push((operation.began, place)),
            }
        }
        ended.sort_unstable();
        unknown.sort_unstable();

        let places: Vec<usize> = ended.iter().chain(&unknown).map(|(_, place)| *place).collect();
        let steps = places
            .iter()
            .map(|place| names.step(&history[*place].action))
            .collect();
        let mut by_beginning: Vec<(u64, Number)> = (0..)
            .zip(&ended)
            .map(|(number, (_, place))| (history[*place].began, number))
            .collect();
        by_beginning.sort_unstable();

        let mut coming = by_beginning.into_iter().peekable();
        let mut present = BTreeSet::new();
        let (mut open, mut begun) = (Vec::with_capacity(ended.len()), Vec::with_capacity(ended.len()));
        for (front, (end, _)) in (0..).zip(&ended) {
            while let Some((_, number)) = coming.next_if(|(began, _)| began <= end) {
                present.insert(number);
            }
            open.push(present.iter().copied().collect());
            present.remove(&front);
            begun.push(count(unknown.partition_point(|(began, _)| began <= end)));
        }
        Self {
            values: names.values,
            steps,
            places,
            ended: count(ended.len()),
            open,
            begun,
            initial,
        }
    }

    pub(crate) fn run(&self, budget: usize) -> Verdict<V> {
        let first = self.settle(Configuration {
            front: 0,
            ahead: Vec::new(),
            value: self.initial,
            unseen: false,
        });
        let mut deepest = (first.front, BTreeSet::from([first.value]));
        let mut seen = HashSet::from([first.clone()]);
        let mut rest = vec![first];
        while let Some(here) = rest.pop() {
            if here.front == self.ended {
                return Verdict::Linearizable;
            }
            if here.front > deepest.0 {
                deepest = (here.front, BTreeSet::new());
            }
            if here.front == deepest.0 {
                deepest.1.insert(here.value);
            }
            for next in self.next(&here) {
                if seen.len() >= budget {
                    return Verdict::Undecided;
                }
                if seen.insert(next.clone()) {
                    rest.push(next);
                }
            }
        }
        Verdict::Violation(Violation {
            operation: self.places[deepest.0 as usize],
            held: deepest.1.iter().map(|value| self.value(*value)).collect(),
        })
    }

    /// Where one more write leads. The last is looked at first: what ends soon before what ends late, and the unknown when
    /// nothing else helps.
    fn next(&self, here: &Configuration) -> Vec<Configuration> {
        let front = here.front as usize;
        let mut tried = HashSet::new();
        let mut all = Vec::new();
        let unknown = self.ended..self.ended + self.begun[front];
        for number in unknown.chain(self.open[front].iter().rev().copied()) {
            let step = self.steps[number as usize];
            let (Some(value), Err(at)) = (step.writes(here.value), here.ahead.binary_search(&number)) else {
                continue;
            };
            let unknown = number >= self.ended;
            let blind = matches!(step, Step::Set(_));
            if (here.unseen && blind) || (unknown && (value == here.value || !tried.insert(step))) {
                continue;
            }
            let mut next = here.clone();
            next.ahead.insert(at, number);
            next.value = value;
            next.unseen = unknown;
            all.push(self.settle(next));
        }
        all
    }

    /// Takes everything that only looks as soon as it can be: if there is an order in which it comes later, there is one
    /// in which it comes now.
    fn settle(&self, mut here: Configuration) -> Configuration {
        while here.front < self.ended {
            if let Ok(at) = here.ahead.binary_search(&here.front) {
                here.ahead.remove(at);
                here.front += 1;
                continue;
            }
            let mut through = false;
            for number in &self.open[here.front as usize] {
                if self.steps[*number as usize].only_looks(here.value)
                    && let Err(at) = here.ahead.binary_search(number)
                {
                    here.ahead.insert(at, *number);
                    here.unseen = false;
                    through |= *number == here.front;
                }
            }
            if !through {
                break;
            }
        }
        here
    }

    fn value(&self, value: Value) -> Option<V> {
        self.values[value as usize].clone()
    }
}

/// Values by number.
struct Names<V> {
    values: Vec<Option<V>>,
    numbers: HashMap<V, Value>,
    /// The number of all that nobody speaks of again once they are written.
    unnamed: Option<Value>,
}

impl<V> Default for Names<V> {
    fn default() -> Self {
        Self {
            values: vec![None],
            numbers: HashMap::new(),
            unnamed: None,
        }
    }
}

impl<V: Clone + Eq + Hash> Names<V> {
    /// The number of a value that somebody speaks of.
    fn number(&mut self, value: Option<&V>) -> Value {
        let Some(value) = value else { return 0 };
        if let Some(known) = self.numbers.get(value) {
            return *known;
        }
        let number = self.add(value);
        self.numbers.insert(value.clone(), number);
        number
    }

    fn add(&mut self, value: &V) -> Value {
        self.values.push(Some(value.clone()));
        count(self.values.len() - 1)
    }

    /// Numbers what `action` says of the register as it finds it.
    fn learn(&mut self, action: &Action<V>) {
        match action {
            Action::Read(value) | Action::Refused { from: value } | Action::Swap { from: value, .. } => {
                self.number(value.as_ref());
            }
            Action::Write(_) => {}
        }
    }

    fn step(&mut self, action: &Action<V>) -> Step {
        match action {
            Action::Read(saw) => Step::Is(self.number(saw.as_ref())),
            Action::Refused { from } => Step::IsNot(self.number(from.as_ref())),
            Action::Write(to) => Step::Set(self.written(to)),
            Action::Swap { from, to } => Step::Swap(self.number(from.as_ref()), self.written(to)),
        }
    }

    fn written(&mut self, value: &V) -> Value {
        if let Some(known) = self.numbers.get(value) {
            return *known;
        }
        let unnamed = self.unnamed.unwrap_or_else(|| self.add(value));
        *self.unnamed.insert(unnamed)
    }
}

/// A number that stands for so many.
fn count(many: usize) -> u32 {
    u32::try_from(many).expect("a history of four thousand million operations is more than memory holds")
}
