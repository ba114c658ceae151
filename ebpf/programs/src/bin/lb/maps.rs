//! The balancer's maps, all pinned by name, and the only ways in which its programs use them.

use aya_ebpf::{
    bindings::{BPF_F_NO_COMMON_LRU, BPF_F_NO_PREALLOC},
    helpers::bpf_ktime_get_coarse_ns,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use flynn_abi::{
    DropReason,
    lb::{
        Backend, CHUNK_SLOTS, Chunk, Config, Cpu, Event, FLOWS, Flow4, Flow6, Former, Formers, MAX_BACKENDS,
        MAX_SERVICES, MAX_VIPS, Pick, RING_CHUNKS, RING_SLOTS, TRANSLATIONS, Translation, TranslationKey,
        Vip, VipKey4, VipKey6, VipTraffic,
    },
};

#[map(name = "lb_config")]
static CONFIG: Array<Config> = Array::pinned(1, 0);

#[map(name = "lb_vips4")]
static VIPS4: HashMap<VipKey4, Vip> = HashMap::pinned(MAX_VIPS, BPF_F_NO_PREALLOC);

#[map(name = "lb_vips6")]
static VIPS6: HashMap<VipKey6, Vip> = HashMap::pinned(MAX_VIPS, BPF_F_NO_PREALLOC);

// In parts, in a hash table: memory is taken only for the services that there are, without maps in maps.
#[map(name = "lb_rings")]
static RINGS: HashMap<u32, Chunk> = HashMap::pinned(MAX_SERVICES * RING_CHUNKS, BPF_F_NO_PREALLOC);

#[map(name = "lb_formers")]
static FORMERS: HashMap<u32, Formers> = HashMap::pinned(MAX_SERVICES * RING_CHUNKS, BPF_F_NO_PREALLOC);

#[map(name = "lb_backends")]
static BACKENDS: Array<Backend> = Array::pinned(MAX_BACKENDS, 0);

// Each CPU has a list of its own of what to forget next, and so never waits for another.
#[map(name = "lb_flows4")]
static FLOWS4: LruHashMap<Flow4, Pick> = LruHashMap::pinned(FLOWS, BPF_F_NO_COMMON_LRU);

#[map(name = "lb_flows6")]
static FLOWS6: LruHashMap<Flow6, Pick> = LruHashMap::pinned(FLOWS, BPF_F_NO_COMMON_LRU);

/// Connections that have sent no more than a SYN: what a flood pushes out is only others of these.
#[map(name = "lb_open")]
static OPEN: LruHashMap<TranslationKey, Translation> = LruHashMap::pinned(TRANSLATIONS / 4, 0);

#[map(name = "lb_established")]
static ESTABLISHED: LruHashMap<TranslationKey, Translation> = LruHashMap::pinned(TRANSLATIONS, 0);

#[map(name = "lb_traffic")]
static TRAFFIC: PerCpuArray<VipTraffic> = PerCpuArray::pinned(MAX_VIPS * 2, 0);

#[map(name = "lb_cpu")]
static CPU: PerCpuArray<Cpu> = PerCpuArray::pinned(1, 0);

#[inline(always)]
pub(crate) fn config() -> Result<&'static Config, DropReason> {
    CONFIG.get(0).ok_or(DropReason::NotReady)
}

#[inline(always)]
pub(crate) fn vip4(key: &VipKey4) -> Option<&'static Vip> {
    // SAFETY: the map is not preallocated, so the entry outlives this program run; user space replaces entries whole.
    unsafe { VIPS4.get(key) }
}

#[inline(always)]
pub(crate) fn vip6(key: &VipKey6) -> Option<&'static Vip> {
    // SAFETY: as above.
    unsafe { VIPS6.get(key) }
}

#[inline(always)]
pub(crate) fn flow4(key: &Flow4) -> Option<Pick> {
    // SAFETY: an entry may be given to another flow while it is read: then a packet goes to that flow's backend. The
    // value is read in one go.
    FLOWS4.get_ptr(key).map(|pick| unsafe { *pick })
}

#[inline(always)]
pub(crate) fn remember4(key: &Flow4, pick: Pick) {
    // A table without room is no fault: the ring says the same as long as it does not change.
    let _ = FLOWS4.insert(key, pick, 0);
}

#[inline(always)]
pub(crate) fn flow6(key: &Flow6) -> Option<Pick> {
    // SAFETY: as above.
    FLOWS6.get_ptr(key).map(|pick| unsafe { *pick })
}

