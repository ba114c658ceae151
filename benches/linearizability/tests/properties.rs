//! The checker against histories of a true register, against such ones with a lie in them, and against the definition.

use flynn_linearizability::{Action, BUDGET, Operation, Verdict, Violation, check};
use proptest::prelude::*;

fn done(client: u32, action: Action<u32>, began: u64, ended: u64) -> Operation<u32> {
    Operation {
        client,
        action,
        began,
        ended: Some(ended),
    }
}

fn unknown(action: Action<u32>, began: u64) -> Operation<u32> {
    Operation {
        client: 9,
        action,
        began,
        ended: None,
    }
}

fn swap(from: Option<u32>, to: u32) -> Action<u32> {
    Action::Swap { from, to }
}

fn verdict(history: &[Operation<u32>]) -> Verdict<u32> {
    check(None, history, BUDGET)
}

#[track_caller]
fn accepted(history: &[Operation<u32>]) {
    assert_eq!(verdict(history), Verdict::Linearizable);
}

#[track_caller]
fn rejected(history: &[Operation<u32>], operation: usize, held: &[Option<u32>]) {
    let held = held.to_vec();
    assert_eq!(
        verdict(history),
        Verdict::Violation(Violation { operation, held })
    );
}

#[test]
fn what_one_register_can_do_is_accepted() {
    accepted(&[]);
    accepted(&[done(1, Action::Read(None), 0, 1)]);
    // A read beside a write sees either.
    for saw in [None, Some(1)] {
        accepted(&[done(1, Action::Write(1), 0, 10), done(2, Action::Read(saw), 2, 5)]);
    }
    // Of two swaps from one value, one is refused.
    accepted(&[
        done(1, swap(None, 1), 0, 10),
        done(2, Action::Refused { from: None }, 2, 5),
    ]);
    let register = check(Some(&7), &[done(1, Action::Read(Some(7)), 0, 1)], BUDGET);
    assert_eq!(register, Verdict::Linearizable);
}

#[test]
fn the_violations_that_have_names_are_rejected() {
    // A stale read.
    rejected(
        &[done(1, Action::Write(1), 0, 1), done(2, Action::Read(None), 2, 3)],
        1,
        &[Some(1)],
    );
    // A lost write.
    rejected(
        &[
            done(1, swap(None, 1), 0, 1),
            done(2, swap(Some(1), 2), 2, 3),
            done(1, Action::Read(Some(1)), 4, 5),
        ],
        2,
        &[Some(2)],
    );
    // Two swaps from one value.
    rejected(
        &[done(1, swap(None, 1), 0, 9), done(2, swap(None, 2), 0, 8)],
        0,
        &[Some(2)],
    );
    // A read that nobody wrote.
    rejected(&[done(1, Action::Read(Some(5)), 0, 1)], 0, &[None]);
    // A refusal for no reason.
    rejected(&[done(1, Action::Refused { from: None }, 0, 1)], 0, &[None]);
    // What was seen once is unseen again.
    rejected(
        &[
            done(1, Action::Write(1), 0, 100),
            done(2, Action::Read(Some(1)), 10, 20),
            done(3, Action::Read(None), 30, 40),
        ],
        2,
        &[Some(1)],
    );
    // A refused one that took effect all the same: it is left out of the history, and its value is seen.
    rejected(
        &[
            done(1, Action::Write(1), 0, 1),
            done(2, Action::Read(Some(2)), 2, 3),
        ],
        1,
        &[Some(1)],
    );
}

