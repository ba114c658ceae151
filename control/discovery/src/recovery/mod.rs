//! The operator's last resorts: a member goes on alone when the majority is lost for good, begins again from a snapshot,
//! or leaves its cluster for another.
//!
//! None of these is consensus, so none is done to a store that Raft has open. What is wanted is written down as an
//! [`Order`] in the data directory, discoverd ends, and whoever runs it starts it again; before Raft opens, a new store
//! is made beside the old one and takes its place. ([`make`] says what is in it.)
//!
//! ```text
//! order          what is to be done; the new store's Raft id
//! restoring      the snapshot that is to be restored
//! raft.making    the new store, as long as it is not whole
//! raft.new       the new store, whole and synced
//! raft           the store; while the names change there is none for a moment
//! raft.old-…     the stores before: the newest three are kept
//! refused        why the last order was not carried out
//! ```
//!
//! Invariants:
//! - What is to be done next follows from what is there ([`advance`]), so that each step may be killed and is done again.
//! - No store is deleted before three younger ones were put aside.
//! - The new store has a Raft id of its own: calls go to `/raft/{id}`, so that members of the old cluster, dead or alive,
//!   can neither vote for it, nor write to it, nor disturb it.
//! - Its log begins [`JUMP`] after the old one's end: Raft indexes, which are fencing tokens, do not go back, although
//!   others may have given out some that this member never saw.

pub mod build;
mod check;
mod make;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

pub use self::check::{follow, recover, recovery_plan, rejoin, restore, restore_plan, snapshot};
pub(crate) use self::make::{forget_last_known, former, last_known, to_join};
use crate::Options;
use crate::node;
use crate::raft::dir;
use crate::raft::journal::sync_directory;

/// How far a new log begins after the end of the old one: more entries than any member can have had that this one had
/// not.
pub const JUMP: u64 = 1_000_000;
/// Stores that are kept aside.
const KEPT: usize = 3;

/// Where Raft's store is, below the data directory.
const STORE: &str = "raft";
const NEW: &str = "raft.new";
const MAKING: &str = "raft.making";
const OLD: &str = "raft.old-";
const ORDER: &str = "order";
const REFUSED: &str = "refused";
const RESTORING: &str = "restoring";

/// What is to be done at the next start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Order {
    /// Go on alone with all that this member has.
    Recover,
    /// Go on alone with the snapshot in the file `restoring`.
    Restore,
    /// Join the cluster of these members (`address:1111`), with nothing.
    Join {
        /// Those.
        members: Vec<String>,
    },
}

/// An order as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ordered {
    version: u32,
    /// The new store's Raft id.
    id: u64,
    /// When it was given, in milliseconds since 1970.
    at: u64,
    #[serde(flatten)]
    order: Order,
}

const VERSION: u32 = 1;

/// Writes an order down. When this returns it is on disk.
pub fn place(data: &Path, order: Order) -> anyhow::Result<()> {
    let ordered = Ordered {
        version: VERSION,
        id: dir::new_id(),
        at: node::wall_clock(),
        order,
    };
    remove(&data.join(REFUSED))?;
    write(&data.join("order.new"), &serde_json::to_vec(&ordered)?)?;
    std::fs::rename(data.join("order.new"), data.join(ORDER))?;
    sync_directory(&data.join(ORDER))?;
    Ok(())
}

/// Why the last order was not carried out.
pub fn refusal(data: &Path) -> Option<String> {
    std::fs::read_to_string(data.join(REFUSED)).ok()
}

/// Carries out what was ordered, if something was, and gives the options as they are with it. To be called before Raft
/// opens.
pub fn begin(mut options: Options) -> anyhow::Result<Options> {
    while advance(&options)? {}
    if let Some(members) = to_join(&options.data.join(STORE)) {
        (options.init, options.join) = (false, members);
    }
    Ok(options)
}

