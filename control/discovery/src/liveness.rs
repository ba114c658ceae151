//! Who lives: what a voter makes of the members' beats, and what the leader takes out of the registry for it.
//!
//! Every voter is told by every member ([`Beat`]), and keeps what it hears in memory alone: a beat costs no log entry,
//! and whoever is elected knows already who spoke last when. Only the leader acts on it. An instance is taken out when
//!
//! - its member says that it is silent, or said goodbye;
//! - its member is gone, by two signals: no beat for [`Times::silence`], and meanwhile its host did not answer when it
//!   was probed, nor has another voter heard it. A host that answers keeps its instances for [`Times::lease`], for the
//!   discoverd there may be about to start again;
//! - nobody has answered for it for a lease; or the member that it registered at last is gone, and all others have said
//!   for whom they answer. (A leader that has only just started was never told by the one that is gone.)
//!
//! When most of the others are silent at once it is more likely that this member is cut off: then the lease counts as
//! well. And whoever was stopped for a while, or was heard by no majority, has heard nothing meanwhile, and when connections come
//! back it is not at once that all are heard: so everybody begins anew.
//!
//! Pure: the caller says what time it is (milliseconds), and what the probes found.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::claims::{Beat, Heard, Key, PAUSE};
use crate::command::Registration;

/// Between looks at every single registration.
const SCAN: u64 = 1_000;

/// How long which silence may last, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A member without a beat for this long, whose host does not answer either, is gone.
    pub silence: u64,
    /// A member whose host answers, and an instance for which nobody answers, are gone after this time.
    pub lease: u64,
}

/// That a member leads.
#[derive(Clone, Copy, Debug)]
pub struct Lead {
    /// In which term.
    pub term: u64,
    /// How long ago a majority was heard to follow it, in milliseconds; none was yet in this term.
    pub acked: Option<u64>,
}

/// An instance as the registry has it.
#[derive(Clone, Copy, Debug)]
pub struct Registered<'r> {
    /// Its service.
    pub service: &'r str,
    /// Its id.
    pub id: &'r str,
    /// When it registered.
    pub index: u64,
    /// The member that it registered at last; 0 if nobody knows.
    pub member: u64,
}

/// A voter's memory of beats.
#[derive(Debug)]
pub struct Liveness {
    times: Times,
    round: u64,
    scan: u64,
    term: Option<u64>,
    /// This member leads, but no majority hears it.
    alone: bool,
    members: BTreeMap<u64, Member>,
    owners: HashMap<Key, BTreeSet<u64>>,
    /// Since when nobody answers for an instance.
    orphans: HashMap<Key, u64>,
    /// Instances of which a member said that they are silent, and the index that it had come to: who has registered since is
    /// not meant.
    released: HashMap<Key, u64>,
}

#[derive(Debug, Default)]
struct Member {
    /// 0: it was never heard.
    session: u64,
    version: u64,
    claims: HashSet<Key>,
    heard: u64,
    /// When its host answered a probe last.
    answered: Option<u64>,
    /// When the last probe began that had no answer.
    unanswered: Option<u64>,
    gone: bool,
}

impl Liveness {
    /// Nothing was heard yet.
    pub fn new(times: Times) -> Self {
        Self {
            times,
            round: 0,
            scan: 0,
            term: None,
            alone: false,
            members: BTreeMap::new(),
            owners: HashMap::new(),
            orphans: HashMap::new(),
            released: HashMap::new(),
        }
    }

    /// Takes a beat.
    pub fn beat(&mut self, now: u64, beat: Beat) -> Heard {
        let member = self.members.entry(beat.member).or_default();
        member.heard = member.heard.max(now);
        member.gone = false;
        let known = if member.session == beat.session {
            member.version
        } else {
            0
        };
        if beat.base != 0 && beat.base != known {
            return Heard { understood: false };
        }
        let (alive, silent) = if beat.base == 0 {
            let all: HashSet<Key> = beat.alive.into_iter().collect();
            let lost: Vec<Key> = member.claims.difference(&all).cloned().collect();
            // Nobody has said of them that they are silent: whoever tells everything anew may have just started.
            (all.into_iter().collect(), lost)
        } else {
            for key in &beat.silent {
                let upto = self.released.entry(key.clone()).or_default();
                *upto = beat.index.max(*upto);
            }
            (beat.alive, beat.silent)
        };
        (member.session, member.version) = (beat.session, beat.version);
        for key in silent {
            member.claims.remove(&key);
            disown(&mut self.owners, &key, beat.member);
        }
        for key in alive {
            self.released.remove(&key);
            self.owners.entry(key.clone()).or_default().insert(beat.member);
            member.claims.insert(key);
        }
        Heard { understood: true }
    }

    /// Members whose beats are missing: their hosts are to be probed, and the other voters to be asked.
    pub fn suspects(&self, now: u64) -> Vec<u64> {
        let missing = |member: &Member| now.saturating_sub(member.heard) > self.times.silence / 2;
        self.members
            .iter()
            .filter(|(_, member)| missing(member))
            .map(|(id, _)| *id)
            .collect()
    }

    /// How long ago these members were heard.
    pub fn ages(&self, now: u64, members: &[u64]) -> BTreeMap<u64, u64> {
        members
            .iter()
            .filter_map(|id| Some((*id, self.members.get(id).filter(|member| member.session != 0)?)))
            .map(|(id, member)| (id, now.saturating_sub(member.heard)))
            .collect()
    }

    /// Another voter has heard `member` at this time.
    pub fn heard_elsewhere(&mut self, member: u64, at: u64) {
        if let Some(member) = self.members.get_mut(&member).filter(|member| member.heard < at) {
            member.heard = at;
            // What it said there is not known here; but that it lives is.
            member.gone = false;
        }
    }

