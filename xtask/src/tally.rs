//! Counting what test runners say they have run.

use std::ops::AddAssign;

/// Who runs tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runner {
    /// cargo-nextest
    Nextest,
    /// libtest, or libtest-mimic, which writes as it does
    Libtest,
}

/// How many tests did what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Tally {
    /// What a line of a runner's output adds. Each runner's own summary counts: nextest repeats those of the tests that
    /// failed, for it runs each alone.
    pub(crate) fn of_line(runner: Runner, line: &str) -> Option<Self> {
        let line = plain(line);
        let line = line.trim();
        match runner {
            // `Summary [ 0.1s] 2 tests run: 1 passed (1 slow), 1 failed, 3 skipped`; what times out has failed.
            Runner::Nextest => {
                let (_, counts) = line.strip_prefix("Summary [")?.split_once("run: ")?;
                let failed =
                    count(counts, "failed") + count(counts, "timed out") + count(counts, "exec failed");
                Some(Self {
                    passed: count(counts, "passed"),
                    failed,
                    skipped: count(counts, "skipped"),
                })
            }
            // `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out`
            Runner::Libtest => {
                let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
                Some(Self {
                    passed: count(counts, "passed"),
                    failed: count(counts, "failed"),
                    skipped: count(counts, "ignored"),
                })
            }
        }
    }
}

/// The number before a word, in a list whose items are separated by commas or semicolons.
fn count(counts: &str, word: &str) -> u64 {
    counts
        .split([',', ';'])
        .filter_map(|item| item.trim().split_once(' '))
        .find(|(_, what)| {
            what.strip_prefix(word)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(" ("))
        })
        .and_then(|(number, _)| number.parse().ok())
        .unwrap_or(0)
}

/// A line without its colours.
fn plain(line: &str) -> String {
    let mut out = String::new();
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        if letter == '\u{1b}' {
            letters.by_ref().find(char::is_ascii_alphabetic);
        } else {
            out.push(letter);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_read() {
        let tally = |passed, failed, skipped| {
            Some(Tally {
                passed,
                failed,
                skipped,
            })
        };
        let nextest = [
            (
                "     Summary [   0.012s] 3 tests run: 3 passed, 0 skipped",
                tally(3, 0, 0),
            ),
            (
                "Summary [ 1.2s] 10/20 tests run: 7 passed (1 slow, 2 flaky), 2 failed, 1 timed out, 4 skipped",
                tally(7, 3, 4),
            ),
            (
                "\u{1b}[1mSummary\u{1b}[0m [ 1.2s] 1 test run: 1 passed, 0 skipped",
                tally(1, 0, 0),
            ),
            (
                "    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 7 filtered out",
                None,
            ),
            ("the Summary [ of it", None),
        ];
        let libtest = [
            (
                "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
                tally(3, 0, 1),
            ),
            (
                "test result: FAILED. 0 passed; 2 failed; 0 ignored; 0 measured; 5 filtered out",
                tally(0, 2, 0),
            ),
            ("running 3 tests", None),
        ];
        for (line, expected) in nextest {
            assert_eq!(Tally::of_line(Runner::Nextest, line), expected, "{line}");
        }
        for (line, expected) in libtest {
            assert_eq!(Tally::of_line(Runner::Libtest, line), expected, "{line}");
        }
    }
}
