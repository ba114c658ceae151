//! The hosts that a client may ask, and how it goes from one to the next.
//!
//! The chosen host is asked first, then the others. One that has failed is asked last for a while, which grows with each
//! failure in a row. A call goes on with the next host when it was not made, or when making it twice is the same as once
//! ([`Kind`]). All attempts together take no longer than twice what one call may, and there are few rounds of them.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep};

use super::Http;
use crate::discovery::Peer;
use crate::tls::Identity;
use crate::{Error, ErrorCode, Result};

/// How often all hosts are asked, if there are several.
const ROUNDS: u32 = 4;
/// Between the first two rounds; then twice as long each time.
const PAUSE: Duration = Duration::from_millis(100);
/// An attempt gets an even share of the time that is left, but at least this much.
const SHARE: Duration = Duration::from_secs(2);
/// How long a host is asked last after its first failure; then twice as long each time, up to the other.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// Between questions who the members are.
const LEARN: Duration = Duration::from_mins(1);
/// Between looks at the certificate.
const LOOK: Duration = Duration::from_secs(1);
/// How long a host that was heard of counts as there, and how long it may take to say that it is.
const HEARD: Duration = Duration::from_secs(4);
const ANSWER: Duration = Duration::from_secs(2);
/// Hosts that are kept in mind.
const MOST: usize = 1_000;

/// What follows when nobody knows whether a call was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It changes nothing: another host is asked.
    Read,
    /// Twice is the same as once: another host is asked. Should that one refuse, the first may be why.
    Repeatable,
    /// The caller is told.
    Once,
}

/// The hosts.
#[derive(Debug)]
pub(super) struct Hosts {
    known: Mutex<Known>,
    /// Where the identity is that is shown to others.
    tls: Option<PathBuf>,
}

#[derive(Debug)]
struct Known {
    /// Those that were chosen, then those that were learnt.
    hosts: Vec<Host>,
    chosen: usize,
    timeout: Duration,
    certificate: Option<SystemTime>,
    looked: Option<Instant>,
    learnt: Option<Instant>,
}

#[derive(Debug)]
struct Host {
    http: Http,
    failures: u32,
    rests: Option<Instant>,
    heard: Option<Instant>,
}

impl Host {
    fn new(http: Http) -> Self {
        Self {
            http,
            failures: 0,
            rests: None,
            heard: None,
        }
    }
}

impl Hosts {
    /// These, of which the first is asked first.
    pub(super) fn new(first: Http, others: Vec<Http>) -> Self {
        Self {
            known: Mutex::new(Known {
                chosen: 1 + others.len(),
                timeout: first.patience(),
                hosts: [first].into_iter().chain(others).map(Host::new).collect(),
                certificate: None,
                looked: None,
                learnt: None,
            }),
            tls: None,
        }
    }

    /// The same, which learn of others and show them the identity in `tls`.
    pub(super) fn learning(&self, tls: PathBuf) -> Self {
        let first = self.chosen();
        let others = self.known().hosts[1..]
            .iter()
            .map(|host| host.http.clone())
            .collect();
        let hosts = Self {
            tls: Some(tls),
            ..Self::new(first, others)
        };
        hosts.known().certificate = hosts.certificate();
        hosts
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call, at one host after the other.
    pub(super) async fn call<T, F>(self: &Arc<Self>, kind: Kind, attempt: impl Fn(Http) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let timeout = self.known().timeout;
        let total = if self.several() { timeout * 2 } else { timeout };
        let deadline = Instant::now() + total;
        let mut failed: Option<Error> = None;
        for round in 0..ROUNDS {
            let hosts = self.in_order();
            let alone = hosts.len() == 1;
            for (at, http) in hosts.iter().enumerate() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() && failed.is_some() {
                    break;
                }
                let others = u32::try_from(hosts.len() - at).unwrap_or(u32::MAX);
                let limit = match kind {
                    Kind::Once => left,
                    Kind::Read | Kind::Repeatable => (left / others).max(SHARE).min(left),
                };
                let answer = attempt(http.clone().timeout(limit.min(timeout))).await;
                let unknown = failed.as_ref().is_some_and(Error::may_be_done);
                match answer {
                    Err(error) if error.may_be_done() && kind == Kind::Once => {
                        self.failed(http.base());
                        return Err(error);
                    }
                    Err(error) if error.may_be_done() || error.code == ErrorCode::Unavailable => {
                        self.failed(http.base());
                        // That it may have been done somewhere is what has to be said in the end.
                        if !unknown {
                            failed = Some(error);
                        }
                    }
                    // Another host may know what this one has forgotten.
                    Err(error) if error.code == ErrorCode::Gone && kind == Kind::Read => {
                        self.answered(http);
                        failed = Some(error);
                    }
                    Err(error) if unknown && kind == Kind::Repeatable && !error.surely_undone() => {
                        self.answered(http);
                        return Err(error.or_done());
                    }
                    answer => {
                        self.answered(http);
                        return answer;
                    }
                }
            }
            let pause = PAUSE * 2_u32.pow(round);
            let gone = failed.as_ref().is_some_and(|error| error.code == ErrorCode::Gone);
            if alone || gone || round + 1 == ROUNDS || Instant::now() + pause >= deadline {
                break;
            }
            sleep(pause).await;
        }
        Err(failed.unwrap_or_else(|| Error::validation("no host of discoverd is named")))
    }

