//! Writers, readers and followers against one another.

use std::fs;
use std::path::Path;

use flynn_api::host::LogStream;
use jiff::Timestamp;
use proptest::prelude::*;

use super::record::Origin;
use super::segment::{self, Segment};
use super::*;

const SMALL: Bounds = Bounds {
    segment: 500,
    kept: 2000,
    held: 4000,
    slowest: 1 << 40,
};

fn writer(dir: &Path) -> Writer {
    let origin = Origin {
        job_id: "one-1".into(),
        ..Origin::default()
    };
    let mut writer = Writer::bounded(dir, &origin, SMALL);
    writer.at(Timestamp::UNIX_EPOCH);
    writer
}

fn say(writer: &mut Writer, text: &str) {
    writer.add(LogStream::Stdout, text.as_bytes(), false);
    writer.flush();
}

fn read(dir: &Path, last: Option<usize>) -> Vec<String> {
    texts(&mut Follower::open(dir, last).unwrap())
}

fn texts(follower: &mut Follower) -> Vec<String> {
    let lines = follower.read_all().unwrap().into_iter();
    lines.map(|line| line.msg).collect()
}

fn size(dir: &Path) -> u64 {
    let segments = segment::list(dir).unwrap();
    segments
        .iter()
        .map(|segment| fs::metadata(segment.path(dir)).unwrap().len())
        .sum()
}

#[tokio::test]
async fn the_last_lines_come_from_several_files() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    assert_eq!(read(dir.path(), Some(3)), [""; 0]);
    for number in 0..100 {
        say(&mut writer, &number.to_string());
    }
    let all = read(dir.path(), None);
    assert!(all.len() < 100 && all.last().unwrap() == "99", "{all:?}");
    assert!(size(dir.path()) <= SMALL.kept);
    for last in 0..all.len() + 2 {
        assert_eq!(
            read(dir.path(), Some(last)),
            all[all.len().saturating_sub(last)..]
        );
    }
}

#[tokio::test]
async fn a_follower_goes_on_over_files_and_writers() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = writer(dir.path());
    say(&mut first, "first");
    let mut follower = Follower::open(dir.path(), Some(0)).unwrap();
    let mut seen = texts(&mut follower);
    for number in 0..40 {
        if number % 15 == 7 {
            first = writer(dir.path());
        }
        say(&mut first, &number.to_string());
        seen.extend(texts(&mut follower));
    }
    assert_eq!(seen, (0..40).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_is_torn_or_broken_harms_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    for torn in [&b"120 <14>1 1970"[..], b"\0\0\0\0", b"7 <14>1 x", b"nonsense"] {
        say(&mut writer(dir.path()), "whole");
        let last = *segment::list(dir.path()).unwrap().last().unwrap();
        let mut bytes = fs::read(last.path(dir.path())).unwrap();
        bytes.extend(torn);
        fs::write(last.path(dir.path()), bytes).unwrap();
    }
    say(&mut writer(dir.path()), "after");
    assert_eq!(
        read(dir.path(), None),
        ["whole", "whole", "whole", "whole", "after"]
    );
}

#[tokio::test]
async fn pieces_are_put_together_by_stream() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    writer.add(LogStream::Stdout, b"one \xc3", true);
    writer.add(LogStream::Stderr, b"error", false);
    writer.add(LogStream::Stdout, b"\xa4 \xff", true);
    writer.flush();
    let mut follower = Follower::open(dir.path(), None).unwrap();
    assert_eq!(texts(&mut follower), ["error"]);
    writer.add(LogStream::Stdout, b"", false);
    writer.flush();
    assert_eq!(texts(&mut follower), ["one \u{e4} \u{fffd}"]);
}

