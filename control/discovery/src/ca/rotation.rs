//! How the cluster's certificate authority comes by another root. Pure: the caller says what hosts hold and what time it
//! is, and gets the next step, or what is waited for.
//!
//! ```text
//!             begin: B beside A            switch: B signs            drop A
//!   A signs ───────────────────▶ Spread ──────────────────▶ Renew ─────────────▶ B signs
//!   A trusted                    A signs, A and B trusted    B signs, A and B trusted
//! ```
//!
//! Invariants:
//! - Two components that are there can verify each other at any time. To begin with, B signs once all hosts that are
//!   there trust it; and B's certificates come with a link, B certified by A, so that a host which was away meanwhile can
//!   verify them knowing A alone.
//! - A is trusted until no host holds a certificate of A: those that are there say so, and those that are away may hold
//!   one until the last that A can have signed has run out.
//! - A's key is gone with the step after which A signs no more.
//! - What is waited for has a name, and is no longer waited for when it is removed from the cluster.

use std::collections::BTreeMap;
use std::time::Duration;

use flynn_api::discovery::{ClusterCa, Held, Retired, Root, Rotation, Stage, Wait};
use jiff::{SignedDuration, Timestamp};

/// Days after which nothing is valid that was signed before: what a certificate lives, and what clocks and rounding add.
const OUTLIVED: i64 = flynn_api::tls::IDENTITY_DAYS + 2;
/// Days for which a certificate that has run out still proves whose it was.
pub const LATE: i64 = 275;
/// Days before its end when the signing root is replaced by itself.
pub const BEFORE: i64 = 365;
/// Roots that are kept for hosts which know nothing newer: as many as can be replaced while one is away, each of which is
/// waited for.
const RETIRED: usize = 4;

/// How a host of the cluster is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is not there.
    Away,
    /// It is there, and does not say what it holds.
    Silent,
    /// It says so.
    Holds(Held),
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Rest,
    /// This.
    Do(Step),
    /// These are waited for, and at the latest until then.
    Wait(Vec<Wait>, Option<Timestamp>),
}

/// A change of the certificate authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A new root comes beside the old one ([`begin`]).
    Begin,
    /// The new one signs ([`switch`]).
    Switch,
    /// The old one is trusted no more ([`drop_old`]).
    Drop,
    /// A retired root is of no more use ([`forget`]).
    Forget,
}

/// The next step of `ca` at `now`. `settle` is how long a step is at least let sink in: certificates that are being signed
/// arrive, and hosts tell what they hold.
pub fn next(ca: &ClusterCa, hosts: &BTreeMap<String, Standing>, now: Timestamp, settle: Duration) -> Next {
    let Some(rotation) = &ca.rotation else {
        let ends = ca.roots.first().map(|root| root.not_after);
        return if ca.requested || ends.is_some_and(|ends| ends < later(now, BEFORE)) {
            Next::Do(Step::Begin)
        } else if ca.retired.iter().any(|retired| retired.until <= now) {
            Next::Do(Step::Forget)
        } else {
            Next::Rest
        };
    };
    let [_, other] = ca.roots.as_slice() else {
        // Nothing that was written here: there is no other root.
        return Next::Do(Step::Drop);
    };
    let (step, until) = match rotation.stage {
        Stage::Spread => (Step::Switch, None),
        Stage::Renew => (Step::Drop, Some(later(rotation.since, OUTLIVED))),
    };
    if until.is_some_and(|until| until <= now) {
        return Next::Do(step);
    }
    let waits: Vec<Wait> = hosts
        .iter()
        .filter_map(|(host, standing)| {
            Some(Wait {
                host: host.clone(),
                away: *standing == Standing::Away,
                why: missing(rotation.stage, other, standing)?,
            })
        })
        .collect();
    let settled = Duration::try_from(now.duration_since(rotation.since)).is_ok_and(|since| since >= settle);
    if waits.is_empty() && settled && !hosts.is_empty() {
        Next::Do(step)
    } else {
        Next::Wait(waits, until)
    }
}

/// What a host lacks for the step that ends this stage.
fn missing(stage: Stage, other: &Root, standing: &Standing) -> Option<String> {
    let why = match (stage, standing) {
        (_, Standing::Silent) => {
            "it does not say what it trusts: its flynn-host is of an earlier release, or cannot read its certificates"
        }
        (Stage::Spread, Standing::Holds(held)) if !held.trusts.contains(&other.fingerprint) => {
            "not all on it trust the new root yet"
        }
        (Stage::Renew, Standing::Away) => "it is away, and may hold a certificate of the old root",
        (Stage::Renew, Standing::Holds(held)) if held.holds.contains(&other.fingerprint) => {
            "it holds certificates of the old root"
        }
        // Who is away can verify what the new root signs by the link.
        (Stage::Spread, Standing::Away) | (_, Standing::Holds(_)) => return None,
    };
    Some(why.to_owned())
}

/// [`Step::Begin`], with what was made for it.
pub fn begin(ca: &mut ClusterCa, root: Root, key: String, link: String, now: Timestamp) {
    ca.roots.truncate(1);
    ca.roots.push(root);
    ca.requested = false;
    ca.rotation = Some(Rotation {
        stage: Stage::Spread,
        since: now,
        key: Some(key),
        link: Some(link),
    });
    write_roots(ca);
}

/// [`Step::Switch`]. Changes nothing where there is nothing to switch to.
pub fn switch(ca: &mut ClusterCa, now: Timestamp) {
    let Some(rotation) = &mut ca.rotation else {
        return;
    };
    if let (Some(key), Some(link), [old, _]) =
        (rotation.key.take(), rotation.link.take(), ca.roots.as_slice())
    {
        ca.retired.push(Retired {
            root: old.clone(),
            link,
            until: later(now, OUTLIVED + LATE),
        });
        let excess = ca.retired.len().saturating_sub(RETIRED);
        ca.retired.drain(..excess);
        ca.roots.reverse();
        ca.key = key;
        (rotation.stage, rotation.since) = (Stage::Renew, now);
        write_roots(ca);
    }
}

/// [`Step::Drop`].
pub fn drop_old(ca: &mut ClusterCa) {
    ca.roots.truncate(1);
    ca.rotation = None;
    write_roots(ca);
}

/// [`Step::Forget`].
pub fn forget(ca: &mut ClusterCa, now: Timestamp) {
    ca.retired.retain(|retired| retired.until > now);
}

/// Members of an earlier release read these.
fn write_roots(ca: &mut ClusterCa) {
    ca.cert = ca.roots.iter().map(|root| root.cert.as_str()).collect();
}

fn later(time: Timestamp, days: i64) -> Timestamp {
    time.saturating_add(SignedDuration::from_hours(24 * days))
        .unwrap_or(Timestamp::MAX)
}
