//! Whose packets were dropped.

/// The key of an entry of the map `container_drops`, whose value counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ContainerDrop {
    /// The container's slot.
    pub slot: u32,
    /// The number of the [`DropReason`](crate::DropReason).
    pub reason: u16,
    /// [`ContainerDrop::SENT`] or [`ContainerDrop::FOR_IT`].
    pub side: u16,
}

impl ContainerDrop {
    /// The container had sent the packet.
    pub const SENT: u16 = 0;
    /// The packet was for the container.
    pub const FOR_IT: u16 = 1;
}

const _: () = assert!(size_of::<ContainerDrop>() == 8);
