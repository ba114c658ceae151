//! Standard output: tables for people, JSON for programs. A reader that goes away early is no error.

use std::io::{self, Write as _};

use flynn_api::Error;
use jiff::Timestamp;
use serde::Serialize;

use crate::failure::{Failure, Result, local};

/// Writes a line to standard output.
pub(crate) fn line(text: impl AsRef<str>) -> Result<()> {
    bytes(format!("{}\n", text.as_ref()).as_bytes())
}

/// Writes bytes to standard output.
pub(crate) fn bytes(bytes: &[u8]) -> Result<()> {
    let mut output = io::stdout().lock();
    output
        .write_all(bytes)
        .and_then(|()| output.flush())
        .map_err(|why| match why.kind() {
            io::ErrorKind::BrokenPipe => Failure::Pipe,
            _ => local("standard output cannot be written", &why),
        })
}

/// Writes JSON to standard output.
pub(crate) fn json(value: &(impl Serialize + ?Sized)) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|why| Error::internal(format!("JSON cannot be written: {why}")))?;
    line(text)
}

/// Writes a table to standard output: a row is a line, however narrow the terminal, so that ids can be copied and
/// lines can be counted.
pub(crate) fn table<const N: usize>(
    head: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Result<()> {
    bytes(columns(head, rows).as_bytes())
}

fn columns<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut lines = vec![head.map(str::to_owned)];
    // A line end in a cell would end the row.
    lines.extend(
        rows.into_iter()
            .map(|row| row.map(|cell| cell.replace(['\n', '\r', '\t'], " "))),
    );
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(widths) {
            row.push_str(cell);
            row.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// Tells of progress, on standard error.
pub(crate) fn note(text: impl AsRef<str>) {
    // When nobody listens there, nothing is lost.
    let _ = writeln!(io::stderr(), "{}", text.as_ref());
}

/// How long ago something was.
pub(crate) fn ago(time: Option<Timestamp>) -> String {
    time.map_or_else(
        || "-".into(),
        |time| age(Timestamp::now().as_second() - time.as_second()),
    )
}

fn age(seconds: i64) -> String {
    match seconds {
        ..=0 => "now".into(),
        1..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        let text = columns(
            ["ID", "NAME"],
            [row("long id", "a"), row("é", "two\nlines"), row("", "")],
        );
        assert_eq!(text, "ID       NAME\nlong id  a\né        two lines\n\n");
    }

    #[test]
    fn ages_are_short() {
        let ages = [-5, 1, 119, 120, 7199, 7200, 172_799, 172_800].map(age);
        assert_eq!(
            ages,
            [
                "now",
                "1 s ago",
                "119 s ago",
                "2 min ago",
                "119 min ago",
                "2 h ago",
                "47 h ago",
                "2 days ago"
            ]
        );
    }
}
