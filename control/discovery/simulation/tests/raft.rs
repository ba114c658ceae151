//! The simulation, 500 times, in two tests for two CPUs: a failing seed is printed, and `SEED=n` runs that one alone. More
//! with `FLYNN_TEST_LONG=1`.

use flynn_discovery_simulation::{Happened, run};

const SEEDS: u64 = 500;
const SEEDS_LONG: u64 = 10_000;

/// The seeds to run: `SEED` alone where it is one of these, or all of them. Of the even ones three members vote, of the odd
/// ones five.
fn seeds(remainder: u64) -> Vec<u64> {
    let long = std::env::var("FLYNN_TEST_LONG").is_ok_and(|long| long == "1");
    let seeds = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => (0..if long { SEEDS_LONG } else { SEEDS }).collect(),
    };
    seeds.into_iter().filter(|seed| seed % 2 == remainder).collect()
}

#[test]
fn the_log_of_three_holds_whatever_happens_and_the_cluster_comes_back() {
    hold(&seeds(0));
}

#[test]
fn the_log_of_five_holds_whatever_happens_and_the_cluster_comes_back() {
    hold(&seeds(1));
}

fn hold(seeds: &[u64]) {
    let many = seeds.len() > 1;
    let mut seen = Happened::new();
    for &seed in seeds {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok((happened, _)) => {
                for (what, times) in happened {
                    *seen.entry(what).or_default() += times;
                }
            }
            Err(panic) => {
                eprintln!("SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    eprintln!("{seen:#?}");
    // A fault that never happened proves nothing.
    for what in [
        "the network was parted",
        "a member was cut off",
        "a member was heard no more",
        "a member heard no more",
        "a message was cut off",
        "a message was lost",
        "a message was late",
        "a member was killed",
        "a host lost its power",
        "all hosts lost their power",
        "unsynced writes were lost",
        "a torn end was cut off",
        "a sector was not written",
        "a host was lost for good",
        "a member was stopped",
        "a sync was slow",
        "a clock ran wrong",
        "a clock leapt",
        "the lead was to be handed over",
        "an operator changed a vote",
        "other voters",
        "a leader was elected",
        "a snapshot was written",
        "a snapshot was sent",
        "a heartbeat was left out",
        "the journal was rewritten",
        "a write was acknowledged",
        "a write's outcome is not known",
        "an unknown write was done",
        "an unknown write was not done",
        "a write was taken by nobody",
        "a read was answered",
        "a read relied on the lease",
        "converged",
    ] {
        assert!(
            !many || seen.get(what).is_some_and(|times| *times > 5),
            "{what}: {seen:?}"
        );
    }
}

#[test]
fn a_seed_is_one_run() {
    for seed in 0..6 {
        assert_eq!(run(seed), run(seed), "SEED={seed}");
    }
    assert_ne!(run(0).1, run(6).1);
}
