//! Whether what clients saw of a register can have been: a linearizability checker.
//!
//! In: the history of one register (of one key; keys are checked one by one, for linearizability is local), as clients
//! recorded it: what each operation did and was told, when it began, when it ended. Out: a [`Verdict`].
//!
//! A history is linearizable when there is an order of its operations, each at one moment between its beginning and its
//! end, in which a register would have answered just so. An operation of which nobody knows what became of it (it timed
//! out, say) may take effect at any moment after its beginning, or never.
//!
//! The search is that of Wing and Gong, with the memory of Lowe: a depth-first search for that order, which never goes
//! on twice from the same configuration (operations that are through, and the register's value after them).
//!
//! Invariants:
//! - Pure: no clock, no I/O, no randomness; the same history gives the same verdict.
//! - Bounded: at most `budget` configurations are looked at, and a search that is given up says so.

mod search;

use std::hash::Hash;

/// Configurations that are enough for histories of some hundred thousand operations by a few dozen clients.
pub const BUDGET: usize = 4_000_000;

/// What an operation did, and what it was told.
///
/// `None` stands for what a register holds before the first write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<V> {
    /// A read, which saw this.
    Read(Option<V>),
    /// A write.
    Write(V),
    /// A compare-and-swap that was done: the register held `from`, and then `to`.
    Swap {
        /// What it held.
        from: Option<V>,
        /// What it was given.
        to: V,
    },
    /// A compare-and-swap that was refused, since the register did not hold this.
    Refused {
        /// What it was believed to hold.
        from: Option<V>,
    },
}

/// One operation of one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation<V> {
    /// Whose it was. The search does not need to know, but whoever reads a violation does.
    pub client: u32,
    /// What it did.
    pub action: Action<V>,
    /// When it began, by the one clock of the history.
    pub began: u64,
    /// When it was answered. `None` when nobody knows what became of it.
    pub ended: Option<u64>,
}

/// What there is to say about a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict<V> {
    /// There is such an order.
    Linearizable,
    /// There is none.
    Violation(Violation<V>),
    /// The search was given up after as many configurations as it was allowed.
    Undecided,
}

/// Where the search came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation<V> {
    /// The operation that cannot be explained, by its place in the history: all that ended before it can.
    pub operation: usize,
    /// What the register can have held when this one had to take effect. One value stands for all that were written and
    /// that nobody spoke of again.
    pub held: Vec<Option<V>>,
}

/// Checks the history of one register that held `initial` at first.
pub fn check<V: Clone + Eq + Hash>(
    initial: Option<&V>,
    history: &[Operation<V>],
    budget: usize,
) -> Verdict<V> {
    search::Search::new(initial, history).run(budget)
}
