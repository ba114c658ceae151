//! Why a packet was dropped.

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident => $name:literal,)+) => {
        /// Why a packet was dropped: its number is the key in the map `drops`. Reasons are only ever added at the end.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in metrics.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

drop_reasons! {
    /// The programs are attached but have not been told of the network yet.
    NotReady => "not_ready",
    /// Neither IPv4 nor IPv6. Neighbours are fixed entries here, so ARP is among these.
    NotIp => "not_ip",
    /// The frame carries a VLAN tag.
    VlanTagged => "vlan_tagged",
    /// The frame is for a group: the overlay has no multicast and no broadcast.
    Multicast => "multicast",
    /// The packet ends before its headers do.
    Truncated => "truncated",
    /// The IP header contradicts the frame or itself.
    Malformed => "malformed",
    /// A container sent from an address which is not its own.
    SpoofedAddress => "spoofed_address",
    /// A container sent from an Ethernet address which is not its own.
    SpoofedMac => "spoofed_mac",
    /// The destination is an address of the cluster with nobody behind it.
    NoEndpoint => "no_endpoint",
    /// The kernel could not rewrite the packet, for want of memory.
    RewriteFailed => "rewrite_failed",
    /// Something which is no host of this cluster sent to the overlay's port.
    UnknownHost => "unknown_host",
    /// There is no route to the host that the destination is on.
    NoRoute => "no_route",
    /// A host of the cluster sent a packet from an address which is not of its subnet.
    ForeignSubnet => "foreign_subnet",
    /// A packet from an address of the cluster came without a tunnel, and not from a host that does so.
    NotTunnelled => "not_tunnelled",
    /// Sender or receiver is isolated and the two are not linked.
    Isolated => "isolated",
    /// Sender or receiver is isolated, and the sender may only answer the receiver.
    MayOnlyAnswer => "may_only_answer",
    /// The receiver is part of the platform and the port is not for everybody.
    PortClosed => "port_closed",
    /// The receiver is a host and the port is not for containers.
    HostPortClosed => "host_port_closed",
    /// The policy asks for the transport protocol, and the packet has none that it knows or hides it behind extensions.
    UnknownTransport => "unknown_transport",
    /// The packet is larger than the way to its receiver takes.
    TooBig => "too_big",
    /// The network was congested on the way here, and the packet cannot carry that news on.
    Congested => "congested",
    /// The container has sent more than it may.
    SentTooFast => "sent_too_fast",
    /// The container was sent more than it may receive.
    ReceivedTooFast => "received_too_fast",
    /// The service whose virtual address was asked for has no instance, or no leader.
    NoInstance => "no_instance",
    /// The service's instances have no address of the kind that the socket speaks.
    NoInstanceOfFamily => "no_instance_of_family",
    /// The VIP's service has no backend.
    NoBackend => "no_backend",
    /// A client's port reaches one backend through so many VIPs that no other port was found for it.
    PortsTaken => "ports_taken",
    /// A flow that nobody knows, in a second with too many of them.
    TooManyFlows => "too_many_flows",
    /// The other host is one that packets are only exchanged with encrypted, and this one was not, or could not be.
    NotEncrypted => "not_encrypted",
    /// A packet to a service's virtual address that came past the sockets has no ports: it is neither TCP nor UDP, or a
    /// fragment.
    NotTranslatable => "not_translatable",
    /// A TCP packet to a service's virtual address is of no connection that is known, or that is any more.
    UnknownConnection => "unknown_connection",
    /// The sender's port reaches the instance by another virtual address already: answers could not be told apart.
    PortInUse => "port_in_use",
}

const _: () = assert!(DropReason::ALL.len() <= crate::MAX_DROP_REASONS as usize);
