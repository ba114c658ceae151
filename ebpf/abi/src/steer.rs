//! Which ports of the host lead to the router.

/// A key of the map `steer_ports`: a routed port. Its value is of no meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct SteerKey {
    protocol: u8,
    reserved: u8,
    port: [u8; 2],
}

impl SteerKey {
    /// The protocol by its number in IP headers, and the port.
    #[inline]
    pub const fn new(protocol: u8, port: u16) -> Self {
        Self {
            protocol,
            reserved: 0,
            port: port.to_be_bytes(),
        }
    }

    /// The protocol by its number in IP headers.
    #[inline]
    pub const fn protocol(self) -> u8 {
        self.protocol
    }

    /// The port.
    #[inline]
    pub const fn port(self) -> u16 {
        u16::from_be_bytes(self.port)
    }
}

/// What became of a connection to a routed port: the key in the map `steer_counts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Steered {
    /// The router's socket has got it.
    Taken,
    /// No router is there: whoever else listens gets it, or nobody.
    NoRouter,
    /// The kernel found the router's socket unfit for it: another address family, say.
    Unfit,
}

impl Steered {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Taken, Self::NoRouter, Self::Unfit];

    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Taken => "taken",
            Self::NoRouter => "no_router",
            Self::Unfit => "unfit",
        }
    }
}

/// How many ports may be routed.
pub const MAX_STEERED_PORTS: u32 = 1 << 16;

/// How many sockets the router may have: one for each protocol.
pub const MAX_STEER_SOCKETS: u32 = 4;

const _: () = assert!(size_of::<SteerKey>() == 4 && align_of::<SteerKey>() == 1);
