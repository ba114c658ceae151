//! Watches a discoverd change its disk, and strikes at a chosen point: kills it, tears its write, cuts the power, has
//! the call fail, or holds it.
//!
//! A point is a system call on the data directory, named after what it does (`journal: sync vote`). The list of points
//! is therefore complete by itself: whatever writes there is seen, in whichever way it does so.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::disk::{Cut, Disk};
use super::trap::{Call, Listener};

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    /// The process is killed before the call is made, or when half of the write is done.
    Tear,
    /// The power is cut before the call.
    Cut(Cut),
    /// The call fails, when half of the write is done.
    Fail(i32),
    /// The call waits until [`Watch::release`].
    Hold,
}

/// Which point.
#[derive(Clone, Debug)]
pub(crate) enum Point {
    /// Any, the so-many-th from now.
    Any(usize),
    /// The so-many-th of this name from now.
    Named(String, usize),
}

/// What is to happen, one after the other.
pub(crate) type Plan = VecDeque<(Point, Strike)>;

/// One watched process.
#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    listener: Listener,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    plan: Plan,
    disk: Disk,
    seen: BTreeMap<String, usize>,
    struck: Vec<String>,
    held: Option<(Call, Kind)>,
    cut: Option<Cut>,
    /// What was written to a file since it was last synced.
    unsynced: HashMap<String, BTreeSet<String>>,
    /// The last change of names in a directory.
    renamed: HashMap<String, String>,
}

/// A call on the data directory.
struct Change {
    names: Vec<String>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Write { file: PathBuf, at: u64, bytes: Vec<u8> },
    Sync(PathBuf),
    Other,
}

