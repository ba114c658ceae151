//! A recovery on disk: what snapshot and log add up to, whatever is torn off, and each step killed and done again.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::mpsc;

use flynn_api::discovery::{Instance, LeaderType, ServiceMeta};
use flynn_discovery::Options;
use flynn_discovery::command::Command;
use flynn_discovery::dns::Upstreams;
use flynn_discovery::raft::dir::stored_id;
use flynn_discovery::raft::journal::{Encoded, Journal, Record};
use flynn_discovery::raft::machine::encode_state;
use flynn_discovery::raft::snapshot::SnapshotFile;
use flynn_discovery::raft::{Entry, LogId, Member, SnapshotMeta, StoredMembership, Timing, Vote};
use flynn_discovery::recovery::{self, JUMP, Order, build};
use flynn_discovery::state::State;
use openraft::vote::leader_id_adv::LeaderId;
use openraft::{EntryPayload, Membership};
use proptest::prelude::*;
use serde_json::json;

const OLD: u64 = 7;

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: OLD }, index)
}

fn command(kind: u8, name: u8, index: u64) -> Command {
    let service = format!("s{}", name % 4);
    match kind % 5 {
        0 => Command::CreateService {
            service,
            leader_type: LeaderType::Oldest,
        },
        1 => Command::DeleteService { service },
        2 => Command::PutInstance {
            service,
            instance: Instance::new("http", format!("10.0.0.{name}:80"), flynn_api::Meta::new()).into(),
            member: name.into(),
        },
        3 => Command::AddToken {
            digest: format!("{name}"),
            now: index,
            expires: index + 100,
        },
        _ => Command::SetMeta {
            service,
            meta: ServiceMeta {
                data: json!(index),
                ..ServiceMeta::default()
            },
            request: index,
        },
    }
}

/// Entries from index 0 on, in terms that go up; now and then one that is no command.
fn entries(seeds: &[(u8, u8, bool)]) -> Vec<Entry> {
    let mut term = 1;
    let mut all = Vec::new();
    for (index, (kind, name, next_term)) in (0..).zip(seeds) {
        term += u64::from(*next_term);
        let payload = match kind % 7 {
            5 => EntryPayload::Blank,
            6 => EntryPayload::Membership(membership()),
            _ => EntryPayload::Normal(command(*kind, *name, index)),
        };
        all.push(Entry {
            log_id: log_id(term, index),
            payload,
        });
    }
    all
}

fn membership() -> Membership<u64, Member> {
    let member = |addr: &str| Member {
        addr: addr.into(),
        zone: "a".into(),
        ..Member::default()
    };
    let members = [(OLD, member("127.0.0.1:1")), (8, member("127.0.0.2:1"))];
    Membership::new(vec![[OLD, 8].into()], std::collections::BTreeMap::from(members)).unwrap()
}

/// What these entries add up to.
fn sum(entries: &[Entry]) -> State {
    let mut state = State::default();
    for entry in entries {
        if let EntryPayload::Normal(command) = &entry.payload {
            let _ = state.apply(entry.log_id.index, command);
        }
    }
    state
}

/// Writes a store: a snapshot of the first `in_snapshot` entries, if any, and a journal of those from `from` on. Gives
/// the length of the journal after each of those.
fn store(dir: &Path, entries: &[Entry], in_snapshot: usize, from: usize) -> Vec<u64> {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("id"), format!("{OLD}\n")).unwrap();
    if let Some(last) = entries[..in_snapshot].last() {
        let mut last_membership = StoredMembership::default();
        for entry in &entries[..in_snapshot] {
            if let EntryPayload::Membership(membership) = &entry.payload {
                last_membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
        }
        let meta = SnapshotMeta {
            last_log_id: Some(last.log_id),
            last_membership,
        };
        let state = encode_state(&sum(&entries[..in_snapshot])).unwrap();
        SnapshotFile::new(dir).write(&meta, &state).unwrap();
    }
    let journal = Journal::open(&dir.join("journal"), |_| ()).unwrap();
    let mut lengths = Vec::new();
    let mut append = |record: Record| {
        let mut encoded = Encoded::default();
        encoded.push(&record).unwrap();
        let (sender, synced) = mpsc::channel();
        let done = Box::new(move |result| sender.send(result).unwrap());
        journal.append(encoded, Some(done)).unwrap();
        synced.recv().unwrap().unwrap();
        lengths.push(journal.length());
    };
    append(Record::Vote(Vote::new(3, OLD)));
    if from > 0 {
        append(Record::Purge(entries[from - 1].log_id));
    }
    for entry in &entries[from..] {
        append(Record::Entry(entry.clone()));
    }
    lengths.split_off(lengths.len() - (entries.len() - from))
}