    /// A probe of `member`'s host that began at this time has ended.
    pub fn probed(&mut self, member: u64, began: u64, answered: bool) {
        if let Some(member) = self.members.get_mut(&member) {
            let at = if answered {
                &mut member.answered
            } else {
                &mut member.unanswered
            };
            *at = (*at).max(Some(began));
        }
    }

    /// To be called several times a second, whatever else goes on: who was stopped meanwhile notices it.
    pub fn tick(&mut self, now: u64) {
        if now.saturating_sub(self.round) > PAUSE {
            self.begin_anew(now);
        }
        self.round = now;
    }

    fn begin_anew(&mut self, now: u64) {
        for member in self.members.values_mut() {
            member.heard = now;
            member.gone = false;
        }
        self.orphans.clear();
    }

    /// To be called several times a second by every voter: `members` are those of the cluster, `own` is this one.
    /// For the leader, gives those of `registered` that are to be taken out.
    pub fn round<'r, R: Iterator<Item = Registered<'r>>>(
        &mut self,
        now: u64,
        own: u64,
        members: &BTreeSet<u64>,
        lead: Option<Lead>,
        registered: impl FnOnce() -> R,
    ) -> Vec<Registration> {
        self.tick(now);
        self.forget_all_but(members);
        for id in members {
            // Of whom nothing was heard yet, silence begins now.
            self.members.entry(*id).or_insert_with(|| Member {
                heard: now,
                ..Member::default()
            });
        }
        let Some(Lead { term, acked }) = lead else {
            self.term = None;
            self.alone = false;
            self.released.clear();
            return Vec::new();
        };
        if acked.is_none_or(|age| age > self.times.silence) {
            // Nothing could be taken out. One that has only just been elected is heard in a moment.
            self.alone |= acked.is_some();
            return Vec::new();
        }
        if std::mem::take(&mut self.alone) {
            self.begin_anew(now);
        }
        if self.term != Some(term) {
            self.term = Some(term);
            // Whoever led before knew what we do not; and what we found out when we led ourselves is old.
            self.orphans.clear();
            for member in self.members.values_mut() {
                member.gone = false;
            }
            if self.most_are_silent(now, own) {
                self.begin_anew(now);
            }
        }
        let lost = self.find_the_gone(now, own);
        if !lost && self.released.is_empty() && now.saturating_sub(self.scan) < SCAN {
            return Vec::new();
        }
        self.scan = now;
        self.scan(now, registered())
    }

    /// Whether it is more likely that this member is cut off than that so many are gone.
    fn most_are_silent(&self, now: u64, own: u64) -> bool {
        let others = self
            .members
            .iter()
            .filter(|(id, member)| **id != own && !member.gone);
        let (all, silent) = others.fold((0, 0), |(all, silent), (_, member)| {
            let quiet = now.saturating_sub(member.heard) > self.times.silence;
            (all + 1, silent + usize::from(quiet))
        });
        silent > 1 && silent * 2 > all
    }

    /// Whether a member is gone that was not before.
    fn find_the_gone(&mut self, now: u64, own: u64) -> bool {
        let Times { silence, lease } = self.times;
        let quiet = |member: &Member| now.saturating_sub(member.heard) > silence;
        let cut_off = self.most_are_silent(now, own);
        let mut lost = false;
        for (id, member) in &mut self.members {
            if *id == own || member.gone || !quiet(member) {
                continue;
            }
            let no_answer = member.unanswered > Some(member.heard)
                && member.answered.is_none_or(|at| now.saturating_sub(at) > silence);
            if (no_answer && !cut_off) || now.saturating_sub(member.heard) > lease {
                member.gone = true;
                lost = true;
            }
        }
        lost
    }

    fn scan<'r>(&mut self, now: u64, registered: impl Iterator<Item = Registered<'r>>) -> Vec<Registration> {
        let mut expired = Vec::new();
        let mut orphans = HashMap::new();
        let mut key = Key {
            service: String::new(),
            id: String::new(),
        };
        let is_told = |member: &Member| member.gone || member.session != 0;
        let told_by_all = self.members.values().all(is_told);
        for of in registered {
            let Registered {
                service,
                id,
                index,
                member,
            } = of;
            service.clone_into(&mut key.service);
            id.clone_into(&mut key.id);
            let dead = match self.owners.get(&key) {
                Some(owners) => owners
                    .iter()
                    .all(|owner| self.members.get(owner).is_none_or(|member| member.gone)),
                None if self.released.get(&key).is_some_and(|upto| index <= *upto) => true,
                None if told_by_all && self.members.get(&member).is_some_and(|member| member.gone) => true,
                None => {
                    let since = *self.orphans.get(&key).unwrap_or(&now);
                    orphans.insert(key.clone(), since);
                    now.saturating_sub(since) > self.times.lease
                }
            };
            if dead {
                expired.push(Registration {
                    service: service.to_owned(),
                    id: id.to_owned(),
                    index,
                });
            }
        }
        self.orphans = orphans;
        self.released.clear();
        expired
    }

    fn forget_all_but(&mut self, members: &BTreeSet<u64>) {
        let owners = &mut self.owners;
        self.members.retain(|id, member| {
            let stays = members.contains(id);
            if !stays {
                for key in &member.claims {
                    disown(owners, key, *id);
                }
            }
            stays
        });
    }
}

fn disown(owners: &mut HashMap<Key, BTreeSet<u64>>, key: &Key, member: u64) {
    if let Some(of) = owners.get_mut(key) {
        of.remove(&member);
        if of.is_empty() {
            owners.remove(key);
        }
    }
}
