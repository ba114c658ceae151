//! The maps, all pinned by name, and how an instance is found in them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    helpers::bpf_get_prandom_u32,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap},
};
use flynn_abi::{
    Backend, BackendKey, DatagramFlow, DatagramPeer, DropReason, MAX_BACKENDS, MAX_DATAGRAM_PEERS,
    MAX_SERVICES, ServiceConfig, ServiceFlow,
};

use crate::context::Address;

#[map(name = "service_config")]
static CONFIG: Array<ServiceConfig> = Array::pinned(1, 0);

/// How many instances each service has.
#[map(name = "service_counts")]
static COUNTS: Array<u32> = Array::pinned(MAX_SERVICES, 0);

// Not preallocated: a value that user space removes is then freed after a grace period and not reused under a program
// that still reads it.
#[map(name = "service_backends")]
static BACKENDS: HashMap<BackendKey, Backend> = HashMap::pinned(MAX_BACKENDS, BPF_F_NO_PREALLOC);

#[map(name = "service_peers")]
pub(crate) static PEERS: LruHashMap<DatagramPeer, DatagramFlow> = LruHashMap::pinned(MAX_DATAGRAM_PEERS, 0);

/// Hangs on each connected socket and goes with it, so that no flow is ever forgotten for others' sake.
#[btf_map]
#[allow(
    non_upper_case_globals,
    reason = "the name of a BTF map is that of its static"
)]
pub(crate) static service_flows: SkStorage<ServiceFlow> = SkStorage::new();

/// What a virtual address stands for.
#[derive(Clone, Copy)]
pub(crate) struct Virtual {
    pub(crate) service: u32,
    pub(crate) leader: bool,
}

/// The service that an address belongs to, if it is virtual at all.
#[inline(always)]
pub(crate) fn find(address: Address) -> Option<Virtual> {
    let config = CONFIG.get(0)?;
    let offset = match address.v4() {
        Some(v4) => {
            let network = u32::from_be_bytes(config.network4.octets());
            let offset = u32::from_be(v4).wrapping_sub(network);
            if offset >= config.size4 {
                return None;
            }
            offset
        }
        None => {
            let network = Address::from(config.network6);
            if config.size4 == 0 || address.0[0] != network.0[0] || address.0[1] != network.0[1] {
                return None;
            }
            // Beyond the last service there is nobody, but the address is virtual all the same.
            if address.0[2] == 0 {
                u32::from_be(address.0[3])
            } else {
                0
            }
        }
    };
    Some(Virtual {
        service: offset >> 1,
        leader: offset & 1 != 0,
    })
}

#[inline(always)]
pub(crate) fn backend(place: BackendKey) -> Option<&'static Backend> {
    // SAFETY: the map is not preallocated, so the entry outlives this program run; user space replaces entries whole.
    unsafe { BACKENDS.get(place) }
}

/// Chooses an instance, at random where there are several.
#[inline(always)]
pub(crate) fn choose(wanted: Virtual) -> Result<(BackendKey, &'static Backend), DropReason> {
    if wanted.leader {
        let place = BackendKey {
            service: wanted.service,
            index: BackendKey::LEADER,
        };
        return backend(place)
            .map(|found| (place, found))
            .ok_or(DropReason::NoInstance);
    }
    // SAFETY: a helper without arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    // Once more if the service has become smaller between the two looks.
    match pick(wanted.service, random) {
        None => pick(wanted.service, random).ok_or(DropReason::NoInstance),
        Some(found) => Ok(found),
    }
}

#[inline(always)]
fn pick(service: u32, random: u32) -> Option<(BackendKey, &'static Backend)> {
    let count = COUNTS.get_ptr(service)?;
    // SAFETY: the entry is there for ever, and whole: it is one word. Volatile, for a second look is meant as one.
    let count = unsafe { core::ptr::read_volatile(count) };
    if count == 0 {
        return None;
    }
    let place = BackendKey {
        service,
        index: random % count,
    };
    backend(place).map(|found| (place, found))
}