fn options(data: &Path) -> Options {
    Options {
        data: data.to_owned(),
        host_id: "h".into(),
        host_ip: Ipv4Addr::LOCALHOST,
        tls: data.join("tls"),
        init: true,
        join: Vec::new(),
        upstreams: Upstreams::default(),
        api_port: 1111,
        dns_port: 53,
        timing: Timing::default(),
    }
}

fn seeds() -> impl Strategy<Value = Vec<(u8, u8, bool)>> {
    proptest::collection::vec((any::<u8>(), any::<u8>(), proptest::bool::weighted(0.1)), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn snapshot_and_log_add_up(seeds in seeds(), snapshot: prop::sample::Index, from: prop::sample::Index) {
        let dir = tempfile::tempdir().unwrap();
        let entries = entries(&seeds);
        let in_snapshot = snapshot.index(entries.len() + 1);
        let from = from.index(in_snapshot + 1);
        store(dir.path(), &entries, in_snapshot, from);
        let built = build::read(dir.path()).unwrap();
        prop_assert_eq!(&built.state, &sum(&entries));
        prop_assert_eq!(built.last, entries.last().map(|last| last.log_id));
        prop_assert!(built.term >= 3);
        let last = entries.iter().rev().find_map(|entry| match &entry.payload {
            EntryPayload::Membership(_) => Some(entry.log_id),
            _ => None,
        });
        prop_assert_eq!(*built.membership.log_id(), last);
    }

    #[test]
    fn a_torn_journal_gives_what_was_whole(seeds in seeds(), cut: prop::sample::Index) {
        let dir = tempfile::tempdir().unwrap();
        let entries = entries(&seeds);
        let lengths = store(dir.path(), &entries, 0, 0);
        let path = dir.path().join("journal");
        let whole = std::fs::read(&path).unwrap();
        let cut = cut.index(whole.len() + 1);
        std::fs::write(&path, &whole[..cut]).unwrap();
        let left = lengths.iter().filter(|end| **end <= cut as u64).count();
        let built = build::read(dir.path()).unwrap();
        prop_assert_eq!(built.state, sum(&entries[..left]));
        prop_assert_eq!(built.last, entries[..left].last().map(|last| last.log_id));
    }
}

#[test]
fn a_hole_and_a_stale_end_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let all = entries(&[(0, 1, false); 10]);
    store(dir.path(), &all, 4, 4);
    let snapshot = SnapshotFile::new(dir.path()).read().unwrap();
    let hole = build::build(snapshot.clone(), all[5..].to_vec(), 3).unwrap_err();
    assert!(hole.to_string().contains("entry 4 is neither"), "{hole}");
    // A snapshot of term 2 came, and the killed member still has entries of term 1 beyond it.
    let mut newer = snapshot.unwrap();
    newer.meta.last_log_id = Some(log_id(2, 3));
    let built = build::build(Some(newer), all[3..].to_vec(), 3).unwrap();
    assert_eq!(built.last, Some(log_id(2, 3)));
    assert_eq!(built.state, sum(&all[..4]));
}

/// What a store holds, but for where Raft keeps it.
fn contents(store: &Path) -> (State, LogId, u64) {
    let built = build::read(store).unwrap();
    let id = stored_id(store).unwrap().unwrap();
    (built.state, built.last.unwrap(), id)
}

