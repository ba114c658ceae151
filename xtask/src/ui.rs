//! What people see: headed steps with times on stderr, so that stdout stays for results.

use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Prints a heading for a step that begins.
pub(crate) fn step(text: &str) {
    let mut stderr = std::io::stderr();
    // A closed stderr is no reason to stop working.
    let _ = if stderr.is_terminal() {
        writeln!(stderr, "\u{1b}[1;34m==>\u{1b}[0m \u{1b}[1m{text}\u{1b}[0m")
    } else {
        writeln!(stderr, "==> {text}")
    };
}

/// Prints a line below the current heading.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "    {text}");
}

/// Prints an error and its causes, one a line.
pub(crate) fn error(error: &anyhow::Error) {
    let mut stderr = std::io::stderr();
    let _ = writeln!(stderr, "error: {error}");
    for cause in error.chain().skip(1) {
        let _ = writeln!(stderr, "  because: {cause}");
    }
}

/// Runs one step under a heading and says how long it took.
pub(crate) fn timed<T>(text: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    step(text);
    let begun = Instant::now();
    let outcome = work();
    let verdict = if outcome.is_ok() { "done" } else { "failed" };
    note(&format!("{verdict} in {:.1} s", begun.elapsed().as_secs_f64()));
    outcome
}

/// A size as people read it.
pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}
