//! The log store and the journal: openraft's own suite, torn ends, damage, shortening.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::sync::{Arc, mpsc};

use flynn_discovery::raft::journal::{Encoded, Journal, Record};
use flynn_discovery::raft::log::LogStore;
use flynn_discovery::raft::machine::Machine;
use flynn_discovery::raft::snapshot::SnapshotFile;
use flynn_discovery::raft::{LogId, TypeConfig, Vote, dir};
use flynn_discovery::view::View;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::vote::leader_id_adv::LeaderId;
use proptest::prelude::*;
use tempfile::TempDir;

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), openraft::StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let log = LogStore::open(dir.path()).unwrap();
        let machine = Machine::new(Arc::new(View::default()), SnapshotFile::new(dir.path()));
        Ok((dir, log, machine))
    }
}

#[tokio::test]
async fn openraft_suite() {
    Suite::test_all(Builder).await.unwrap();
}

fn vote(term: u64) -> Record {
    Record::Vote(Vote::new(term, 7))
}

fn committed(index: u64) -> Record {
    Record::Committed(Some(LogId::new(LeaderId { term: 1, node_id: 7 }, index)))
}

fn read(path: &Path) -> std::io::Result<Vec<Record>> {
    let mut records = Vec::new();
    Journal::open(path, |record| records.push(record))?;
    Ok(records)
}

fn append(journal: &Journal, record: &Record, sync: bool) {
    let mut encoded = Encoded::default();
    encoded.push(record).unwrap();
    let (sender, receiver) = mpsc::channel();
    let done: Option<Box<dyn FnOnce(std::io::Result<()>) + Send>> = if sync {
        Some(Box::new(move |result| sender.send(result).unwrap()))
    } else {
        None
    };
    journal.append(encoded, done).unwrap();
    if sync {
        receiver.recv().unwrap().unwrap();
    }
}

/// A journal of these records, each synced, and the length of the file after each.
fn journal(path: &Path, records: &[Record]) -> Vec<u64> {
    let journal = Journal::open(path, |_| ()).unwrap();
    let mut lengths = vec![journal.length()];
    for record in records {
        append(&journal, record, true);
        lengths.push(journal.length());
    }
    lengths
}

#[test]
fn what_was_written_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let records = [vote(1), committed(3), vote(2)];
    journal(&path, &records);
    assert_eq!(read(&path).unwrap(), records);
    // What is not synced is written all the same when the journal is closed in an orderly way.
    let journal = Journal::open(&path, |_| ()).unwrap();
    append(&journal, &committed(4), false);
    drop(journal);
    assert_eq!(
        read(&path).unwrap(),
        [vote(1), committed(3), vote(2), committed(4)]
    );
}

#[test]
fn a_torn_end_is_cut_off_wherever_it_is_torn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let lengths = journal(&path, &[vote(1), vote(2)]);
    let whole = std::fs::read(&path).unwrap();
    for length in 0..=whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let want = [vote(1), vote(2)].into_iter().zip(&lengths[1..]);
        let want: Vec<_> = want
            .filter(|(_, end)| **end <= length as u64)
            .map(|(record, _)| record)
            .collect();
        assert_eq!(read(&path).unwrap(), want, "cut to {length}");
        // It goes on from there.
        append(&Journal::open(&path, |_| ()).unwrap(), &vote(9), true);
        assert_eq!(read(&path).unwrap().last(), Some(&vote(9)), "cut to {length}");
    }
}

#[test]
fn a_torn_end_may_also_hold_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    journal(&path, &[vote(1)]);
    let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(&[0; 5000]).unwrap();
    assert_eq!(read(&path).unwrap(), [vote(1)]);
}

#[test]
fn a_sector_that_was_never_written_is_torn_and_one_that_changed_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    // One batch of many records: a frame of several sectors.
    let journal = Journal::open(&path, |_| ()).unwrap();
    append(&journal, &vote(1), true);
    let begin = usize::try_from(journal.length()).unwrap();
    let mut encoded = Encoded::default();
    for index in 0..100 {
        encoded.push(&committed(index)).unwrap();
    }
    let (sender, receiver) = mpsc::channel();
    let done = Box::new(move |result| sender.send(result).unwrap());
    journal.append(encoded, Some(done)).unwrap();
    receiver.recv().unwrap().unwrap();
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    assert!(whole.len() > begin + 2048);
    for sector in begin / 512..whole.len() / 512 {
        let (from, upto) = ((sector * 512).max(begin), sector * 512 + 512);
        let mut changed = whole.clone();
        changed[from..upto].fill(0);
        std::fs::write(&path, &changed).unwrap();
        assert_eq!(
            read(&path).unwrap(),
            [vote(1)],
            "sector {sector} was never written"
        );
        changed[from..upto].fill(b'x');
        std::fs::write(&path, &changed).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("damaged at byte {begin}")), "{error}");
    }
}