/// The next step towards what was ordered; whether there may be another.
///
/// # Errors
/// The directory is in use, or cannot be changed. (An order that cannot be carried out is none: it is put aside.)
pub fn advance(options: &Options) -> anyhow::Result<bool> {
    let data = options.data.as_path();
    std::fs::create_dir_all(data)
        .with_context(|| format!("cannot make the data directory {}", data.display()))?;
    // Two processes must not carry out the same order, and names change: it is the directory that is locked.
    let in_use = || {
        format!(
            "{} is in use: another discoverd runs on this data directory",
            data.display()
        )
    };
    let this = File::open(data)?;
    this.try_lock().with_context(in_use)?;
    let store = data.join(STORE);
    let _lock = store.is_dir().then(|| dir::lock(&store)).transpose()?;

    let Some(ordered) = read_order(data)? else {
        remove_all(&data.join(MAKING))?;
        remove_all(&data.join(NEW))?;
        return Ok(false);
    };
    let (new, making) = (data.join(NEW), data.join(MAKING));
    if dir::stored_id(&store)? == Some(ordered.id) {
        tracing::warn!(order = ?ordered.order, member = ordered.id, "carried out; the old store is kept aside");
        prune(data)?;
        remove(&data.join(RESTORING))?;
        remove(&data.join(REFUSED))?;
        remove(&data.join(ORDER))?;
        sync_directory(&store)?;
    } else if dir::stored_id(&new)? != Some(ordered.id) {
        remove_all(&making)?;
        remove_all(&new)?;
        tracing::warn!(order = ?ordered.order, "an operator's order is carried out");
        if let Err(why) = make::store(options, &ordered.order, ordered.id, &making) {
            remove_all(&making)?;
            return refuse(data, &why).map(|()| true);
        }
        sync_directory(&making.join("id"))?;
        std::fs::rename(&making, &new)?;
        sync_directory(&new)?;
    } else if store.is_dir() {
        std::fs::rename(&store, data.join(format!("{OLD}{}", ordered.at)))?;
        sync_directory(&store)?;
    } else {
        std::fs::rename(&new, &store)?;
        sync_directory(&store)?;
    }
    Ok(true)
}

/// Takes an order back that cannot be carried out: discoverd goes on as it was.
fn refuse(data: &Path, why: &anyhow::Error) -> anyhow::Result<()> {
    let why = format!("{why:#}");
    tracing::error!(
        why,
        "an operator's order cannot be carried out; nothing was changed"
    );
    write(&data.join(REFUSED), why.as_bytes())?;
    remove(&data.join(ORDER))?;
    remove(&data.join(RESTORING))?;
    sync_directory(&data.join(ORDER))?;
    Ok(())
}

fn read_order(data: &Path) -> anyhow::Result<Option<Ordered>> {
    let path = data.join(ORDER);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let read = || {
        format!(
            "{} cannot be read; remove it and give the order again",
            path.display()
        )
    };
    let ordered: Ordered = serde_json::from_slice(&bytes).with_context(read)?;
    anyhow::ensure!(
        ordered.version == VERSION,
        "{} is of version {}: a newer release wrote it",
        path.display(),
        ordered.version
    );
    Ok(Some(ordered))
}

/// Removes the oldest of the stores that were kept aside.
fn prune(data: &Path) -> io::Result<()> {
    let mut old: Vec<(u64, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(data)? {
        let entry = entry?;
        let name = entry.file_name();
        let at = name
            .to_str()
            .and_then(|name| name.strip_prefix(OLD)?.parse().ok());
        old.extend(at.map(|at| (at, entry.path())));
    }
    old.sort_unstable();
    let many = old.len().saturating_sub(KEPT);
    for (_, path) in old.into_iter().take(many) {
        remove_all(&path)?;
    }
    Ok(())
}

/// The data directory whose store is `store`.
pub(crate) fn data_of(store: &Path) -> &Path {
    store.parent().unwrap_or(store)
}

/// Writes a file that nobody else may read, and syncs it.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    gone(std::fs::remove_file(path))
}

fn remove_all(path: &Path) -> io::Result<()> {
    gone(std::fs::remove_dir_all(path))
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