#[test]
fn the_unknown_happens_late_or_never() {
    let lost = unknown(swap(None, 1), 0);
    accepted(std::slice::from_ref(&lost));
    accepted(&[lost.clone(), done(2, Action::Read(None), 50, 60)]);
    accepted(&[lost.clone(), done(2, Action::Read(Some(1)), 50, 60)]);
    accepted(&[
        lost.clone(),
        done(2, Action::Read(None), 50, 60),
        done(2, Action::Read(Some(1)), 70, 80),
    ]);
    // But not before it began, nor twice, nor undone.
    rejected(
        &[done(2, Action::Read(Some(1)), 50, 60), unknown(swap(None, 1), 61)],
        0,
        &[None],
    );
    rejected(
        &[
            lost.clone(),
            done(2, Action::Read(Some(1)), 50, 60),
            done(2, Action::Read(None), 70, 80),
        ],
        2,
        &[Some(1)],
    );
    rejected(
        &[
            lost,
            done(2, Action::Read(Some(1)), 50, 60),
            done(2, Action::Write(2), 61, 62),
            done(2, Action::Read(Some(1)), 70, 80),
        ],
        3,
        &[Some(2)],
    );
    // A read that was not answered says nothing.
    accepted(&[unknown(Action::Read(Some(77)), 0)]);
}

#[test]
fn a_search_that_is_too_long_is_given_up() {
    // Twelve writes at once, and a read of what none of them wrote: there are some thousand sets of them.
    let mut history: Vec<_> = (1..=12)
        .map(|value| done(value, Action::Write(value), 0, 100))
        .collect();
    history.push(done(13, Action::Read(Some(99)), 0, 101));
    assert_eq!(check(None, &history, 1_000), Verdict::Undecided);
    assert!(matches!(check(None, &history, BUDGET), Verdict::Violation(_)));
}

/// What a client means to do, and how it goes.
#[derive(Clone, Debug)]
struct Plan {
    client: u32,
    /// 0 and 1 read, 2 writes, the rest swaps.
    kind: u8,
    /// For a swap: whether it takes the register's value, or that of long ago.
    up_to_date: bool,
    pause: u64,
    until_effect: u64,
    until_end: u64,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Answered,
    /// It takes effect so much later, and nobody hears of it.
    Late(u64),
    Lost,
}

fn plans(clients: u32, most: usize) -> impl Strategy<Value = Vec<Plan>> {
    let fate = prop_oneof![
        12 => Just(Fate::Answered),
        1 => (0..300_u64).prop_map(Fate::Late),
        1 => Just(Fate::Lost),
    ];
    let plan = (
        0..clients,
        0..6_u8,
        any::<bool>(),
        0..6_u64,
        0..9_u64,
        0..9_u64,
        fate,
    );
    let plan = plan.prop_map(
        |(client, kind, up_to_date, pause, until_effect, until_end, fate)| Plan {
            client,
            kind,
            up_to_date,
            pause,
            until_effect,
            until_end,
            fate,
        },
    );
    prop::collection::vec(plan, 1..most)
}

/// What clients of a true register see who go by `plans`; all values are different.
fn history(plans: &[Plan]) -> Vec<Operation<u32>> {
    let mut clocks = std::collections::BTreeMap::<u32, u64>::new();
    let mut effects = Vec::new();
    let mut spans = Vec::new();
    for (number, plan) in plans.iter().enumerate() {
        let clock = clocks.entry(plan.client).or_default();
        let began = *clock + plan.pause + 1;
        let effect = began + plan.until_effect;
        let ended = effect + plan.until_end;
        *clock = ended;
        spans.push((began, ended));
        match plan.fate {
            Fate::Answered => effects.push((effect, number)),
            Fate::Late(by) => effects.push((effect + by, number)),
            Fate::Lost => {}
        }
    }
    effects.sort_unstable();
    let (mut value, mut past) = (None, Vec::new());
    let mut actions: Vec<Option<Action<u32>>> = vec![None; plans.len()];
    for (_, number) in effects {
        let (plan, new) = (&plans[number], u32::try_from(number).expect("there are few") + 1);
        let action = match plan.kind {
            0 | 1 => Action::Read(value),
            2 => Action::Write(new),
            _ => {
                let from = if plan.up_to_date {
                    value
                } else {
                    past.get(past.len() / 2).copied().flatten()
                };
                if from == value {
                    swap(from, new)
                } else {
                    Action::Refused { from }
                }
            }
        };
        if matches!(action, Action::Write(_) | Action::Swap { .. }) {
            past.push(value);
            value = Some(new);
        }
        actions[number] = Some(action);
    }
    let operation = |(number, plan): (usize, &Plan)| {
        let (began, ended) = spans[number];
        // What was lost is a write that nobody ever sees.
        let action = actions[number].take().unwrap_or(Action::Write(1_000_000));
        Operation {
            client: plan.client,
            action,
            began,
            ended: (plan.fate == Fate::Answered).then_some(ended),
        }
    };
    plans.iter().enumerate().map(operation).collect()
}

