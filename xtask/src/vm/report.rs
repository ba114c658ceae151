//! What a machine says about its tests.
//!
//! Lines of its own begin with [`MARK`]: `booted RELEASE`, `begin RUN`, `end RUN STATUS`, `done`. Between the middle two
//! is what the test program wrote, with libtest's summary in it. A run is a program's name, or that of one of its tests
//! after it.

use crate::tally::{Runner, Tally};

/// How lines of the machine's own begin.
pub(super) const MARK: &str = "flynn-vm: ";

/// The counts of a whole report, or why it is none.
pub(super) fn read(text: &str, release: &str, runs: &[String]) -> Result<Tally, &'static str> {
    let mut lines = text.lines();
    let mut own = |expected: &str| lines.by_ref().any(|line| line == format!("{MARK}{expected}"));
    if !own(&format!("booted {release}")) {
        return Err("it did not boot, or another kernel did");
    }
    let mut total = Tally::default();
    let mut lines = text.lines().peekable();
    for test in runs {
        if !lines.any(|line| line == format!("{MARK}begin {test}")) {
            return Err("it did not run every test program");
        }
        let end = format!("{MARK}end {test} ");
        let mut summary = None;
        let status = loop {
            let Some(line) = lines.next() else {
                return Err("it stopped in the middle of a test program");
            };
            if let Some(status) = line.strip_prefix(&end) {
                break status;
            }
            if let Some(counts) = Tally::of_line(Runner::Libtest, line) {
                summary = Some(counts);
            }
        };
        let mut counts = summary.unwrap_or_default();
        let is_missing = test.contains(' ') && counts == Tally::default();
        // A program that crashed, or hung until its time was over, has failed whatever it said before.
        if counts.failed == 0 && (status != "0" || summary.is_none() || is_missing) {
            counts.failed = 1;
        }
        total += counts;
    }
    if lines.any(|line| line == format!("{MARK}done")) {
        Ok(total)
    } else {
        Err("it stopped before its end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "noise
flynn-vm: booted 6.1.0
flynn-vm: begin pins
running 3 tests
test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s
flynn-vm: end pins 0
flynn-vm: begin programs
test result: FAILED. 4 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s
flynn-vm: end programs 101
flynn-vm: done
";

    fn whole(text: &str) -> Result<Tally, &'static str> {
        read(text, "6.1.0", &names(&["pins", "programs"]))
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally {
            passed,
            failed,
            skipped,
        }
    }

    #[test]
    fn a_whole_report_is_counted() {
        assert_eq!(whole(WHOLE), Ok(tally(6, 1, 1)));
    }

    #[test]
    fn a_report_that_ends_early_is_none() {
        for cut in 0..WHOLE.len() - 1 {
            assert!(whole(&WHOLE[..cut]).is_err(), "{}", &WHOLE[..cut]);
        }
    }

    #[test]
    fn a_program_that_crashed_has_failed() {
        let crashed = WHOLE.replace("end pins 0", "end pins 139");
        assert_eq!(whole(&crashed), Ok(tally(6, 2, 1)));
        let silent = WHOLE.replace("test result: ok. 2", "2");
        assert_eq!(whole(&silent), Ok(tally(4, 2, 0)));
    }

    #[test]
    fn a_test_that_is_not_there_has_failed() {
        let one = |counts: &str| {
            format!(
                "flynn-vm: booted 6.1.0\nflynn-vm: begin pins one\ntest result: ok. {counts}; finished in 0.1s\n\
                 flynn-vm: end pins one 0\nflynn-vm: done\n"
            )
        };
        let read = |text: &str| read(text, "6.1.0", &names(&["pins one"]));
        let there = one("1 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out");
        assert_eq!(read(&there), Ok(tally(1, 0, 0)));
        let missing = one("0 passed; 0 failed; 0 ignored; 0 measured; 10 filtered out");
        assert_eq!(read(&missing), Ok(tally(0, 1, 0)));
    }

    #[test]
    fn another_kernel_or_another_set_of_tests_is_no_report() {
        assert!(read(WHOLE, "6.1.1", &names(&["pins", "programs"])).is_err());
        assert!(read(WHOLE, "6.1.0", &names(&["pins", "programs", "network"])).is_err());
    }
}