#[test]
fn damage_to_what_was_synced_is_named_and_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    journal(&path, &[vote(1), vote(2), vote(3)]);
    let whole = std::fs::read(&path).unwrap();
    // Every byte, those of the last frame included: nothing says of it that it was synced, but it was.
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            std::fs::write(&path, &damaged).unwrap();
            let error = read(&path).unwrap_err();
            assert!(error.to_string().contains("damaged at byte"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), damaged, "evidence is kept");
        }
    }
}

#[test]
fn a_rewritten_journal_holds_the_same_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let journal = Journal::open(&path, |_| ()).unwrap();
    for term in 0..100 {
        append(&journal, &vote(term), true);
    }
    let long = journal.length();
    let mut short = Encoded::default();
    short.push(&vote(99)).unwrap();
    journal.rewrite(short).unwrap();
    append(&journal, &vote(100), true);
    assert!(journal.length() < long);
    drop(journal);
    assert_eq!(read(&path).unwrap(), [vote(99), vote(100)]);
    assert!(!path.with_extension("new").exists());
}

#[test]
fn a_newer_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    journal(&path, &[vote(1)]);
    let mut file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.seek(SeekFrom::Start(8)).unwrap();
    file.write_all(&9_u32.to_le_bytes()).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("newer release"));
}

#[test]
fn a_damaged_snapshot_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = SnapshotFile::new(dir.path());
    assert!(file.read().unwrap().is_none());
    file.write(&openraft::SnapshotMeta::default(), b"{\"version\":1}")
        .unwrap();
    assert_eq!(file.read().unwrap().unwrap().snapshot, b"{\"version\":1}");
    let path = dir.path().join("snapshot");
    let mut whole = Vec::new();
    std::fs::File::open(&path)
        .unwrap()
        .read_to_end(&mut whole)
        .unwrap();
    for at in (0..whole.len()).filter(|at| *at != 8) {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            std::fs::write(&path, &damaged).unwrap();
            let error = file.read().unwrap_err().to_string();
            assert!(error.contains("damaged"), "byte {at}: {error}");
        }
        std::fs::write(&path, &whole[..at]).unwrap();
        assert!(file.read().is_err());
    }
}

#[test]
fn a_damaged_id_is_named() {
    let store = tempfile::tempdir().unwrap();
    let path = store.path().join("id");
    let id = dir::member_id(store.path()).unwrap();
    assert_eq!(dir::member_id(store.path()).unwrap(), id);
    let whole = std::fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let flipped = (0..8).map(|bit| {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            damaged
        });
        for damaged in flipped.chain([whole[..at].to_vec()]) {
            std::fs::write(&path, &damaged).unwrap();
            let error = dir::member_id(store.path()).unwrap_err().to_string();
            assert!(error.contains("damaged"), "{damaged:?}: {error}");
        }
    }
    std::fs::write(&path, "123\n").unwrap();
    assert_eq!(
        dir::member_id(store.path()).unwrap(),
        123,
        "of an earlier release"
    );
    std::fs::remove_file(&path).unwrap();
    journal(&store.path().join("journal"), &[vote(1)]);
    let error = dir::member_id(store.path()).unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
}

#[test]
fn a_journal_of_which_nothing_was_synced_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    std::fs::write(&path, [0; 12]).unwrap();
    assert_eq!(read(&path).unwrap(), []);
    journal(&path, &[vote(1)]);
    assert_eq!(read(&path).unwrap(), [vote(1)]);
}

proptest! {
    #[test]
    fn any_file_is_opened_or_refused(bytes: Vec<u8>, with_header: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut file = Vec::new();
        if with_header {
            file.extend_from_slice(b"flynnlog\x01\0\0\0FRAM");
        }
        file.extend_from_slice(&bytes);
        std::fs::write(&path, &file).unwrap();
        if let Ok(records) = read(&path) {
            prop_assert!(records.is_empty());
        }
    }
}
