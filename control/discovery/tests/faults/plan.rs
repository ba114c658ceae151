//! Which faults there are, and in which order they come: drawn from a seed.

use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

/// What can go wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Fault {
    /// discoverd of one host is killed.
    Kill,
    KillTheLeader,
    /// Three of five: no majority is left.
    KillThree,
    KillAll,
    /// discoverd is told to end.
    Stop,
    /// discoverd is stopped where it is, and does not know it.
    Pause,
    PauseTheLeader,
    PauseThree,
    /// A host and what it had not synced.
    PowerCut,
    PowerCutThree,
    /// All at one moment.
    PowerCutAll,
    DiskFull,
    /// A member loses its vote, and another one with it, for their number is odd.
    Demote,
    /// Nobody hears the leader, and it hears nobody.
    CutOffTheLeader,
    /// Nobody hears one host, which hears all.
    CutOffOneWay,
    /// One host hears nobody, and all hear it.
    Deafen,
    /// Two hosts on one side, three on the other.
    Split,
    /// Two on each side, and one that sees all.
    Bridge,
    /// Each host sees two others, no two the same.
    Ring,
    /// Each link loses a third of its frames.
    Lossy,
    /// What one host sends comes late, and some of it not at all.
    Slow,
}

impl Fault {
    pub(crate) const ALL: [Self; 21] = [
        Self::Kill,
        Self::KillTheLeader,
        Self::KillThree,
        Self::KillAll,
        Self::Stop,
        Self::Pause,
        Self::PauseTheLeader,
        Self::PauseThree,
        Self::PowerCut,
        Self::PowerCutThree,
        Self::PowerCutAll,
        Self::DiskFull,
        Self::Demote,
        Self::CutOffTheLeader,
        Self::CutOffOneWay,
        Self::Deafen,
        Self::Split,
        Self::Bridge,
        Self::Ring,
        Self::Lossy,
        Self::Slow,
    ];

    /// Whether it is the switch's.
    pub(crate) fn of_links(self) -> bool {
        matches!(
            self,
            Self::CutOffTheLeader
                | Self::CutOffOneWay
                | Self::Deafen
                | Self::Split
                | Self::Bridge
                | Self::Ring
                | Self::Lossy
        )
    }

    /// Whether both can be there at a time. Nothing is slow on a link that is cut, and nobody loses a vote while others
    /// are not well.
    fn goes_with(self, other: Self) -> bool {
        let alone = |fault| matches!(fault, Self::Slow | Self::Demote);
        self.of_links() != other.of_links() && !alone(self) && !alone(other)
    }
}

/// Faults that are there at the same time, for how long, and how long all is well then.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) faults: Vec<Fault>,
    pub(crate) hold: Duration,
    pub(crate) rest: Duration,
}

/// So many faults: all kinds before any comes again. Some of the network's come together with one of a host.
pub(crate) fn rounds(random: &mut StdRng, count: usize) -> Vec<Round> {
    let mut faults = Vec::new();
    while faults.len() < count {
        let mut deck = Fault::ALL;
        deck.shuffle(random);
        faults.extend_from_slice(&deck);
    }
    faults.truncate(count);
    let mut rounds = Vec::new();
    let mut rest = faults.into_iter().peekable();
    while let Some(fault) = rest.next() {
        let mut faults = vec![fault];
        if random.random_bool(0.5) {
            faults.extend(rest.next_if(|next| next.goes_with(fault)));
        }
        rounds.push(Round {
            faults,
            hold: Duration::from_millis(random.random_range(200..2000)),
            rest: Duration::from_millis(random.random_range(0..800)),
        });
    }
    rounds
}
