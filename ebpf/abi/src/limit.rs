//! How fast containers may send and receive.

/// A value of the map `limits`, in the place of the container in the map `counters`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Limits {
    /// For what the container sends.
    pub sent: Limit,
    /// For what it is given.
    pub received: Limit,
}

/// A rate with a burst, as the generic cell rate algorithm has it: each packet moves the time at which the next is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Limit {
    /// What a byte costs, in nanoseconds shifted by [`Limit::SHIFT`]; zero where there is no limit.
    pub cost: u64,
    /// By how many nanoseconds packets may be early.
    pub burst: u64,
    /// When the next packet is due, by the monotonic clock; zero before the first. It is negative where a whole burst is
    /// longer than the host is up. The programs write this.
    pub due: i64,
}

impl Limit {
    /// Bits after the point in [`Limit::cost`].
    pub const SHIFT: u32 = 16;
}

const _: () = assert!(size_of::<Limits>() == 48);
