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
    /// What other hosts send encrypted: for the device that decrypts.
    FromEncrypted,
    /// What comes from outside for a VIP of the load balancer: for the uplink, before [`Program::FromUplink`].
    LbUplink,
    /// What other hosts send encrypted for backends and clients of the load balancer: for the device that decrypts,
    /// before [`Program::FromEncrypted`].
    LbEncrypted,
    /// What backends of the load balancer answer: for the host's ends of their veths, after [`Program::FromContainer`].
    LbAnswer,
}

/// Where among the programs at the same hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    First,
    Middle,
    Last,
}

impl Program {
    /// Those of the overlay's object.
    pub(crate) const OVERLAY: &[Self] = &[
        Self::FromContainer,
        Self::ToOverlay,
        Self::FromTunnel,
        Self::FromUplink,
        Self::FromEncrypted,
    ];

    /// Those of the load balancer's object.
    pub(crate) const LB: &[Self] = &[Self::LbUplink, Self::LbEncrypted, Self::LbAnswer];

    /// Its name in the object and in pins.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromContainer => "from_container",
            Self::ToOverlay => "to_overlay",
            Self::FromTunnel => "from_tunnel",
            Self::FromUplink => "from_uplink",
            Self::FromEncrypted => "from_encrypted",
            Self::LbUplink => "lb_uplink",
            Self::LbEncrypted => "lb_encrypted",
            Self::LbAnswer => "lb_answer",
        }
    }

    pub(crate) fn by_name(name: &str) -> Option<Self> {
        Self::OVERLAY
            .iter()
            .chain(Self::LB)
            .copied()
            .find(|program| program.name() == name)
    }

    /// On which packets of the interface it runs.
    pub(crate) const fn side(self) -> TcAttachType {
        match self {
            Self::ToOverlay => TcAttachType::Egress,
            _ => TcAttachType::Ingress,
        }
    }
}

impl Program {
    pub(crate) const fn place(self) -> Place {
        match self {
            Self::LbUplink | Self::LbEncrypted => Place::First,
            Self::LbAnswer => Place::Last,
            _ => Place::Middle,
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
    /// The packet goes on to the next program at the hook, and behind the last one to the host's stack.
    pub const NEXT: u32 = u32::MAX;
    /// The packet goes to another interface.
    pub const REDIRECT: u32 = 7;
}
