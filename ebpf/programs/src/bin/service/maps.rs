//! The maps that only these programs use, pinned by name.

use aya_ebpf::{
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::LruHashMap,
};
use flynn_abi::{DatagramFlow, DatagramPeer, MAX_DATAGRAM_PEERS, ServiceFlow};

#[map(name = "service_peers")]
pub(crate) static PEERS: LruHashMap<DatagramPeer, DatagramFlow> = LruHashMap::pinned(MAX_DATAGRAM_PEERS, 0);

/// Hangs on each connected socket and goes with it, so that no flow is ever forgotten for others' sake.
#[btf_map]
#[allow(
    non_upper_case_globals,
    reason = "the name of a BTF map is that of its static"
)]
pub(crate) static service_flows: SkStorage<ServiceFlow> = SkStorage::new();
