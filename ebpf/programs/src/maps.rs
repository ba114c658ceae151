//! The maps, all pinned by name, and the only ways in which the programs use them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, PerCpuArray, PerCpuHashMap},
    programs::TcContext,
};
use flynn_abi::{
    Config, ContainerDrop, Counters, DropReason, Endpoint, Host, Ipv4, Ipv6, Limits, MAX_CONTAINER_DROPS,
    MAX_DROP_REASONS, MAX_ENDPOINTS, MAX_HOST_ADDRESSES, MAX_HOSTS, MAX_IDENTITIES, MAX_LOCAL_ENDPOINTS,
    MAX_OPEN_PORTS, MAX_PAIRS, OpenPort, Pair, Peer, policy::Identity,
};

#[map(name = "config")]
static CONFIG: Array<Config> = Array::pinned(1, 0);

// Not preallocated: a value that user space removes is then freed after a grace period and not reused under a program
// that still reads it.
#[map(name = "endpoints4")]
static ENDPOINTS4: HashMap<Ipv4, Endpoint> = HashMap::pinned(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map(name = "endpoints6")]
static ENDPOINTS6: HashMap<Ipv6, Endpoint> = HashMap::pinned(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

// The same values by their places in this host's subnet: an array is found in a fraction of the time of a hash. User
// space clears an entry before it goes, and programs that see one half written take it for a packet that came too soon.
#[map(name = "local")]
static LOCAL: Array<Endpoint> = Array::pinned(MAX_LOCAL_ENDPOINTS, 0);

#[map(name = "hosts4")]
static HOSTS4: HashMap<Ipv4, Host> = HashMap::pinned(MAX_HOSTS, BPF_F_NO_PREALLOC);

#[map(name = "peers")]
static PEERS: HashMap<Ipv4, Peer> = HashMap::pinned(MAX_HOSTS, BPF_F_NO_PREALLOC);

#[map(name = "host_addresses")]
static HOST_ADDRESSES: HashMap<Ipv6, u32> = HashMap::pinned(MAX_HOST_ADDRESSES, BPF_F_NO_PREALLOC);

#[map(name = "identities")]
static IDENTITIES: HashMap<Identity, u32> = HashMap::pinned(MAX_IDENTITIES, BPF_F_NO_PREALLOC);

#[map(name = "pairs")]
static PAIRS: HashMap<Pair, u32> = HashMap::pinned(MAX_PAIRS, BPF_F_NO_PREALLOC);

#[map(name = "open_ports")]
static OPEN_PORTS: HashMap<OpenPort, u32> = HashMap::pinned(MAX_OPEN_PORTS, BPF_F_NO_PREALLOC);

#[map(name = "limits")]
static LIMITS: Array<Limits> = Array::pinned(MAX_LOCAL_ENDPOINTS, 0);

#[map(name = "counters")]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::pinned(MAX_LOCAL_ENDPOINTS, 0);

#[map(name = "drops")]
static DROPS: PerCpuArray<u64> = PerCpuArray::pinned(MAX_DROP_REASONS, 0);

/// The slot of the container behind each interface of this host.
#[map(name = "veths")]
static VETHS: HashMap<u32, u32> = HashMap::pinned(MAX_LOCAL_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map(name = "container_drops")]
static CONTAINER_DROPS: PerCpuHashMap<ContainerDrop, u64> =
    PerCpuHashMap::pinned(MAX_CONTAINER_DROPS, BPF_F_NO_PREALLOC);

#[inline(always)]
pub fn config() -> Result<&'static Config, DropReason> {
    match CONFIG.get(0) {
        Some(config) if config.flags & Config::READY != 0 => Ok(config),
        _ => Err(DropReason::NotReady),
    }
}

/// Who is behind an address.
#[inline(always)]
pub fn endpoint4(address: Ipv4) -> Option<&'static Endpoint> {
    // SAFETY: the entry outlives this program run: it is one of an array, or of a map that is not preallocated. User space
    // replaces entries whole.
    entry4(address).map(|endpoint| unsafe { &*endpoint })
}

/// The same, to write to it what is for programs to write.
#[inline(always)]
pub fn entry4(address: Ipv4) -> Option<*mut Endpoint> {
    local(address).or_else(|| ENDPOINTS4.get_ptr_mut(address))
}

#[inline(always)]
pub fn entry6(address: Ipv6) -> Option<*mut Endpoint> {
    local6(address).or_else(|| ENDPOINTS6.get_ptr_mut(address))
}