    /// The chosen host, for what is meant for that one alone.
    pub(super) fn chosen(&self) -> Http {
        self.renew();
        // There is one from the beginning, and it stays.
        self.known().hosts[0].http.clone()
    }

    /// Whether there are several.
    pub(super) fn several(&self) -> bool {
        self.known().hosts.len() > 1
    }

    /// Whether the host at `base` is there: it has answered a moment ago, or does now.
    pub(super) async fn is_there(&self, base: &str) -> bool {
        let http = {
            let known = self.known();
            let Some(host) = known.hosts.iter().find(|host| host.http.base() == base) else {
                return false;
            };
            if host.heard.is_some_and(|heard| heard.elapsed() < HEARD) {
                return true;
            }
            host.http.clone()
        };
        let there = http.timeout(ANSWER).get::<()>("/ping").await.is_ok();
        if there {
            self.heard(base);
        } else {
            self.failed(base);
        }
        there
    }

    /// Those that have not failed of late, the chosen first; then the others, beginning with the one whose rest is over
    /// soonest.
    fn in_order(&self) -> Vec<Http> {
        self.renew();
        let (known, now) = (self.known(), Instant::now());
        let mut hosts: Vec<&Host> = known.hosts.iter().collect();
        hosts.sort_by_key(|host| host.rests.filter(|rests| *rests > now));
        hosts.into_iter().map(|host| host.http.clone()).collect()
    }

    fn failed(&self, base: &str) {
        let mut known = self.known();
        if let Some(host) = known.find(base) {
            let rest = (REST * 2_u32.pow(host.failures.min(10))).min(LONGEST_REST);
            host.failures += 1;
            host.rests = Some(Instant::now() + rest);
            host.heard = None;
        }
    }

    pub(super) fn heard(&self, base: &str) {
        if let Some(host) = self.known().find(base) {
            host.failures = 0;
            host.rests = None;
            host.heard = Some(Instant::now());
        }
    }

    fn answered(self: &Arc<Self>, http: &Http) {
        self.heard(http.base());
        let due = {
            let mut known = self.known();
            let due = self.tls.is_some() && known.learnt.is_none_or(|at| at.elapsed() > LEARN);
            if due {
                known.learnt = Some(Instant::now());
            }
            due
        };
        if due {
            let (hosts, http) = (Arc::clone(self), http.clone());
            tokio::spawn(async move {
                if let Ok(peers) = http.timeout(SHARE).get::<Vec<Peer>>("/raft/peers").await {
                    hosts.know(peers.into_iter().map(|peer| peer.addr));
                }
            });
        }
    }

    /// Takes these for all others that there are.
    pub(super) fn know(&self, addrs: impl IntoIterator<Item = String>) {
        let Some(tls) = &self.tls else { return };
        let mut bases: Vec<String> = addrs
            .into_iter()
            .take(MOST)
            .map(|addr| format!("https://{addr}"))
            .collect();
        // Not all clients of a host that has gone turn to the same other.
        let random = RandomState::new();
        bases.sort_by_cached_key(|base| random.hash_one(base));
        let mut known = self.known();
        let (chosen, timeout) = (known.chosen, known.timeout);
        let hosts = &mut known.hosts;
        let mut learnt = hosts.split_off(chosen);
        learnt.retain(|host| bases.iter().any(|base| base == host.http.base()));
        hosts.extend(learnt);
        bases.retain(|base| hosts.iter().all(|host| host.http.base() != base));
        match dial(&bases, tls, timeout) {
            Ok(new) => hosts.extend(new.into_iter().map(Host::new)),
            Err(why) => tracing::warn!(%why, "other hosts' discoverd cannot be asked"),
        }
    }

    fn certificate(&self) -> Option<SystemTime> {
        let path = self.tls.as_ref()?.join("cert.pem");
        std::fs::metadata(path).ok()?.modified().ok()
    }

    /// Shows another certificate once there is one.
    fn renew(&self) {
        let Some(tls) = &self.tls else { return };
        let mut known = self.known();
        if known.looked.is_some_and(|at| at.elapsed() < LOOK) {
            return;
        }
        known.looked = Some(Instant::now());
        let now = self.certificate();
        if now.is_none() || now == known.certificate {
            return;
        }
        let timeout = known.timeout;
        let shown: Vec<&mut Host> = known
            .hosts
            .iter_mut()
            .filter(|host| host.http.base().starts_with("https:"))
            .collect();
        let bases: Vec<String> = shown.iter().map(|host| host.http.base().to_owned()).collect();
        match dial(&bases, tls, timeout) {
            Ok(new) => {
                for (host, http) in shown.into_iter().zip(new) {
                    host.http = http;
                }
                known.certificate = now;
            }
            Err(why) => tracing::warn!(%why, "the new certificate is not used yet"),
        }
    }
}

impl Known {
    fn find(&mut self, base: &str) -> Option<&mut Host> {
        self.hosts.iter_mut().find(|host| host.http.base() == base)
    }
}

fn dial(bases: &[String], tls: &Path, timeout: Duration) -> Result<Vec<Http>> {
    let identity = Identity::load(tls).and_then(|identity| identity.client_config());
    let config = identity.map_err(|why| Error::internal(format!("no certificate to show: {why}")))?;
    let dialled = bases
        .iter()
        .map(|base| Ok(Http::new(base)?.tls(Arc::clone(&config)).timeout(timeout)));
    dialled.collect()
}
