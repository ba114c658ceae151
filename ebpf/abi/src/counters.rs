//! What goes through an endpoint.

/// One entry of the map `counters`, as the container sees it. Segments of a packet that the network stack has not cut
/// yet count as packets; bytes are those of frames as they pass, uncut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// Packets that the container has sent and that went on.
    pub sent_packets: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Packets that were given to the container.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

const _: () = assert!(size_of::<Counters>() == 32);
