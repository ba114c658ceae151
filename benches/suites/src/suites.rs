//! Which suites there are.

use crate::row::Row;
use crate::{discovery, dns, host, l4, overlay, services, spine};

/// A suite.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// One host: bootstrap, idle memory, container start, the router
    Spine,
    /// Containers on one host and across two: request/response, connections, bulk TCP
    Overlay,
    /// Virtual addresses of services: what they cost, and what ten thousand of them cost
    Services,
    /// The registry: writes and linearizable reads
    Discovery,
    /// Names: what answering them costs
    Dns,
    /// TCP and UDP routes in the kernel: the program, forwarding beside peers, Maglev
    L4,
    /// One host: starts beside runc, cycles, idle containers, logs, attached terminals, snapshots
    Host,
}

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thoroughness {
    /// Within five minutes of a built tree.
    Quick,
    /// As often as medians want it.
    Full,
}

impl Thoroughness {
    /// One number or the other.
    pub(crate) fn pick<T>(self, quick: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Full => full,
        }
    }
}

/// Which parts of a suite.
#[derive(Clone, Copy)]
pub(crate) struct Only<'o>(pub(crate) Option<&'o str>);

impl Only<'_> {
    /// Whether that part is to be taken.
    pub(crate) fn takes(self, part: &str) -> bool {
        self.0.is_none_or(|only| part.contains(only))
    }
}

impl Suite {
    /// Takes all its rows, or those of some of its parts.
    pub(crate) fn run(self, thoroughness: Thoroughness, only: Only<'_>) -> anyhow::Result<Vec<Row>> {
        let has_parts = matches!(self, Self::Discovery | Self::Host);
        anyhow::ensure!(
            has_parts || only.0.is_none(),
            "this suite has no parts to choose from (--only): discovery and host have"
        );
        match self {
            Self::Spine => spine::run(thoroughness),
            Self::Overlay => overlay::run(thoroughness),
            Self::Services => services::run(thoroughness),
            Self::Discovery => discovery::run(thoroughness, only),
            Self::Dns => dns::run(thoroughness),
            Self::L4 => l4::run(thoroughness),
            Self::Host => host::run(thoroughness, only),
        }
    }
}