#[test]
fn what_is_held_stays_up_to_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    say(&mut writer, "first");
    let first = segment::list(dir.path()).unwrap()[0];
    segment::hold(dir.path(), "one", first).unwrap();
    let mut sizes = Vec::new();
    for number in 0..100 {
        say(&mut writer, &number.to_string());
        sizes.push(size(dir.path()));
    }
    let most = sizes.into_iter().max().unwrap();
    assert!(most > SMALL.kept && most <= SMALL.held, "{most}");

    // A reader whose records are gone says how many.
    let mut records = Vec::new();
    let mut reader = Reader::new(dir.path(), Some(segment::Position::start(first)));
    let span = reader.read(&mut records).unwrap();
    let after = reader::records(&records).next().unwrap().1;
    assert_eq!(span.lost, after.id.seq - 1);
    assert!(span.lost > 0);

    segment::release(dir.path(), &|sink| sink != "one").unwrap();
    for number in 0..20 {
        say(&mut writer, &number.to_string());
    }
    assert!(size(dir.path()) <= SMALL.kept);
}

#[test]
fn a_reader_that_has_a_file_open_notices_what_goes_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    let (mut reader, mut records) = (Reader::new(dir.path(), None), Vec::new());
    for run in 0..2 {
        say(&mut writer, "first");
        let before = reader.read(&mut records).unwrap();
        assert_eq!((before.records, before.lost), (1, 0), "{run}");
        assert_eq!(reader.read(&mut records).unwrap().records, 0);
        for number in 0..100 {
            say(&mut writer, &number.to_string());
        }
        let (mut lost, mut seen) = (0, 0);
        loop {
            let span = reader.read(&mut records).unwrap();
            lost += span.lost;
            seen += span.records;
            if records.is_empty() {
                break;
            }
        }
        assert!(lost > 0 && lost + seen == 100, "{lost} and {seen} of 100");
    }
}

#[test]
fn who_writes_more_than_is_taken_is_slowed_down_and_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        slowest: 5_000,
        ..SMALL
    };
    let mut writer = Writer::bounded(dir.path(), &Origin::default(), bounds);
    writer.at(Timestamp::UNIX_EPOCH);
    let mut pauses = |held: Option<Segment>| {
        if let Some(held) = held {
            segment::hold(dir.path(), "one", held).unwrap();
        }
        let mut pauses = Vec::new();
        for _ in 0..60 {
            writer.add(LogStream::Stdout, b"text", false);
            pauses.push(writer.flush());
        }
        pauses
    };
    assert!(pauses(None).iter().all(std::time::Duration::is_zero));
    let oldest = segment::list(dir.path()).unwrap()[0];
    let held = pauses(Some(oldest));
    let longest = held.into_iter().max().unwrap();
    // Time has passed meanwhile: not the whole tenth of a second that a segment takes at least.
    assert!(
        !longest.is_zero() && longest.as_millis() <= 100 * 60,
        "{longest:?}"
    );
    // A sink that has taken all slows nobody down.
    let newest = Segment(super::record::Id {
        run: u64::MAX,
        seq: 1,
    });
    let free = pauses(Some(newest));
    assert!(free[10..].iter().all(std::time::Duration::is_zero));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is written, by however many writers, is read in order by a reader that begins anew now and then.
    #[test]
    fn readers_miss_nothing(
        steps in proptest::collection::vec((0_usize..120, any::<bool>(), any::<bool>(), any::<bool>()), 1..60),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut log = writer(dir.path());
        let (mut reader, mut records) = (Reader::new(dir.path(), None), Vec::new());
        let (mut written, mut seen) = (Vec::new(), Vec::new());
        for (number, (length, restart, look, again)) in steps.into_iter().enumerate() {
            if restart {
                log = writer(dir.path());
            }
            let text = format!("{number:03}{}", "x".repeat(length));
            log.add(LogStream::Stdout, text.as_bytes(), false);
            log.flush();
            written.push(text);
            // Held by looking often enough.
            if look || size(dir.path()) + 700 > SMALL.kept {
                if again {
                    reader = Reader::new(dir.path(), reader.position());
                }
                loop {
                    prop_assert_eq!(reader.read(&mut records).unwrap().lost, 0);
                    if records.is_empty() { break }
                    seen.extend(reader::records(&records).map(|(_, record)| String::from_utf8_lossy(record.text).into_owned()));
                }
            }
        }
        reader.read(&mut records).unwrap();
        while !records.is_empty() {
            seen.extend(reader::records(&records).map(|(_, record)| String::from_utf8_lossy(record.text).into_owned()));
            reader.read(&mut records).unwrap();
        }
        prop_assert_eq!(seen, written);
    }
}
