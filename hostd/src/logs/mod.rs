//! A job's log: JSON lines ([`LogLine`]) in `log/current`, and the file before it in `log/previous`.
//!
//! The supervisor writes, the daemon reads; they share nothing but the files. Both files together are bounded, and a
//! full disk costs lines, which are counted, but never blocks the job.

mod frame;
mod reader;
mod writer;

pub use frame::Framer;
pub use reader::Follower;
pub use writer::Writer;

/// The file that is written.
const CURRENT: &str = "current";

/// The file before it.
const PREVIOUS: &str = "previous";

/// Where a file ends and the next begins: a job's log takes twice this at most.
const MAX_FILE: u64 = 10 << 20;

#[cfg(test)]
mod tests {
    use flynn_api::host::{LogLine, LogStream};
    use jiff::Timestamp;

    use super::*;

    fn line(text: &str) -> LogLine {
        LogLine {
            timestamp: Timestamp::UNIX_EPOCH,
            stream: LogStream::Stdout,
            msg: text.into(),
            job_id: String::new(),
            process_type: String::new(),
        }
    }

    fn read(dir: &std::path::Path, last: Option<usize>) -> Vec<String> {
        let mut follower = Follower::open(dir, last).unwrap();
        follower
            .read()
            .unwrap()
            .into_iter()
            .map(|line| line.msg)
            .collect()
    }

    #[tokio::test]
    async fn the_last_lines_come_from_both_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), 300);
        for number in 0..20 {
            writer.append(&[line(&number.to_string())]);
        }
        let all = read(dir.path(), None);
        assert!(all.len() < 20 && all.last().unwrap() == "19", "{all:?}");
        assert_eq!(read(dir.path(), Some(3)), ["17", "18", "19"]);
        assert_eq!(read(dir.path(), Some(0)), [""; 0]);
        let size = |name| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size(CURRENT) <= 300 && size(PREVIOUS) <= 300);
    }

    #[tokio::test]
    async fn a_follower_goes_on_over_a_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), 300);
        writer.append(&[line("first")]);
        let mut follower = Follower::open(dir.path(), Some(0)).unwrap();
        assert!(follower.read().unwrap().is_empty());
        let mut seen = Vec::new();
        for number in 0..20 {
            writer.append(&[line(&number.to_string())]);
            seen.extend(follower.read().unwrap().into_iter().map(|line| line.msg));
        }
        assert_eq!(seen, (0..20).map(|number| number.to_string()).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_torn_line_is_skipped_and_written_after() {
        let dir = tempfile::tempdir().unwrap();
        Writer::open(dir.path(), 1000).append(&[line("whole")]);
        let path = dir.path().join(CURRENT);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(b"{\"timest");
        std::fs::write(&path, bytes).unwrap();
        Writer::open(dir.path(), 1000).append(&[line("after")]);
        assert_eq!(read(dir.path(), None), ["whole", "after"]);
    }
}