/// Who is behind an address of this host's subnet.
#[inline(always)]
fn local(address: Ipv4) -> Option<*mut Endpoint> {
    let config = CONFIG.get(0)?;
    let address = u32::from_ne_bytes(address.octets());
    let mask = u32::from_ne_bytes(config.subnet_mask4.octets());
    if mask == 0 || address & mask != u32::from_ne_bytes(config.subnet4.octets()) {
        return None;
    }
    let endpoint = LOCAL.get_ptr_mut(u32::from_be(address & !mask))?;
    // SAFETY: an entry of an array is there for ever.
    let flags = unsafe { (*endpoint).flags };
    (flags != 0).then_some(endpoint)
}

/// The same for IPv6, where the IPv4 address is the end of the address.
#[inline(always)]
fn local6(address: Ipv6) -> Option<*mut Endpoint> {
    let config = CONFIG.get(0)?;
    let [a @ .., e, f, g, h] = address.octets();
    let [b @ .., _, _, _, _] = config.network6.octets();
    if a == b && config.mask6 != Ipv6::default() {
        local(Ipv4::new([e, f, g, h]))
    } else {
        None
    }
}

/// The host whose subnet begins with this address.
#[inline(always)]
pub fn host4(subnet: Ipv4) -> Option<&'static Host> {
    // SAFETY: the map is not preallocated, so the entry outlives this program run; user space replaces entries whole.
    unsafe { HOSTS4.get(subnet) }
}

/// The host that sends tunnelled packets from this address.
#[inline(always)]
pub fn peer(address: Ipv4) -> Option<&'static Peer> {
    // SAFETY: as above.
    unsafe { PEERS.get(address) }
}

#[inline(always)]
pub fn is_host_address(address: Ipv6) -> bool {
    HOST_ADDRESSES.get_ptr(address).is_some()
}

/// The flags of an identity.
#[inline(always)]
pub fn identity(identity: Identity) -> u32 {
    // SAFETY: as above.
    unsafe { IDENTITIES.get(identity) }.map_or(0, |flags| *flags)
}

/// The flags of a pair, if the two are one.
#[inline(always)]
pub fn pair(pair: Pair) -> Option<u32> {
    // SAFETY: as above.
    unsafe { PAIRS.get(pair) }.copied()
}

#[inline(always)]
pub fn is_open(port: OpenPort) -> bool {
    OPEN_PORTS.get_ptr(port).is_some()
}

/// The limits of the container with this slot, to be used one atomic access at a time.
#[inline(always)]
pub fn limits(slot: u32) -> Option<*mut Limits> {
    LIMITS.get_ptr_mut(slot)
}

#[inline(always)]
pub fn count_sent(ctx: &TcContext, endpoint: &Endpoint) {
    if let Some(counters) = COUNTERS.get_ptr_mut(endpoint.slot) {
        // SAFETY: this CPU's own slot, and programs are not preempted by one another on it.
        let counters = unsafe { &mut *counters };
        counters.sent_packets += packets(ctx);
        counters.sent_bytes += u64::from(ctx.len());
    }
}

#[inline(always)]
pub fn count_received(ctx: &TcContext, endpoint: &Endpoint) {
    if let Some(counters) = COUNTERS.get_ptr_mut(endpoint.slot) {
        // SAFETY: as above.
        let counters = unsafe { &mut *counters };
        counters.received_packets += packets(ctx);
        counters.received_bytes += u64::from(ctx.len());
    }
}

#[inline(always)]
pub fn count_drop(reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: as above.
        unsafe { *count += 1 };
    }
}

/// The slot of the container whose veth this is.
#[inline(always)]
pub fn slot_behind(ifindex: u32) -> Option<u32> {
    // SAFETY: as above.
    unsafe { VETHS.get(ifindex) }.copied()
}

#[inline(always)]
pub fn count_container_drop(drop: ContainerDrop) {
    match CONTAINER_DROPS.get_ptr_mut(drop) {
        // SAFETY: this CPU's own value, and programs are not preempted by one another on it.
        Some(count) => unsafe { *count += 1 },
        None => {
            // A table that is full counts no more; the drop is counted by its reason all the same.
            let _ = CONTAINER_DROPS.insert(drop, 1, 0);
        }
    }
}

/// How many packets will be on the wire: the stack passes big ones on uncut.
#[inline(always)]
fn packets(ctx: &TcContext) -> u64 {
    // SAFETY: the kernel hands programs a valid context.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    if segments == 0 { 1 } else { u64::from(segments) }
}