/// The definition, literally: some order of all that have an end and some that have none.
fn by_definition(history: &[Operation<u32>]) -> bool {
    fn go(history: &[Operation<u32>], through: u32, value: Option<u32>) -> bool {
        let left = |at: usize| through & (1 << at) == 0;
        if (0..history.len()).all(|at| !left(at) || history[at].ended.is_none()) {
            return true;
        }
        (0..history.len()).filter(|at| left(*at)).any(|at| {
            let next = &history[at];
            let before = |other: usize| {
                left(other) && other != at && history[other].ended.is_some_and(|ended| ended < next.began)
            };
            if (0..history.len()).any(before) {
                return false;
            }
            let after = match next.action {
                Action::Read(saw) if saw == value => value,
                Action::Refused { from } if from != value => value,
                Action::Write(to) => Some(to),
                Action::Swap { from, to } if from == value => Some(to),
                _ => return false,
            };
            go(history, through | 1 << at, after)
        })
    }
    go(history, 0, None)
}

fn any_history() -> impl Strategy<Value = Vec<Operation<u32>>> {
    let value = || 1..3_u32;
    let action = prop_oneof![
        prop::option::of(value()).prop_map(Action::Read),
        value().prop_map(Action::Write),
        (prop::option::of(value()), value()).prop_map(|(from, to)| swap(from, to)),
        prop::option::of(value()).prop_map(|from| Action::Refused { from }),
    ];
    let operation = (action, 0..12_u64, prop::option::weighted(0.8, 0..6_u64));
    let operation = operation.prop_map(|(action, began, took)| Operation {
        client: 0,
        action,
        began,
        ended: took.map(|took| began + took),
    });
    prop::collection::vec(operation, 0..7)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn it_is_the_definition(history in any_history()) {
        let verdict = verdict(&history);
        prop_assert_ne!(&verdict, &Verdict::Undecided);
        prop_assert_eq!(verdict == Verdict::Linearizable, by_definition(&history));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// With as many configurations as there are operations and some: long histories are no harder than short ones.
    #[test]
    fn true_registers_are_believed(plans in plans(6, 600)) {
        let history = history(&plans);
        prop_assert_eq!(check(None, &history, 50 * (history.len() + 20)), Verdict::Linearizable);
    }

    #[test]
    fn a_read_of_what_nobody_wrote_is_found(plans in plans(6, 300), at in any::<prop::sample::Index>()) {
        let mut history = history(&plans);
        let reads: Vec<usize> = (0..history.len())
            .filter(|at| matches!(history[*at].action, Action::Read(_)) && history[*at].ended.is_some())
            .collect();
        prop_assume!(!reads.is_empty());
        history[*at.get(&reads)].action = Action::Read(Some(5_000_000));
        prop_assert!(matches!(verdict(&history), Verdict::Violation(_)));
    }

    /// A value of which all know that it was replaced is seen once more at the end.
    #[test]
    fn a_lost_write_is_found(plans in plans(6, 300), at in any::<prop::sample::Index>()) {
        let mut history = history(&plans);
        let swaps: Vec<Option<u32>> = history
            .iter()
            .filter(|operation| operation.ended.is_some())
            .filter_map(|operation| match operation.action {
                Action::Swap { from, .. } => Some(from),
                _ => None,
            })
            .collect();
        prop_assume!(!swaps.is_empty());
        history.push(done(0, Action::Read(*at.get(&swaps)), 1_000_000, 1_000_001));
        prop_assert!(matches!(verdict(&history), Verdict::Violation(_)));
    }
}
