//! How fresh a read is, and where in the history of changes a watcher has come to.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// The header by which an answer names the Raft index that it reflects, or, after a write, that it was written at.
pub const INDEX_HEADER: &str = "x-flynn-index";

/// How fresh a read must be: `?consistency=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Whatever was written before the call, anywhere, is seen. The leader asks a majority whether it still leads.
    Linearizable,
    /// The same, as long as clocks run at about the same speed: the leader relies on the lease that a majority has
    /// given it, and asks nobody.
    Lease,
    /// What this host knows, which may be old. Needs neither leader nor network.
    Local,
}

impl Consistency {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Linearizable, Self::Lease, Self::Local];

    /// As it is written in a query.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Linearizable => "linearizable",
            Self::Lease => "lease",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Consistency {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|one| one.as_str() == text);
        found.ok_or_else(|| Error::invalid_field("consistency", "it must be linearizable, lease or local"))
    }
}

/// Where a watcher has come to: the `id` of an event, `?since=` or `Last-Event-ID` of a watch that resumes.
///
/// One write may come to several events. `105` is the place behind all events of the write at index 105, `105.2` the one
/// behind its event 2 (counted from 0, events that are not told to this watcher included). All members count alike, so a
/// watch resumes at any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The Raft index.
    pub index: u64,
    // `u32::MAX` stands for all, so that the order is the derived one.
    part: u32,
}

impl Position {
    /// Behind all events of `index`.
    pub fn behind(index: u64) -> Self {
        Self {
            index,
            part: u32::MAX,
        }
    }

    /// Behind event `part` of `index`.
    pub fn within(index: u64, part: u32) -> Self {
        Self { index, part }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.part {
            u32::MAX => write!(f, "{}", self.index),
            part => write!(f, "{}.{part}", self.index),
        }
    }
}

impl FromStr for Position {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = |_| Error::invalid_field("since", "it must be the id of an event, like 105 or 105.2");
        Ok(match text.split_once('.') {
            None => Self::behind(text.parse().map_err(refused)?),
            Some((index, part)) => {
                Self::within(index.parse().map_err(refused)?, part.parse().map_err(refused)?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn positions_survive_the_wire_in_order(a: (u64, u32), b: (u64, u32)) {
            let (a, b) = (Position::within(a.0, a.1), Position::within(b.0, b.1));
            prop_assert_eq!(a.to_string().parse::<Position>().unwrap(), a);
            prop_assert_eq!(a.cmp(&b), (a.index, a.part).cmp(&(b.index, b.part)));
            prop_assert!(a <= Position::behind(a.index));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,30}|[0-9.]{0,30}") {
            if let Ok(position) = text.parse::<Position>() {
                prop_assert_eq!(position.to_string().parse::<Position>().unwrap(), position);
            }
        }
    }

    #[test]
    fn consistencies_are_written_as_they_are_read() {
        for one in Consistency::ALL {
            assert_eq!(one.to_string().parse::<Consistency>().unwrap(), one);
        }
        let error = "strong".parse::<Consistency>().unwrap_err();
        assert!(error.message.contains("linearizable, lease or local"));
    }
}