#[inline(always)]
pub(crate) fn remember6(key: &Flow6, pick: Pick) {
    let _ = FLOWS6.insert(key, pick, 0);
}

/// The number of the backend at a slot of a service's ring: 0 = nobody.
#[inline(always)]
pub(crate) fn at_slot(service: u16, slot: u32) -> u16 {
    let key = Chunk::key(service, slot / CHUNK_SLOTS);
    // SAFETY: the map is not preallocated, so the entry outlives this program run; user space replaces entries whole.
    match unsafe { RINGS.get(key) } {
        Some(chunk) => chunk.slots[(slot % CHUNK_SLOTS) as usize],
        None => 0,
    }
}

/// Who had a slot before.
#[inline(always)]
pub(crate) fn formers(service: u16, slot: u32) -> Option<&'static Former> {
    let key = Chunk::key(service, slot / CHUNK_SLOTS);
    // SAFETY: as above.
    let formers = unsafe { FORMERS.get(key) }?;
    Some(&formers.slots[(slot % CHUNK_SLOTS) as usize])
}

/// Which slot a hash, evenly spread over all 32 bits, means.
#[inline(always)]
pub(crate) const fn slot(hash: u32) -> u32 {
    ((hash as u64 * RING_SLOTS as u64) >> 32) as u32
}

#[inline(always)]
pub(crate) fn backend(number: u16) -> Option<*mut Backend> {
    BACKENDS.get_ptr_mut(u32::from(number))
}

#[inline(always)]
pub(crate) fn open(key: &TranslationKey) -> Option<*mut Translation> {
    OPEN.get_ptr_mut(key)
}

#[inline(always)]
pub(crate) fn open_insert(key: &TranslationKey, value: &Translation) -> bool {
    OPEN.insert(key, value, 0).is_ok()
}

#[inline(always)]
pub(crate) fn established(key: &TranslationKey) -> Option<*mut Translation> {
    ESTABLISHED.get_ptr_mut(key)
}

#[inline(always)]
pub(crate) fn established_insert(key: &TranslationKey, value: &Translation) -> bool {
    ESTABLISHED.insert(key, value, 0).is_ok()
}

#[inline(always)]
pub(crate) fn established_remove(key: &TranslationKey) {
    // One that is gone already is what is wanted.
    let _ = ESTABLISHED.remove(key);
}

#[inline(always)]
pub(crate) fn count_traffic(vip: u16, bytes: u32) {
    if let Some(traffic) = TRAFFIC.get_ptr_mut(u32::from(vip)) {
        // SAFETY: this CPU's own slot, and programs are not preempted by one another on it.
        let traffic = unsafe { &mut *traffic };
        traffic.packets += 1;
        traffic.bytes += u64::from(bytes);
    }
}

#[inline(always)]
pub(crate) fn count_flow(vip: u16) {
    if let Some(traffic) = TRAFFIC.get_ptr_mut(u32::from(vip)) {
        // SAFETY: as above.
        unsafe { (*traffic).flows += 1 };
    }
}

#[inline(always)]
pub(crate) fn count_unserved(vip: u16) {
    if let Some(traffic) = TRAFFIC.get_ptr_mut(u32::from(vip)) {
        // SAFETY: as above.
        unsafe { (*traffic).unserved += 1 };
    }
}

#[inline(always)]
pub(crate) fn count(event: Event) {
    if let Some(cpu) = CPU.get_ptr_mut(0) {
        // SAFETY: as above.
        unsafe { (*cpu).events[event as usize] += 1 };
    }
}

/// The time in units of 2^30 ns, near enough a second.
#[inline(always)]
pub(crate) fn now() -> u32 {
    // SAFETY: a helper that only reads the clock.
    (unsafe { bpf_ktime_get_coarse_ns() } >> 30) as u32
}

/// Whether one more new flow may be remembered in this second on this CPU.
#[inline(always)]
pub(crate) fn admits(config: &Config) -> bool {
    let Some(cpu) = CPU.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: as above.
    let cpu = unsafe { &mut *cpu };
    let now = now();
    if cpu.second != now {
        cpu.second = now;
        cpu.new = 0;
    }
    if cpu.new >= config.flood {
        cpu.events[Event::Flood as usize] += 1;
        return false;
    }
    cpu.new += 1;
    true
}
