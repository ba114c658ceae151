//! Who may talk to whom, and how fast.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU64,
    time::Duration,
};

use flynn_abi::{
    Limit, OpenPort, Pair,
    policy::{self, Identity},
};

/// A port of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// The protocol.
    pub protocol: Protocol,
    /// The number.
    pub number: u16,
}

/// A protocol that has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What a container is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    /// The number of the app that it belongs to; 0 for none.
    pub identity: Identity,
    /// It is part of the platform: those which are not reach only its open ports.
    pub system: bool,
    /// The ports that everybody reaches, where `system` closes the others.
    pub open_ports: BTreeSet<Port>,
    /// How fast it may be.
    pub limits: Limits,
}

/// How fast a container may be, in bytes a second. What exceeds it by more than a burst is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// At sending.
    pub sent: Option<NonZeroU64>,
    /// At receiving.
    pub received: Option<NonZeroU64>,
}

/// The cluster's policy: everybody may talk to everybody, with these exceptions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Apps with something about them.
    pub apps: BTreeMap<Identity, AppPolicy>,
    /// Who may open connections to whom in spite of isolation, as pairs of sender and receiver. Answers are included.
    pub allowed: BTreeSet<(Identity, Identity)>,
    /// The ports of hosts that ordinary containers reach. Where it is `None`, they reach all.
    pub host_ports: Option<BTreeSet<Port>>,
}

/// What there is about an app.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AppPolicy {
    /// Nobody else reaches it and it reaches nobody else, but for hosts and those with whom it is allowed.
    pub isolated: bool,
    /// It is part of the platform.
    pub system: bool,
}

impl Protocol {
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl Port {
    pub(crate) fn of(self, slot: u32) -> OpenPort {
        OpenPort {
            slot,
            port: self.number.to_be_bytes(),
            protocol: self.protocol.number(),
            reserved: 0,
        }
    }
}

impl Policy {
    pub(crate) fn identities(&self) -> HashMap<Identity, u32> {
        let flags = |app: &AppPolicy| {
            let isolated = if app.isolated {
                policy::identity::ISOLATED
            } else {
                0
            };
            let system = if app.system { policy::identity::SYSTEM } else { 0 };
            isolated | system
        };
        let all = self.apps.iter().map(|(&identity, app)| (identity, flags(app)));
        all.filter(|&(_, flags)| flags != 0).collect()
    }

    pub(crate) fn pairs(&self) -> HashMap<Pair, u32> {
        let mut pairs = HashMap::new();
        for &(from, to) in &self.allowed {
            pairs.entry(Pair { from: to, to: from }).or_insert(0);
            pairs.insert(Pair { from, to }, Pair::INITIATE);
        }
        pairs
    }

    pub(crate) fn isolates(&self) -> bool {
        self.apps.values().any(|app| app.isolated)
    }
}

impl Limits {
    pub(crate) fn is_none(self) -> bool {
        self.sent.is_none() && self.received.is_none()
    }

    pub(crate) fn entry(self) -> flynn_abi::Limits {
        flynn_abi::Limits {
            sent: limit(self.sent),
            received: limit(self.received),
        }
    }
}

/// A burst is what the rate allows in this time,
const BURST: Duration = Duration::from_millis(250);
/// or this many bytes where that is more: a few of the largest packets that stacks pass on uncut.
const SMALLEST_BURST: u64 = 256 << 10;

fn limit(rate: Option<NonZeroU64>) -> Limit {
    let Some(rate) = rate else {
        return Limit::default();
    };
    let second = u64::try_from(Duration::from_secs(1).as_nanos()).unwrap_or(u64::MAX);
    let cost = ((second << Limit::SHIFT) / rate).max(1);
    let smallest = (u128::from(SMALLEST_BURST) * u128::from(cost)) >> Limit::SHIFT;
    let burst = smallest.max(BURST.as_nanos());
    Limit {
        cost,
        burst: u64::try_from(burst).unwrap_or(u64::MAX),
        due: 0,
    }
}
