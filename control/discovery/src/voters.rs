//! Who votes. Pure: the caller says how each member does, and gets the next set of voters, if there is a better one.
//!
//! A set of voters is better than another by, in this order: fewer members that an operator demoted; more voters that
//! may still be lost before the majority is; an odd number; more of them, up to [`MAX_VOTERS`]; more members that an
//! operator promoted; failure zones that each hold fewer of them. Nothing is changed for a set that is merely as good,
//! so that members that come and go move no votes to and fro.
//!
//! Whatever is chosen:
//! - a majority of the present voters, and one of the next, is there to agree to it;
//! - of the next voters no fewer are there than the majority of the present ones: no write that was answered rests on
//!   fewer members than before;
//! - whoever becomes a voter has been well for a while, and has the log but for its end.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use flynn_api::discovery::Voting;

/// More voters make writes slower and the cluster hardly safer.
pub const MAX_VOTERS: usize = 5;

/// How a member does.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// Its Raft id.
    pub id: u64,
    /// What fails together with it.
    pub zone: String,
    /// What the operator wants of it.
    pub vote: Voting,
    /// Milliseconds since its last sign of life.
    pub silent: u64,
    /// Milliseconds for which it has been well without a pause; `None` when it is not.
    pub well: Option<u64>,
    /// Entries of the log that it lacks; `None` when that is not known.
    pub lag: Option<u64>,
}

/// What counts as how long, in milliseconds, and as how far behind.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A member that is silent for longer is not counted on.
    pub silence: u64,
    /// A voter that is silent for longer is replaced.
    pub replace: u64,
    /// Who becomes a voter has been well for this long.
    pub settle: u64,
    /// And lacks no more entries than this.
    pub lag: u64,
}

/// Members as a choice sees them.
struct Field<'a> {
    members: BTreeMap<u64, &'a Standing>,
    present: &'a BTreeSet<u64>,
    leader: u64,
    rules: Rules,
}

/// How good a set is: the greater the better.
type Score = (Reverse<usize>, usize, bool, usize, usize, Reverse<Vec<usize>>);

/// The next set of voters, if it is to differ. `configs` are the present voters; there are two sets while a change is
/// under way, which then is brought to its end first.
pub fn next(
    members: &[Standing],
    configs: &[BTreeSet<u64>],
    leader: u64,
    rules: Rules,
) -> Option<BTreeSet<u64>> {
    let present = configs.last()?;
    if configs.len() > 1 {
        return Some(present.clone());
    }
    let field = Field::new(members, present, leader, rules);
    let score = field.score(present);
    field
        .choices()
        .filter(|next| field.may_follow(next))
        // The lost are replaced before others come in beside them.
        .filter(|next| next.len() <= present.len() || !next.iter().any(|id| field.lost(*id)))
        .map(|next| (field.score(&next), next))
        .filter(|(better, _)| *better > score)
        .max_by(|a, b| a.0.cmp(&b.0))
        .map(|(_, next)| next)
}

/// The voters when `out` leaves for good. `None` when there would be no majority.
pub fn without(
    members: &[Standing],
    present: &BTreeSet<u64>,
    leader: u64,
    rules: Rules,
    out: u64,
) -> Option<BTreeSet<u64>> {
    if !present.contains(&out) {
        return Some(present.clone());
    }
    let field = Field::new(members, present, leader, rules);
    let staying: Vec<Standing> = members
        .iter()
        .filter(|member| member.id != out)
        .cloned()
        .collect();
    let others = Field::new(&staying, present, leader, rules);
    let rest: BTreeSet<u64> = present.iter().copied().filter(|id| *id != out).collect();
    let best = others
        .choices()
        .chain([rest.clone()])
        .filter(|next| !next.is_empty() && field.may_follow(next))
        .max_by_key(|next| others.score(next));
    // Two voters of which one leaves: nothing else is left to do.
    best.or_else(|| (field.agrees(present) && field.agrees(&rest)).then_some(rest))
        .filter(|next| !next.is_empty())
}

/// The smallest number that is more than half.
pub fn majority(of: usize) -> usize {
    of / 2 + 1
}

impl<'a> Field<'a> {
    fn new(members: &'a [Standing], present: &'a BTreeSet<u64>, leader: u64, rules: Rules) -> Self {
        let members = members.iter().map(|member| (member.id, member)).collect();
        Self {
            members,
            present,
            leader,
            rules,
        }
    }

    fn there(&self, id: u64) -> bool {
        self.members
            .get(&id)
            .is_some_and(|member| member.silent <= self.rules.silence)
    }

    fn lost(&self, id: u64) -> bool {
        self.members
            .get(&id)
            .is_none_or(|member| member.silent > self.rules.replace)
    }

    /// How many of `voters` are there.
    fn count(&self, voters: &BTreeSet<u64>) -> usize {
        voters.iter().filter(|id| self.there(**id)).count()
    }

    /// Whether a majority of `voters` is there.
    fn agrees(&self, voters: &BTreeSet<u64>) -> bool {
        !voters.is_empty() && self.count(voters) >= majority(voters.len())
    }

    fn may_follow(&self, next: &BTreeSet<u64>) -> bool {
        self.agrees(self.present) && self.agrees(next) && self.count(next) >= majority(self.present.len())
    }

    fn score(&self, voters: &BTreeSet<u64>) -> Score {
        let voted = |vote| {
            let of = voters.iter().filter_map(|id| self.members.get(id));
            of.filter(|member| member.vote == vote).count()
        };
        let lost = voters.iter().filter(|id| self.lost(**id)).count();
        let spare = (voters.len() - lost).saturating_sub(majority(voters.len()));
        let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
        for member in voters.iter().filter_map(|id| self.members.get(id)) {
            *zones.entry(&member.zone).or_default() += 1;
        }
        let mut zones: Vec<usize> = zones.into_values().collect();
        zones.sort_unstable_by_key(|count| Reverse(*count));
        (
            Reverse(voted(Voting::Demoted)),
            spare,
            !voters.len().is_multiple_of(2),
            voters.len(),
            voted(Voting::Promoted),
            Reverse(zones),
        )
    }

    /// Whether a member can be chosen, and not merely left where it is.
    fn fit(&self, member: &Standing) -> bool {
        let ready = || {
            self.there(member.id)
                && member.well.is_some_and(|well| well >= self.rules.settle)
                && member.lag.is_some_and(|lag| lag <= self.rules.lag)
        };
        member.vote != Voting::Demoted
            && if self.present.contains(&member.id) {
                !self.lost(member.id)
            } else {
                ready()
            }
    }

    /// The best set of each size.
    fn choices(&self) -> impl Iterator<Item = BTreeSet<u64>> + '_ {
        (1..=MAX_VOTERS).step_by(2).filter_map(|size| self.choose(size))
    }

    /// One after the other, from the zone that has the fewest.
    fn choose(&self, size: usize) -> Option<BTreeSet<u64>> {
        let mut chosen = BTreeSet::new();
        let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
        for _ in 0..size {
            let left = self.members.values().filter(|member| {
                !chosen.contains(&member.id) && (self.fit(member) || self.present.contains(&member.id))
            });
            let next = left.min_by_key(|member| {
                (
                    !self.fit(member),
                    member.vote != Voting::Promoted,
                    zones.get(member.zone.as_str()).copied().unwrap_or(0),
                    member.id != self.leader,
                    !self.present.contains(&member.id),
                    member.id,
                )
            })?;
            chosen.insert(next.id);
            *zones.entry(&next.zone).or_default() += 1;
        }
        Some(chosen)
    }
}
