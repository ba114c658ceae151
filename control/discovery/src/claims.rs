//! The instances that this member answers for: those that registered here, and have said so again within their lease.
//!
//! Instances speak to the discoverd of their own host alone; it tells the voters of all of them at once, by a [`Beat`]
//! a few times a second that says nothing but that there is nothing new. No clock of its own: the caller says what time
//! it is.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

/// Between rounds that are this far apart (milliseconds), this member was stopped.
pub(crate) const PAUSE: u64 = 700;

/// Names an instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// Its service.
    pub service: String,
    /// Its id.
    pub id: String,
}

/// What a member says of itself: it lives, and so do the instances that it answers for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// The member's Raft id.
    pub member: u64,
    /// Another number after each start.
    pub session: u64,
    /// Numbers the set of instances as it is after this beat.
    pub version: u64,
    /// The version that this beat tells the difference to; 0: the empty set.
    pub base: u64,
    /// Instances that came to it.
    pub alive: Vec<Key>,
    /// Instances that are no longer heard of, or said goodbye.
    pub silent: Vec<Key>,
    /// The Raft index that this member had come to: what is silent here may have registered anew since. (Earlier releases
    /// do not say.)
    #[serde(default = "any_index")]
    pub index: u64,
}

fn any_index() -> u64 {
    u64::MAX
}

/// What a voter says to a [`Beat`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Whether the voter knows the version that the beat was relative to. If not, it wants the whole set.
    pub understood: bool,
}

/// The set, with its lease.
#[derive(Debug)]
pub struct Claims {
    ttl: u64,
    round: u64,
    version: u64,
    last: HashMap<Key, u64>,
}

impl Claims {
    /// With leases of `ttl` milliseconds.
    pub fn new(ttl: u64) -> Self {
        Self {
            ttl,
            round: 0,
            version: 1,
            last: HashMap::new(),
        }
    }

    /// An instance is about to register, or said that it lives; whether nothing was known of it.
    pub fn heard(&mut self, now: u64, service: &str, id: &str) -> bool {
        let key = Key {
            service: service.to_owned(),
            id: id.to_owned(),
        };
        let new = self.last.insert(key, now).is_none();
        self.version += u64::from(new);
        new
    }

    /// An instance said goodbye.
    pub fn gone(&mut self, service: &str, id: &str) {
        let key = Key {
            service: service.to_owned(),
            id: id.to_owned(),
        };
        if self.last.remove(&key).is_some() {
            self.version += 1;
        }
    }

    /// Forgets those whose lease has run out. To be called several times a second.
    pub fn round(&mut self, now: u64) {
        if now.saturating_sub(self.round) > PAUSE {
            // This member was stopped, and what they said meanwhile waits in its sockets.
            for last in self.last.values_mut() {
                *last = now;
            }
        }
        self.round = now;
        let before = self.last.len();
        self.last.retain(|_, last| now.saturating_sub(*last) <= self.ttl);
        if self.last.len() < before {
            self.version += 1;
        }
    }
}

/// What one voter was told last.
#[derive(Debug, Default)]
pub struct Told {
    version: u64,
    keys: BTreeSet<Key>,
}

impl Told {
    /// The next beat to that voter, and what it will have been told by it. `index` was reached before `claims` were looked
    /// at.
    pub fn next(&self, member: u64, session: u64, index: u64, claims: &Claims) -> (Beat, Option<Self>) {
        let mut beat = Beat {
            member,
            session,
            version: claims.version,
            base: self.version,
            alive: Vec::new(),
            silent: Vec::new(),
            index,
        };
        if self.version == claims.version {
            return (beat, None);
        }
        let keys: BTreeSet<Key> = claims.last.keys().cloned().collect();
        beat.alive = keys.difference(&self.keys).cloned().collect();
        beat.silent = self.keys.difference(&keys).cloned().collect();
        let told = Self {
            version: claims.version,
            keys,
        };
        (beat, Some(told))
    }
}