#[test]
fn each_step_may_be_killed_and_is_done_again() {
    let all = entries(&(0..40).map(|n| (n, n, n % 9 == 0)).collect::<Vec<_>>());
    let want = sum(&all).begun_anew();
    for order in [
        Order::Recover,
        Order::Restore,
        Order::Join {
            members: vec!["192.0.2.9:1111".into()],
        },
    ] {
        let mut steps = 0;
        for killed in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let options = options(dir.path());
            let raft = dir.path().join("raft");
            store(&raft, &all, 20, 10);
            if order == Order::Restore {
                let restoring = dir.path().join("restoring");
                std::fs::copy(raft.join("snapshot"), restoring).unwrap();
            }
            recovery::place(dir.path(), order.clone()).unwrap();
            let mut more = true;
            for _ in 0..killed {
                more = recovery::advance(&options).unwrap();
            }
            // Killed there; and with a new store that is half made.
            if !raft.exists() {
                assert!(dir.path().join("raft.new").exists());
            }
            std::fs::create_dir_all(dir.path().join("raft.making")).unwrap();
            std::fs::write(dir.path().join("raft.making/journal"), "half").unwrap();
            let begun = recovery::begin(options.clone()).unwrap();

            let id = stored_id(&raft).unwrap().unwrap();
            assert_ne!(id, OLD);
            match &order {
                Order::Recover | Order::Restore => {
                    let (state, last, _) = contents(&raft);
                    if order == Order::Recover {
                        assert_eq!(state, want, "killed after {killed}");
                    } else {
                        assert_eq!(state, sum(&all[..20]).begun_anew());
                    }
                    assert_eq!(last.index, 39 + JUMP, "once, killed after {killed}");
                    let members = build::read(&raft).unwrap().membership;
                    let (only, member) = members.membership().nodes().next().unwrap();
                    assert_eq!((*only, &*member.zone), (id, "a"));
                    assert_eq!(members.membership().nodes().count(), 1);
                    assert!(begun.init);
                }
                Order::Join { members } => {
                    assert!(!begun.init && begun.join == *members);
                    assert!(!raft.join("journal").exists());
                }
            }
            // The old one is kept, whole, and nothing else is left.
            let names = std::fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<String> = names
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            assert!(names.len() == 2 && names[1].starts_with("raft.old-"), "{names:?}");
            let (state, _, old) = contents(&dir.path().join(&names[1]));
            assert_eq!((state, old), (sum(&all), OLD));
            if !more {
                break;
            }
            steps = killed;
        }
        assert!(steps >= 4, "{steps} steps of {order:?}");
    }
}

#[test]
fn an_order_that_cannot_be_carried_out_is_put_aside() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let raft = dir.path().join("raft");
    let all = entries(&[(0, 1, false), (2, 1, false), (4, 1, false)]);
    store(&raft, &all, 0, 0);
    let journal = std::fs::read(raft.join("journal")).unwrap();
    let mut damaged = journal.clone();
    damaged[40] ^= 1;
    std::fs::write(raft.join("journal"), &damaged).unwrap();
    recovery::place(dir.path(), Order::Recover).unwrap();
    recovery::begin(options.clone()).unwrap();
    let why = recovery::refusal(dir.path()).unwrap();
    assert!(why.contains("damaged at byte"), "{why}");
    assert_eq!(
        std::fs::read(raft.join("journal")).unwrap(),
        damaged,
        "nothing was changed"
    );
    // A damaged store may still be left for another cluster.
    recovery::place(
        dir.path(),
        Order::Join {
            members: vec!["192.0.2.9:1111".into()],
        },
    )
    .unwrap();
    assert_eq!(recovery::begin(options.clone()).unwrap().join, ["192.0.2.9:1111"]);
    assert!(recovery::refusal(dir.path()).is_none());

    // Three old stores are kept.
    for _ in 0..5 {
        recovery::place(
            dir.path(),
            Order::Join {
                members: vec!["192.0.2.9:1111".into()],
            },
        )
        .unwrap();
        recovery::begin(options.clone()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let old = std::fs::read_dir(dir.path()).unwrap();
    let old = old.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_str().unwrap().starts_with("raft.old-")
    });
    assert_eq!(old.count(), 3);
}
