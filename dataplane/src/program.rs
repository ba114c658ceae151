//! The programs by name.

use aya::programs::TcAttachType;

/// One of the eBPF programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// What a container sends: for the host's end of its veth.
    FromContainer,
    /// What the host sends to containers: for the overlay's device.
    ToOverlay,
    /// What other hosts send through the tunnel: for the overlay's device.
    FromTunnel,
    /// What comes from outside: for interfaces to other hosts.
    FromUplink,
}

impl Program {
    pub(crate) const ALL: [Self; 4] = [
        Self::FromContainer,
        Self::ToOverlay,
        Self::FromTunnel,
        Self::FromUplink,
    ];

    /// Its name in the object and in pins.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromContainer => "from_container",
            Self::ToOverlay => "to_overlay",
            Self::FromTunnel => "from_tunnel",
            Self::FromUplink => "from_uplink",
        }
    }

    pub(crate) fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|program| program.name() == name)
    }

    /// On which packets of the interface it runs.
    pub(crate) const fn side(self) -> TcAttachType {
        match self {
            Self::FromContainer | Self::FromTunnel | Self::FromUplink => TcAttachType::Ingress,
            Self::ToOverlay => TcAttachType::Egress,
        }
    }
}

/// What a program did with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The kernel's number for its decision.
    pub action: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

impl Outcome {
    /// The packet goes on to the host's stack.
    pub const PASS: u32 = 0;
    /// The packet is dropped.
    pub const DROP: u32 = 2;
    /// The packet goes to another interface.
    pub const REDIRECT: u32 = 7;
}
