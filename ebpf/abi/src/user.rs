//! What user space needs besides: leave to copy these types to and from maps.

use crate::{
    Backend, BackendKey, Config, ContainerDrop, Counters, DatagramFlow, DatagramPeer, Endpoint, Host, Ipv4,
    Ipv6, Limits, OpenPort, PacketFlow, PacketPeer, Pair, Peer, ServiceConfig, SteerKey,
};

// SAFETY: `repr(transparent)` over bytes; every pattern of bits is a value.
unsafe impl aya::Pod for Ipv4 {}
// SAFETY: as above.
unsafe impl aya::Pod for Ipv6 {}
// SAFETY: `repr(C)` of integers and bytes, with no padding: the sizes asserted beside the types are the sums of their fields.
unsafe impl aya::Pod for Config {}
// SAFETY: as above.
unsafe impl aya::Pod for ContainerDrop {}
// SAFETY: as above.
unsafe impl aya::Pod for Counters {}
// SAFETY: as above.
unsafe impl aya::Pod for Endpoint {}
// SAFETY: as above.
unsafe impl aya::Pod for Host {}
// SAFETY: as above.
unsafe impl aya::Pod for Limits {}
// SAFETY: as above.
unsafe impl aya::Pod for OpenPort {}
// SAFETY: as above.
unsafe impl aya::Pod for Pair {}
// SAFETY: as above.
unsafe impl aya::Pod for Peer {}
// SAFETY: as above.
unsafe impl aya::Pod for ServiceConfig {}
// SAFETY: as above.
unsafe impl aya::Pod for BackendKey {}
// SAFETY: as above.
unsafe impl aya::Pod for Backend {}
// SAFETY: as above.
unsafe impl aya::Pod for DatagramPeer {}
// SAFETY: as above.
unsafe impl aya::Pod for DatagramFlow {}
// SAFETY: as above.
unsafe impl aya::Pod for PacketPeer {}
// SAFETY: as above.
unsafe impl aya::Pod for PacketFlow {}
// SAFETY: as above.
unsafe impl aya::Pod for crate::v1::Config {}

// SAFETY: as above.
unsafe impl aya::Pod for crate::bench::Plan {}
// SAFETY: as above.
unsafe impl aya::Pod for crate::bench::Seen {}

macro_rules! lb {
    ($($name:ident),*) => {
        $(
            // SAFETY: as above.
            unsafe impl aya::Pod for crate::lb::$name {}
        )*
    };
}

lb!(
    VipKey4,
    VipKey6,
    Vip,
    Flow4,
    Flow6,
    Pick,
    Chunk,
    Formers,
    Backend,
    Config,
    TranslationKey,
    Translation,
    VipTraffic,
    Cpu
);
// SAFETY: as above.
unsafe impl aya::Pod for SteerKey {}