impl Watch {
    /// Watches the process `pid`, which has called [`super::trap::install`], change `root`.
    pub(crate) fn new(pid: u32, root: &Path, plan: Plan) -> Self {
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            listener: Listener::of(pid).unwrap(),
            state: Mutex::new(State {
                plan,
                disk: Disk::new(root).unwrap(),
                seen: BTreeMap::new(),
                struck: Vec::new(),
                held: None,
                cut: None,
                unsynced: HashMap::new(),
                renamed: HashMap::new(),
            }),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.run(pid)
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// Strikes by this plan from now on.
    pub(crate) fn arm(&self, plan: Plan) {
        self.shared.state().plan = plan;
    }

    /// The points at which it has struck.
    pub(crate) fn struck(&self) -> Vec<String> {
        self.shared.state().struck.clone()
    }

    /// What is left of the plan.
    pub(crate) fn plan(&self) -> Plan {
        self.shared.state().plan.clone()
    }

    /// Whether a call is held.
    pub(crate) fn holds(&self) -> bool {
        self.shared.state().held.is_some()
    }

    /// Lets the held call be made.
    pub(crate) fn release(&self) {
        let mut state = self.shared.state();
        if let Some((call, kind)) = state.held.take() {
            state.note(&kind);
            self.shared.listener.go_on(&call);
        }
    }

    /// Has the power be cut as soon as the process is dead.
    pub(crate) fn cut(&self, how: Cut) {
        self.shared.state().cut = Some(how);
    }

    /// Once the process is dead: what has been seen how often; the power cut, if there is one, has happened.
    pub(crate) fn end(mut self, seed: u64) -> BTreeMap<String, usize> {
        self.release();
        self.thread.take().unwrap().join().unwrap();
        let mut state = self.shared.state();
        if let Some(how) = state.cut {
            let mut rng = StdRng::seed_from_u64(seed);
            state.disk.cut(how, &mut rng).unwrap();
        }
        std::mem::take(&mut state.seen)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn run(&self, pid: u32) {
        let listener = &self.listener;
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        while let Some(call) = listener.next() {
            let mut state = self.state();
            let Some(change) = self.change(&call, &mut state) else {
                listener.go_on(&call);
                continue;
            };
            for name in &change.names {
                *state.seen.entry(name.clone()).or_default() += 1;
            }
            let Some(strike) = state.strikes(&change) else {
                state.note(&change.kind);
                listener.go_on(&call);
                continue;
            };
            match strike {
                Strike::Hold => {
                    state.held = Some((call, change.kind));
                    continue;
                }
                Strike::Fail(errno) => {
                    change.do_half();
                    listener.fail(&call, errno);
                    continue;
                }
                Strike::Tear => change.do_half(),
                Strike::Cut(how) => state.cut = Some(how),
            }
            // What other threads ask for is not answered any more.
            rustix::process::pidfd_send_signal(&process, Signal::KILL).unwrap();
            return;
        }
    }

    /// What `call` is going to change below the root.
    fn change(&self, call: &Call, state: &mut State) -> Option<Change> {
        let descriptor = || format!("/proc/{}/fd/{}", call.thread, call.args[0]);
        let inside = |path: &Path| path.strip_prefix(&self.root).ok().map(name_of);
        let behind = || inside(&std::fs::read_link(descriptor()).ok()?);
        let named = |argument: usize| {
            let path = PathBuf::from(string(call.thread, call.args[argument])?);
            Some((inside(&path)?, path))
        };
        let one = |name: String| Change {
            names: vec![name],
            kind: Kind::Other,
        };
        match call.number {
            libc::SYS_write => {
                let file = behind()?;
                let at = position(call)?;
                let bytes = memory(call.thread, call.args[1], call.args[2])?;
                let kinds = kinds(&file, &bytes);
                let names = kinds.iter().map(|kind| format!("{file}: write{kind}")).collect();
                state.unsynced.entry(file).or_default().extend(kinds);
                let kind = Kind::Write {
                    file: descriptor().into(),
                    at,
                    bytes,
                };
                Some(Change { names, kind })
            }
            libc::SYS_fsync | libc::SYS_fdatasync => {
                let file = behind()?;
                let kind = Kind::Sync(descriptor().into());
                let names = if std::fs::metadata(descriptor()).ok()?.is_dir() {
                    let after = state.renamed.remove(&file);
                    vec![after.map_or_else(
                        || format!("{file}: sync"),
                        |change| format!("{file}: sync after {change}"),
                    )]
                } else {
                    match state.unsynced.remove(&file) {
                        None => vec![format!("{file}: sync at open")],
                        // Nobody waits for purges and commits, and a header goes along with what follows it.
                        Some(kinds) => {
                            let more = kinds.len() > 1;
                            let waits = |kind: &&String| match kind.as_str() {
                                " purge" | " committed" => false,
                                " header" => !more,
                                _ => true,
                            };
                            let kinds = kinds.iter().filter(waits);
                            kinds.map(|kind| format!("{file}: sync{kind}")).collect()
                        }
                    }
                };
                Some(Change { names, kind })
            }
            libc::SYS_ftruncate => Some(one(format!("{}: shorten", behind()?))),
            libc::SYS_openat => {
                let (file, path) = named(1)?;
                let empties = call.args[2] & (libc::O_TRUNC as u64) != 0;
                let there = path.exists();
                if there && !empties {
                    return None;
                }
                let name = format!("{file}: create");
                state.unsynced.entry(file).or_default();
                if !there {
                    state.renamed(&path, &name);
                }
                Some(one(name))
            }
            libc::SYS_mkdir => {
                let (file, path) = named(0)?;
                let name = format!("{file}: make");
                if path.exists() {
                    return None;
                }
                state.renamed(&path, &name);
                Some(one(name))
            }
            libc::SYS_rename => {
                let (file, path) = named(0)?;
                let name = format!("{file}: rename");
                state.unsynced.remove(&file);
                state.renamed(&path, &name);
                Some(one(name))
            }
            libc::SYS_unlink => {
                let (file, path) = named(0)?;
                if !path.exists() {
                    return None;
                }
                let name = format!("{file}: remove");
                state.renamed(&path, &name);
                Some(one(name))
            }
            libc::SYS_mmap => {
                let descriptor = format!("/proc/{}/fd/{}", call.thread, call.args[4]);
                let file = inside(&std::fs::read_link(descriptor).ok()?)?;
                Some(one(format!("{file}: shared mapping")))
            }
            // Of these nothing is known to be outside.
            number => {
                let outside = std::fs::read_link(descriptor()).is_ok_and(|path| inside(&path).is_none());
                let by_descriptor = [libc::SYS_writev, libc::SYS_pwritev2, libc::SYS_pwrite64];
                if by_descriptor.contains(&number) && outside {
                    return None;
                }
                Some(one(format!("system call {number}")))
            }
        }
    }
}

impl State {
    fn renamed(&mut self, path: &Path, name: &str) {
        let directory = path.parent().map(name_of).unwrap_or_default();
        self.renamed.insert(directory, name.to_owned());
    }

    /// The call is being made.
    fn note(&mut self, kind: &Kind) {
        if let Kind::Sync(path) = kind {
            // It fails if the process was killed meanwhile.
            let _ = self.disk.synced(path);
        }
    }

    /// Whether `change` is what the plan waits for.
    fn strikes(&mut self, change: &Change) -> Option<Strike> {
        let (point, strike) = self.plan.front_mut()?;
        let strike = *strike;
        let left = match point {
            Point::Any(left) => left,
            Point::Named(name, left) if change.names.contains(name) => left,
            Point::Named(..) => return None,
        };
        *left -= 1;
        if *left > 0 {
            return None;
        }
        let named = match point {
            Point::Named(name, _) => name.clone(),
            Point::Any(_) => change.names.join(" and "),
        };
        self.struck.push(named);
        self.plan.pop_front();
        Some(strike)
    }
}

impl Change {
    /// Writes the first half.
    fn do_half(&self) {
        if let Kind::Write { file, at, bytes } = &self.kind {
            let file = OpenOptions::new().write(true).open(file).unwrap();
            file.write_all_at(&bytes[..bytes.len() / 2], *at).unwrap();
        }
    }
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "data".to_owned())
}

/// What the bytes that go to a file are.
fn kinds(file: &str, bytes: &[u8]) -> BTreeSet<String> {
    const FRAME: usize = 20;
    if bytes.starts_with(b"flynnlog") {
        return [" header".to_owned()].into();
    }
    if file != "journal" {
        return [String::new()].into();
    }
    let mut kinds = BTreeSet::new();
    let mut rest = bytes.get(FRAME..).unwrap_or_default();
    while let [kind, a, b, c, d, more @ ..] = rest {
        let kind = match kind {
            1 => " vote",
            2 => " entry",
            3 => " truncate",
            4 => " purge",
            5 => " committed",
            _ => " something",
        };
        kinds.insert(kind.to_owned());
        rest = more
            .get(u32::from_le_bytes([*a, *b, *c, *d]) as usize..)
            .unwrap_or_default();
    }
    kinds
}

fn memory(thread: u32, at: u64, length: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    memory.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

fn string(thread: u32, at: u64) -> Option<String> {
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = vec![0; 4096];
    // It may lie before the end of what is mapped.
    let to_page = 4096 - usize::try_from(at % 4096).unwrap();
    let mut length = memory.read_at(&mut bytes[..to_page], at).ok()?;
    if !bytes[..length].contains(&0) {
        length += memory.read_at(&mut bytes[length..], at + length as u64).ok()?;
    }
    let end = bytes[..length].iter().position(|byte| *byte == 0)?;
    String::from_utf8(bytes[..end].to_vec()).ok()
}

/// Where in the file the call writes.
fn position(call: &Call) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{}", call.thread, call.args[0])).ok()?;
    info.lines()
        .find_map(|line| line.strip_prefix("pos:")?.trim().parse().ok())
}
