//! Collects layers that nobody needs, before the disk is full.
//!
//! What goes, and how much of it, is worked out by pure functions. What a job holds, or is about to, stays because
//! the table of holders is locked meanwhile; what an image of this host names stays because of [`Pins`].

use std::fs::{self, File};
use std::io;
use std::time::{Duration, SystemTime};

use flynn_api::Digest;

use super::{Mounts, Other, Pins, Store, Stored, pins};
use crate::files;

/// When the free part of a disk is small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Below so many free bytes layers are collected …
    pub low: u64,
    /// … until so many are free.
    pub enough: u64,
}

impl Marks {
    /// A fifth of the disk, 20 GiB at most; and half as much again.
    pub fn of(size: u64) -> Self {
        let low = (size / 5).min(20 << 30);
        Self {
            low,
            enough: low + low / 2,
        }
    }

    /// How many bytes are to go, where `free` are free and `coming` more are about to be taken.
    pub fn wanted(self, free: u64, coming: u64) -> u64 {
        if free.saturating_sub(coming) >= self.low {
            return 0;
        }
        (coming + self.enough).saturating_sub(free)
    }
}

/// What is to go.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// So many bytes, the longest unused first.
    pub bytes: u64,
    /// Only what was not used for so long.
    pub older_than: Duration,
    /// Only say what would go.
    pub dry_run: bool,
}

/// What went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Layers.
    pub layers: Vec<Digest>,
    /// All bytes, those of unfinished and damaged layers as well.
    pub bytes: u64,
}

/// The layers that go: the longest unused first, until their bytes are enough.
fn choose(layers: Vec<Stored>, needed: impl Fn(Digest) -> bool, now: SystemTime, rule: Rule) -> Vec<Stored> {
    let mut chosen = layers;
    chosen.retain(|layer| is_older(layer.used, now, rule.older_than) && !needed(layer.id));
    chosen.sort_by_key(|layer| (layer.used, layer.id));
    let mut bytes = 0;
    let until = chosen.iter().position(|layer| {
        let enough = bytes >= rule.bytes;
        bytes += layer.length;
        enough
    });
    chosen.truncate(until.unwrap_or(chosen.len()));
    chosen
}

/// What was used in the future was used now: clocks are set.
fn is_older(used: SystemTime, now: SystemTime, than: Duration) -> bool {
    now.duration_since(used).unwrap_or_default() >= than
}

impl Store {
    /// Removes what `rule` says of what nobody needs. `mounts` are locked by the caller, so that no job begins to hold
    /// a layer meanwhile.
    pub fn collect(&self, mounts: &Mounts, rule: Rule) -> io::Result<Collected> {
        let lock = pins::lock(self.paths.state())?;
        lock.lock()?;
        let pins = Pins::read(&self.paths)?;
        let now = SystemTime::now();
        let mut collected = Collected::default();
        // First what is of no use to anybody.
        for other in self.others()? {
            if is_older(other.changed, now, rule.older_than) && collected.bytes < rule.bytes {
                collected.bytes += remove_other(&other, rule.dry_run)?;
            }
        }
        let rest = Rule {
            bytes: rule.bytes.saturating_sub(collected.bytes),
            ..rule
        };
        let needed = |layer| mounts.is_held(layer) || !pins.of(layer).is_empty();
        for layer in choose(self.list()?, needed, now, rest) {
            if !rule.dry_run {
                fs::remove_file(self.paths.layer(layer.id))?;
            }
            collected.bytes += layer.length;
            collected.layers.push(layer.id);
        }
        if !rule.dry_run && collected.bytes > 0 {
            files::sync_dir(&self.paths.layers())?;
        }
        Ok(collected)
    }
}

/// Removes an unfinished or damaged layer unless somebody writes it. Gives how many bytes that makes free.
fn remove_other(other: &Other, dry_run: bool) -> io::Result<u64> {
    let file = match File::open(&other.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        file => file?,
    };
    if file.try_lock().is_err() {
        return Ok(0);
    }
    if !dry_run {
        fs::remove_file(&other.path)?;
    }
    Ok(other.length)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_000_000;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn layers() -> impl Strategy<Value = Vec<Stored>> {
        let layer = (0..20_u8, 0..1000_u64, 0..2 * NOW);
        proptest::collection::vec(layer, 0..20).prop_map(|layers| {
            let stored = layers
                .into_iter()
                .enumerate()
                .map(|(index, (_, length, used))| Stored {
                    id: Digest::of(&[u8::try_from(index).unwrap()]),
                    length,
                    used: at(used),
                });
            stored.collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_needed_or_new_stays_and_no_more_goes_than_must(
            layers in layers(), needed in proptest::collection::btree_set(0..20_u8, 0..20), bytes in 0..5000_u64, age in 0..NOW,
        ) {
            let needed: BTreeSet<Digest> = needed.into_iter().map(|index| Digest::of(&[index])).collect();
            let rule = Rule { bytes, older_than: Duration::from_secs(age), dry_run: false };
            let gone = choose(layers.clone(), |layer| needed.contains(&layer), at(NOW), rule);
            for layer in &gone {
                prop_assert!(!needed.contains(&layer.id) && layer.used + rule.older_than <= at(NOW).max(layer.used));
            }
            // Without the last it would not be enough.
            let sum = |layers: &[Stored]| layers.iter().map(|layer| layer.length).sum::<u64>();
            if let [rest @ .., _] = gone.as_slice() {
                prop_assert!(sum(rest) < bytes);
            }
            // What could have gone and did not was used later than all that went, and was not wanted.
            let could = |layer: &&Stored| !needed.contains(&layer.id) && is_older(layer.used, at(NOW), rule.older_than);
            for left in layers.iter().filter(could).filter(|layer| !gone.contains(layer)) {
                prop_assert!(sum(&gone) >= bytes);
                prop_assert!(gone.iter().all(|layer| layer.used <= left.used));
            }
        }

        #[test]
        fn enough_is_free_in_the_end(size in 1_u64..1 << 50, free: u64, coming in 0_u64..1 << 40) {
            let free = free % size;
            let marks = Marks::of(size);
            let wanted = marks.wanted(free, coming);
            prop_assert!(marks.low <= marks.enough && marks.enough <= size);
            if wanted == 0 {
                prop_assert!(free.saturating_sub(coming) >= marks.low);
            } else {
                prop_assert!(free + wanted >= coming + marks.enough);
            }
        }
    }
}
