//! Logs on their way to sinks: against a receiver that breaks connections in every way, and against real servers.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what is wrong by panicking"
)]

mod faults;
mod host;
mod receiver;
mod servers;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// A test's name, what it lacks on this machine, and the test.
type Test = (&'static str, Option<String>, fn());

fn main() -> ExitCode {
    let tests: [Test; 9] = [
        (
            "aggregators_get_each_line_once",
            None,
            faults::aggregators_get_each_line_once,
        ),
        (
            "syslog_servers_get_each_line",
            None,
            faults::syslog_servers_get_each_line,
        ),
        (
            "what_a_dead_server_had_not_read_comes_again",
            None,
            faults::what_a_dead_server_had_not_read_comes_again,
        ),
        (
            "a_loud_job_holds_up_no_other",
            None,
            faults::a_loud_job_holds_up_no_other,
        ),
        (
            "who_comes_later_has_a_turn",
            None,
            faults::who_comes_later_has_a_turn,
        ),
        ("what_is_dropped_is_said", None, faults::what_is_dropped_is_said),
        (
            "sinks_are_kept_and_checked",
            None,
            faults::sinks_are_kept_and_checked,
        ),
        (
            "rsyslog_takes_logs",
            servers::lacks("rsyslogd"),
            servers::rsyslog_takes_logs,
        ),
        (
            "syslog_ng_takes_logs_over_tls",
            servers::lacks("syslog-ng"),
            servers::syslog_ng_takes_logs_over_tls,
        ),
    ];
    let trial = |(name, lacks, test): Test| match lacks {
        None => Trial::test(name, move || {
            test();
            Ok(())
        }),
        Some(why) => Trial::test(name, || Ok(()))
            .with_kind(format!("skipped: {why}"))
            .with_ignored_flag(true),
    };
    libtest_mimic::run(&Arguments::from_args(), tests.into_iter().map(trial).collect()).exit_code()
}
